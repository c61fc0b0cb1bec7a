"""Which format lies at a place, and its metadata as JSON.

Tells apart by the file that each format puts at its root; reads no voxel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpichunk.config.formats import format_by_suffix
from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Triple, triple
from mpichunk.volume.address import (
    DRIVERS,
    FORMAT_NAMES,
    HDF5,
    N5,
    PRECOMPUTED,
    ZARR2,
    ZARR3,
    Address,
)
from mpichunk.volume.source import VoxelSize
from mpichunk.volume.tensor import read_json, read_key

MARKERS: Mapping[str, str] = {
    PRECOMPUTED: "info",
    ZARR3: "zarr.json",
    ZARR2: ".zarray",
    N5: "attributes.json",
}
"""The file that says what a volume is, by driver."""

Metadata = dict[str, Any]

_GROUPS = ("zarr.json", ".zgroup", "attributes.json")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def detect(address: Address) -> str | None:
    """Return the driver for what lies at the address; None if nothing there is a volume.

    Raises:
        VolumeError: the place cannot be read.
    """
    path = address.path
    if path is not None and path.is_file():
        return HDF5 if _is_hdf5(path) else None
    try:
        for driver, marker in MARKERS.items():
            if read_key(address.store, marker, address.context) is not None:
                return driver
    except VolumeError as error:
        raise VolumeError(f"{address}: {error.message}") from error
    return None


def format_by_name(place: str) -> str | None:
    """Return the driver that the ending of a name tells, for a volume that is not there yet."""
    name = format_by_suffix(place)
    return None if name is None else DRIVERS[name]


def find_driver(address: Address) -> str:
    """Return the driver of an existing volume, as the address says it or as the files do.

    Raises:
        VolumeError: nothing is there, it is not a volume, or it is one of another format.
    """
    path = address.path
    if path is not None and not path.exists():
        raise VolumeError(f"{address} does not exist{_nearest(path)}")
    found = detect(address)
    if found is None:
        raise VolumeError(f"{address} is not a volume that mpichunk reads{_contents(address)}")
    if address.driver is not None and found != address.driver:
        raise VolumeError(
            f"{address} is not {FORMAT_NAMES[address.driver]}: it is {FORMAT_NAMES[found]}"
        )
    return found


def array_metadata(address: Address) -> Metadata:
    """Return the metadata of one array; for precomputed, its whole info.

    Raises:
        VolumeError: it is a group of arrays, or no JSON.
    """
    driver = address.driver
    assert driver is not None
    try:
        metadata = read_json(address.store, MARKERS[driver], address.context)
    except VolumeError as error:
        raise VolumeError(f"{address}: {error.message}") from error
    if metadata is None:
        raise VolumeError(f"{address} holds no {MARKERS[driver]}")
    if driver == ZARR3 and metadata.get("node_type") != "array":
        raise VolumeError(f"{address} is a zarr group, not an array{_contents(address)}")
    if driver == N5 and "dimensions" not in metadata:
        raise VolumeError(f"{address} is an N5 group, not a dataset{_contents(address)}")
    if driver == PRECOMPUTED and not isinstance(metadata.get("scales"), list):
        raise VolumeError(f"{address} has an info without scales: it is not an image volume")
    return metadata


def attributes_of(address: Address, metadata: Metadata) -> Metadata:
    """Return the user attributes of a zarr or N5 array."""
    if address.driver == N5:
        return metadata
    if address.driver == ZARR3:
        return dict(metadata.get("attributes") or {})
    try:
        return read_json(address.store, ".zattrs", address.context) or {}
    except VolumeError as error:
        raise VolumeError(f"{address}: {error.message}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One scale level of a precomputed volume, turned to zyx."""

    folder: str
    """Where its chunks lie, relative to the volume."""

    encoding: str
    """How its chunks are encoded."""

    is_sharded: bool
    """Whether chunks are packed into shards."""

    shape: Triple
    """Voxels per axis."""

    chunk_shape: Triple
    """Chunk."""

    start: Triple
    """First voxel."""

    voxel_size: VoxelSize
    """In nm."""


def scale_of(address: Address, info: Metadata, mip: int) -> Scale:
    """Return one scale level of a precomputed volume.

    Raises:
        VolumeError: there is no such level, or the info is damaged.
    """
    try:
        scales = [_parse_scale(scale) for scale in info["scales"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VolumeError(
            f"{address} has a damaged info: {type(error).__name__} {error}"
        ) from error
    if mip >= len(scales):
        sizes = ["x".join(f"{size:g}" for size in scale.voxel_size) for scale in scales]
        levels = ", ".join(f"{i} ({size} nm)" for i, size in enumerate(sizes))
        raise VolumeError(f"{address} has no mip {mip}; it has {levels or 'none'}", key="mip")
    return scales[mip]


def refuse_mip(address: Address, mip: int) -> None:
    """Refuse a coarser scale level of a format in which each level is an array of its own.

    Raises:
        VolumeError: `mip` is not 0.
    """
    if mip != 0:
        raise VolumeError(
            f"{address} has one scale level, mip 0; found mip {mip}: name the array of that level "
            "as the volume",
            key="mip",
        )


def _parse_scale(scale: Metadata) -> Scale:
    """Return a scale of an info, whose lists are xyz."""

    def zyx(value: Any) -> Triple:
        return triple(list(value)[::-1])

    x, y, z = (float(r) for r in scale["resolution"])
    return Scale(
        folder=str(scale["key"]),
        encoding=str(scale["encoding"]),
        is_sharded=scale.get("sharding") is not None,
        shape=zyx(scale["size"]),
        chunk_shape=zyx(scale["chunk_sizes"][0]),
        start=zyx(scale.get("voxel_offset", (0, 0, 0))),
        voxel_size=(z, y, x),
    )


def _is_hdf5(path: Path) -> bool:
    """Return whether a file begins like HDF5, perhaps after a user block."""
    try:
        with path.open("rb") as file:
            for offset in (0, 512, 1024, 2048, 4096):
                file.seek(offset)
                if file.read(8) == _HDF5_SIGNATURE:
                    return True
    except OSError as error:
        raise VolumeError(f"{path} cannot be read: {error.strerror}") from error
    return False


def _nearest(path: Path) -> str:
    """Return what there is instead of a missing path, for a message."""
    parent = next((p for p in path.parents if p.exists()), path)
    if parent == path.parent and parent.is_dir():
        return f"; {parent} holds {_listed(_names(parent))}"
    return f"; the nearest that exists is {parent}"


def _contents(address: Address) -> str:
    """Return what a place holds instead of an array, for a message."""
    path = address.path
    if path is None:
        expected = ", ".join(MARKERS.values())
        return f"; expected one of {expected} there"
    if path.is_file():
        return "; it is a file, and not HDF5"
    inside = sorted(child.name for child in _volumes_in(path))
    if inside:
        return f"; give one of the volumes in it: {_listed(inside)}"
    if any((path / name).exists() for name in _GROUPS):
        return "; it is a group without arrays"
    return f"; it holds {_listed(_names(path))}"


def _volumes_in(path: Path) -> Iterator[Path]:
    for child in path.iterdir():
        if child.is_dir() and any((child / marker).is_file() for marker in MARKERS.values()):
            yield child


def _names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def _listed(names: list[str], limit: int = 8) -> str:
    """Return names in words, not too many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
