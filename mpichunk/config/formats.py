"""What formats of volumes are called, and what each can hold.

Words only. Knows no places, no files and no storage library.
"""

from collections.abc import Mapping
from pathlib import PurePath

from mpichunk.geometry.box import Triple

_WORDS: Mapping[str, str] = {
    "precomputed": "precomputed",
    "neuroglancer-precomputed": "precomputed",
    "zarr": "zarr2",
    "zarr2": "zarr2",
    "zarr3": "zarr3",
    "n5": "n5",
}
_SUFFIXES: Mapping[str, str] = {".zarr": "zarr3", ".n5": "n5", ".h5": "hdf5", ".hdf5": "hdf5"}


def format_by_word(word: str) -> str | None:
    """Return the format of a driver or scheme, such as `zarr` in `file:///a|zarr:`, or None."""
    return _WORDS.get(word.strip().lower().replace("_", "-"))


def format_by_suffix(path: str) -> str | None:
    """Return the format that the ending of a path tells; `.zarr` is what a new one becomes."""
    return _SUFFIXES.get(PurePath(path).suffix.lower())


def shard_mistake(shard_shape: Triple, name: str) -> str | None:
    """Return why a format cannot be written in shards, or None."""
    if name == "zarr3":
        return None
    return (
        f"{shard_shape} requires a zarr3 output, but this one is {name}; remove it or write zarr3"
    )


def dtype_mistake(dtype: str, name: str) -> str | None:
    """Return why a format cannot store a type, or None."""
    if dtype != "float16" or name not in ("precomputed", "n5"):
        return None
    return f"{dtype!r} cannot be stored as {name}; use 'float32', or write zarr3"
