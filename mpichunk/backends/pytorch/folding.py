"""Multiplies batch norms into the convolutions before them, and proves that nothing else changed.

Knows networks as torch.fx traces them, and TorchScript. Knows no blocks.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mpichunk.backends.difference import relative_difference
from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.pytorch.chunkflow import ChunkflowNetwork
from mpichunk.backends.pytorch.exported import ExportedNetwork
from mpichunk.backends.pytorch.kernels import computing
from mpichunk.backends.pytorch.weights import first_line
from mpichunk.config.computerules import EXPORTED_NOT_FOLDED
from mpichunk.errors import ModelError

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_LARGEST_DIFFERENCE = 1e-4
"""As a share of the largest value: rounding through a deep network is 1e-5 at most."""


def fold_batch_norm(network: nn.Module, batch_nczyx: Tensor, request: EngineRequest) -> nn.Module:
    """Return the network with its batch norms folded, those that follow a convolution directly.

    The network that comes in is not to be used any more.

    Args:
        network: in `eval` mode, on its device.
        batch_nczyx: a batch that it takes, to compare the values of.
        request: what it must do.

    Raises:
        ModelError: there is nothing to fold, or folding would change the values.
    """
    if isinstance(network, ExportedNetwork):
        raise _refusal(EXPORTED_NOT_FOLDED)
    if isinstance(network, torch.jit.ScriptModule):
        # Before its first run, which may put other operations in the place of its batch norms.
        folded = _fold_script(network)
        expected = _output(network, batch_nczyx, request)
    else:
        expected = _output(network, batch_nczyx, request)
        _fold_modules(network.network if isinstance(network, ChunkflowNetwork) else network)
        folded = network
    found = _output(folded, batch_nczyx, request)
    difference = relative_difference(found.cpu().numpy(), expected.cpu().numpy())
    # NaN on both sides is for the first test batch to find.
    if difference > _LARGEST_DIFFERENCE:
        raise _refusal(
            f"folded, the network differs by {difference:.2g} of its largest value: it uses a "
            "convolution or a batch norm in a way that folding does not support"
        )
    return folded


def _output(network: nn.Module, batch_nczyx: Tensor, request: EngineRequest) -> Tensor:
    """Return the values of a network in float32, all its tensors in a row."""
    with computing(replace(request, precision="float32")):
        output = network(batch_nczyx)
    return torch.cat([tensor.float().flatten() for tensor in _tensors(output)])


def _tensors(output: Any) -> list[Tensor]:
    items = list(output.values()) if isinstance(output, dict) else output
    items = items if isinstance(items, list | tuple) else [items]
    return [item for item in items if isinstance(item, Tensor)]


def _fold_script(script: nn.Module) -> nn.Module:
    """Return TorchScript with its weights as constants, which torch then folds."""
    before = _num_norms(script)
    if before == 0:
        raise _refusal("the network has no batch norm")
    with warnings.catch_warnings():
        # torch would rather see torch.export.
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen: nn.Module = torch.jit.freeze(script)
    if _num_norms(frozen) == before:
        raise _refusal("none of the network's batch norms follows a convolution directly")
    return frozen


def _num_norms(script: Any) -> int:
    return len(script.inlined_graph.findAllNodes("aten::batch_norm"))


def _fold_modules(network: Any) -> None:
    """Fold within a module, in place."""
    if not isinstance(network, nn.Module):
        raise _refusal("the network is not a torch.nn.Module")
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:
        # Whatever the network's own code does with what stands for a tensor.
        raise _refusal(
            f"torch.fx cannot follow the network: {type(error).__name__}: {first_line(error)}"
        ) from error
    pairs = list(_pairs(network, graph))
    if not pairs:
        raise _refusal("no batch norm of the network follows a convolution directly")
    for conv_name, norm_name in pairs:
        conv: Any = network.get_submodule(conv_name)
        norm: Any = network.get_submodule(norm_name)
        fused: nn.Module = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, _TRANSPOSED))
        network.set_submodule(conv_name, fused)
        network.set_submodule(norm_name, nn.Identity())


def _pairs(network: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Yield the names of convolutions and of the batch norms that alone use what they return."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(id(network.get_submodule(node.target)) for node in calls)
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = network.get_submodule(str(before.target))
        norm = network.get_submodule(node.target)
        is_pair = type(conv) in (*_CONVOLUTIONS, *_TRANSPOSED) and type(norm) in _NORMS
        if not is_pair or norm.running_mean is None:
            continue
        if uses[id(conv)] == uses[id(norm)] == 1 and not _is_hooked(conv) and not _is_hooked(norm):
            yield str(before.target), str(node.target)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether code of others runs before or after the module's own."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _refusal(reason: str) -> ModelError:
    return ModelError(f"{reason}; remove compute.fold_batch_norm", key="compute.fold_batch_norm")
