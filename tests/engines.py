"""What tests ask of an engine: the request of a small network, and the engine loaded for it."""

from collections.abc import Iterable, Mapping
from typing import Any

from mpichunk.backends import get_backend
from mpichunk.backends.engine import EngineRequest, Kernels
from mpichunk.config.schema import Model


def make_request(*, kernels: Iterable[str] = (), **changes: Any) -> EngineRequest:
    """Return what is asked of a network that makes two channels of one, on the CPU."""
    values: dict[str, Any] = {
        "patch_shape": (4, 8, 8),
        "crop": (0, 0, 0),
        "batch_size": 2,
        "in_channels": 1,
        "out_channels": 2,
        "threads": 1,
        "precision": "float32",
        "device": "cpu",
        "deterministic": True,
        "kernels": Kernels(**dict.fromkeys(kernels, True)),
    }
    return EngineRequest(**values | changes)


def load_engine(
    backend: str, path: object, *, changes: Mapping[str, Any] | None = None, **keys: Any
) -> Any:
    """Load a network for a request with these changes; `keys` are more keys of `model`."""
    asked = make_request(**changes or {})
    model = Model(backend=backend, path=str(path), out_channels=asked.out_channels, **keys)
    assert get_backend(backend).model_files(model)
    return get_backend(backend).load(model, asked)
