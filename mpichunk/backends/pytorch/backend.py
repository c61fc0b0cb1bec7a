"""The `pytorch` backend: torch.export and TorchScript files, and Python classes with weights.

Imports torch only when it probes or loads.
"""

from pathlib import Path

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.devices.probing import probe_devices
from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.backends.files.source import torch_files
from mpichunk.config.schema import Model


class PytorchBackend:
    """Runs networks by PyTorch, eagerly."""

    name = "pytorch"
    cpu_only = False

    def model_files(self, model: Model) -> list[Path]:
        """Return the network's file and its weights, without importing torch or the network."""
        return torch_files(model)

    def probe(self, requested: str) -> VisibleDevices:
        """Return the accelerators that torch sees, none if only the CPU is asked for."""
        return probe_devices(requested)

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Return nothing: every rank reads the files."""
        return None

    def load(self, model: Model, request: EngineRequest, prepared: bytes | None = None) -> Engine:
        """Load the network onto `request.device`."""
        from mpichunk.backends.pytorch.engine import TorchEngine, prepare_torch
        from mpichunk.backends.pytorch.network import load_network

        prepare_torch(request)
        return TorchEngine(load_network(model, request), request)
