"""Packages that only some backends need: one message with the command that cures their lack.

Imports nothing: whoever needs a package does, so that everybody sees who that is.
"""

from mpichunk.errors import ModelError


def not_importable(name: str, error: ImportError, *, extra: str) -> ModelError:
    """Return what to tell the user about a package that could not be imported.

    Args:
        name: the package.
        error: what importing it raised.
        extra: the extra of mpichunk that brings it.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return ModelError(
            f"this backend needs the package {name}, which is not installed: "
            f"pip install 'mpichunk[{extra}]'",
            key="model.backend",
        )
    return ModelError(
        f"the package {name} is installed but cannot be imported: {error}; install it again: "
        f"pip install --force-reinstall 'mpichunk[{extra}]'",
        key="model.backend",
    )
