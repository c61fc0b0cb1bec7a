"""A TorchScript network as one flat list of tensor operations, for those that cannot read script.

Runs the network once and records what it does. Knows no engine that reads the list.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx


def flatten(script: nn.Module, batch_nczyx: Tensor) -> nn.Module:
    """Return what a network in `eval` mode does to batches of this one shape."""
    with torch.no_grad():
        # Of what is recorded, other engines lack this operation only.
        known = {torch.ops.aten.native_batch_norm.default: _batch_norm}
        flat: nn.Module = make_fx(script, decomposition_table=known)(batch_nczyx)
    return flat


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, Tensor, Tensor]:
    """Return a batch norm of known statistics as a product and a sum."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x * scale.reshape(shape) + shift.reshape(shape), mean, variance
