"""What can run a network, one folder or file per kind; `get_backend` finds one by its name.

Importing this package imports no framework: a backend does so when it probes or loads.
"""

from pathlib import Path
from typing import Protocol

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.backends.identity import IdentityBackend
from mpichunk.backends.onnxruntime import OnnxruntimeBackend
from mpichunk.backends.openvino.backend import OpenvinoBackend
from mpichunk.backends.pytorch.backend import PytorchBackend
from mpichunk.backends.pznet.backend import PznetBackend
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError


class Backend(Protocol):
    """One way to run networks."""

    @property
    def name(self) -> str:
        """Name in the config."""

    @property
    def cpu_only(self) -> bool:
        """Whether accelerators are of no use to it."""

    def model_files(self, model: Model) -> list[Path]:
        """Return the files whose bytes are the network, without loading them.

        Raises:
            ModelError: a file is missing.
        """

    def probe(self, requested: str) -> VisibleDevices:
        """Return the devices that this process could use; may import the framework.

        `requested` is `compute.device`: for `cpu` no accelerator is touched.
        """

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Make what is costly to make and the same for all ranks; rank 0 does it for all.

        Raises:
            ModelError: the files hold no network that can be used.
        """

    def load(self, model: Model, request: EngineRequest, prepared: bytes | None = None) -> Engine:
        """Load the network onto a device.

        Args:
            model: which network.
            request: what it must do.
            prepared: what `prepare` returned; without it, this rank prepares for itself.

        Raises:
            ModelError: the files hold no network that can be used.
        """


def get_backend(name: str) -> Backend:
    """Return the backend of this name.

    Raises:
        ModelError: there is none.
    """
    backends: tuple[Backend, ...] = (
        IdentityBackend(),
        PytorchBackend(),
        OnnxruntimeBackend(),
        OpenvinoBackend(),
        PznetBackend(),
    )
    for backend in backends:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in backends)
    raise ModelError(f"there is no backend {name!r}; choose one of: {known}", key="model.backend")
