"""Packages that only some backends need: one message with the command that cures their lack.

Imports nothing: whoever needs a package does, so that everybody sees who that is.
"""

from collections.abc import Mapping
from importlib.util import find_spec

from mpichunk.errors import ModelError

PACKAGES: Mapping[str, str] = {
    "pytorch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
"""What each backend imports."""


def is_installed(backend: str) -> bool:
    """Return whether what a backend imports is there; it may fail to be imported nevertheless."""
    return backend not in PACKAGES or find_spec(PACKAGES[backend]) is not None


def not_importable(name: str, error: ImportError, *, extra: str) -> ModelError:
    """Return what to tell the user about a package that could not be imported.

    Args:
        name: the package.
        error: what importing it raised.
        extra: the extra of mpichunk that brings it.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return ModelError(f"this backend needs {_not_installed(name, extra)}", key="model.backend")
    return ModelError(
        f"the package {name} is installed but cannot be imported: {error}; install it again: "
        f"pip install --force-reinstall 'mpichunk[{extra}]'",
        key="model.backend",
    )


def missing_package(backend: str) -> str | None:
    """Return a sentence about the package that a backend lacks on this machine, None if none."""
    if is_installed(backend):
        return None
    package = PACKAGES[backend]
    # torch comes with mpichunk itself; the others are extras of their own name.
    extra = "" if package == "torch" else backend
    return f"model.backend: on this machine, {backend!r} lacks {_not_installed(package, extra)}"


def _not_installed(package: str, extra: str) -> str:
    """Return the end of a sentence about a package, with the command that cures its lack."""
    what = f"'mpichunk[{extra}]'" if extra else package
    return f"the package {package}, which is not installed: pip install {what}"
