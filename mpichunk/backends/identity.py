"""The network that returns its input: cropped, and repeated to the output channels.

Measures everything but the network, and proves that every voxel lands where it belongs. numpy only;
knows no accelerators.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.devices.probing import cpu_kind
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError, UserError


class IdentityBackend:
    """Output channel c is input channel c modulo the number of input channels."""

    name = "identity"
    cpu_only = True

    def model_files(self, model: Model) -> list[Path]:
        """Return no files: there is no network."""
        return []

    def probe(self, requested: str) -> VisibleDevices:
        """Return the CPU, without importing any framework."""
        return VisibleDevices(cpu_kind=cpu_kind())

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Return nothing: there is no network."""
        return None

    def load(
        self, model: Model, request: EngineRequest, prepared: bytes | None = None
    ) -> "IdentityEngine":
        """Return the engine; nothing can fail."""
        return IdentityEngine(request)


class IdentityEngine:
    """Cuts and repeats; where it can, by a view."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._inner = tuple(
            slice(c, n - c) for n, c in zip(request.patch_shape, request.crop, strict=True)
        )
        self._channels = np.arange(request.out_channels) % request.in_channels
        self._arrays = NumpyArrays()

    @property
    def arrays(self) -> NumpyArrays:
        """Arrays of numpy, on the host."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return EngineInfo(
            backend="identity",
            version=f"numpy {np.__version__}",
            device="cpu",
            device_kind=cpu_kind(),
            precision="float32",
            threads=1,
        )

    def infer(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return (n, out_channels, *Q); usually a view of the batch."""
        inner = batch_nczyx[(slice(None), slice(None), *self._inner)]
        num_in, num_out = inner.shape[1], self._request.out_channels
        if num_out <= num_in:
            return inner[:, :num_out]
        if num_in == 1:
            return np.broadcast_to(inner, (inner.shape[0], num_out, *inner.shape[2:]))
        repeated: npt.NDArray[Any] = inner[:, self._channels]
        return repeated

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether the host had no memory left."""
        return isinstance(error, MemoryError)

    def explain(self, error: Exception) -> UserError:
        """Return the error in a user's words; there is no network to blame."""
        return ModelError(f"the identity backend failed: {error}", key="model.backend")
