"""Stands for the network on a rank that must not compute: whoever asks it to is refused.

Knows no framework and no device: those may be what is broken.
"""

from typing import NoReturn

from mpichunk.backends.engine import DeviceArray, EngineInfo, EngineRequest
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.errors import ModelError, UserError


class AbsentEngine:
    """An engine that runs nothing.

    Args:
        request: What there should have been.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._arrays = NumpyArrays()

    @property
    def arrays(self) -> NumpyArrays:
        """Arrays of numpy, on the host."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What does not run."""
        return EngineInfo(
            backend="none",
            version="",
            device=self._request.device,
            device_kind="",
            precision=self._request.precision,
            threads=self._request.threads,
        )

    def infer(self, batch_nczyx: DeviceArray) -> NoReturn:
        """Refuse.

        Raises:
            ModelError: always.
        """
        raise ModelError("this rank must not compute", key="compute.device")

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return that memory is not what is missing."""
        return False

    def explain(self, error: Exception) -> UserError:
        """Return the error in a user's words."""
        return ModelError(str(error), key="compute.device")
