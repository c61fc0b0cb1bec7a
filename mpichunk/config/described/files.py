"""The files that a description names: inside its own folder, there, and the ones it means.

Knows no kind of description.
"""

from pathlib import Path, PurePosixPath

from mpichunk.errors import ModelError
from mpichunk.filehash import file_hash


def named_file(folder: Path, name: str, sha256: str | None = None) -> Path:
    """Return a file of a package.

    Args:
        folder: the package.
        name: what the description says.
        sha256: its hash according to the description, if that has one.

    Raises:
        ModelError: it is elsewhere, missing, or another file.
    """
    if "://" in name:
        raise ModelError(
            f"{folder} names {name}, which is not in it, and mpichunk downloads nothing; export "
            "the model as a package with all its files",
            key="model.path",
        )
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ModelError(f"{folder} names {name!r}, outside its own folder", key="model.path")
    path = folder / name
    if not path.is_file():
        raise ModelError(
            f"{folder} names {name!r}, which is not there; is the package whole?", key="model.path"
        )
    if sha256 is not None and file_hash(path) != sha256:
        raise ModelError(
            f"{path} is not the file that its description names: the SHA-256 differs; it may be "
            "damaged or replaced",
            key="model.path",
        )
    return path
