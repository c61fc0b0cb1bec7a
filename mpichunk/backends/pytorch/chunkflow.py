"""chunkflow's model files, unchanged: what they define, and how it is called.

    InstantiatedModel                a network, into which model.weights is loaded
    load_model(weight_path)          returns a network with its weights
    PatchInferencer(weight_path, output_patch_mask)    patches in and out as numpy arrays
    pre_process(patch), post_process(output)           around the first two

On purpose otherwise than chunkflow: networks are put into eval mode, several patches may make a
batch, and no value is an error for being above 1. Knows no files: modules come in.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpichunk.backends.engine import EngineRequest
from mpichunk.errors import ModelError
from mpichunk.geometry.box import add, subtract

MAKERS = "InstantiatedModel", "load_model", "PatchInferencer"
"""Names in a model file that mean chunkflow's convention."""


class ChunkflowNetwork(nn.Module):
    """Runs a network between the model file's own functions, and keeps the first channels."""

    def __init__(self, network: Any, module: ModuleType, num_channels: int) -> None:
        super().__init__()
        self.network = network
        self._before: Callable[[Any], Any] | None = getattr(module, "pre_process", None)
        self._after: Callable[[Any], Any] | None = getattr(module, "post_process", None)
        self._num_channels = num_channels

    @property
    def leaves_torch(self) -> bool:
        """Whether the batch passes through numpy, where no conversion can follow it."""
        return self._before is not None

    def forward(self, batch_nczyx: Tensor) -> Tensor:
        """Run the network as chunkflow does."""
        value: Any = batch_nczyx
        if self._before is not None:
            # A copy: functions of this kind like to work in place.
            value = self._before(np.array(batch_nczyx.cpu().numpy()))
        value = self.network(_to_device(value, batch_nczyx.device))
        if self._after is not None:
            value = self._after(value)
        output_nczyx = _to_device(value, batch_nczyx.device)
        if isinstance(output_nczyx, Tensor) and output_nczyx.ndim > 1:
            return output_nczyx[:, : self._num_channels]
        return output_nczyx  # type: ignore[no-any-return]  # the engine tells what it is


class UniversalNetwork(nn.Module):
    """Runs a `PatchInferencer`, whose own mask is all ones: the blending here weights patches."""

    leaves_torch = True

    def __init__(self, inferencer: Callable[[Any], Any]) -> None:
        super().__init__()
        self._inferencer = inferencer

    def forward(self, batch_nczyx: Tensor) -> Any:
        """Hand a numpy copy to the inferencer."""
        output = self._inferencer(np.array(batch_nczyx.cpu().numpy()))
        return _to_device(output, batch_nczyx.device)


def make_universal(
    maker: Callable[..., Any], weights: str | None, request: EngineRequest
) -> UniversalNetwork:
    """Return the network of chunkflow's `universal` framework."""
    output_shape = subtract(request.patch_shape, add(request.crop, request.crop))
    return UniversalNetwork(maker(weights, np.ones(output_shape, np.float32)))


def refuse_conversion(network: nn.Module) -> None:
    """Refuse to convert a network that leaves torch on its way.

    Raises:
        ModelError: it calls functions on numpy arrays.
    """
    if getattr(network, "leaves_torch", False):
        raise ModelError(
            "a chunkflow model file with `pre_process` or `PatchInferencer` computes outside "
            "torch, which cannot be converted; set model.backend: pytorch",
            key="model.backend",
        )


def _to_device(value: Any, device: torch.device) -> Any:
    """Return arrays and tensors, also within lists, tuples and dicts, as tensors on a device."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value
