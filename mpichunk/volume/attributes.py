"""What array attributes say: order of axes, voxel size, coordinates of the first voxel.

Pure functions over JSON-like values, in the conventions of zarr, N5, HDF5 and their users.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Triple, triple
from mpichunk.volume.source import VoxelSize
from mpichunk.words import count

Attributes = Mapping[str, Any]

NANOMETERS: Mapping[str, float] = {
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimeters"), 1e6),
    **dict.fromkeys(("m", "meter", "meters"), 1e9),
    **dict.fromkeys(("å", "angstrom", "angstroms"), 0.1),
}
"""Nanometers per unit."""

_SIZES: Mapping[str, str | None] = {
    "voxel_size_nm": "nm",
    "voxel_size_um": "um",
    "element_size_um": "um",
    "voxel_size": None,
    "resolution": None,
    "pixelResolution": None,
}
"""Attributes that hold a voxel size, and the unit that their name tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """What the config says of a volume; it overrides the volume's own attributes."""

    voxel_size: VoxelSize | None = None
    """zyx in nm."""

    voxel_offset: Triple | None = None
    """Coordinates zyx of the first voxel."""


_CHANNEL = ("c", "channel", "channels", "c^", "channel^")


def axes_of(names: Sequence[str | None], rank: int, fallback: str) -> str:
    """Return the axes of an array, one letter of `czyx` each, in the array's own order.

    Names other than permutations of z, y, x and perhaps a channel say nothing; then the last
    letters of `fallback` count (the first, where that begins with x).

    Raises:
        VolumeError: the array has neither three nor four axes.
    """
    if rank not in (3, 4):
        raise VolumeError(
            f"has {count(rank, 'axis', 'axes')}; expected 3 (z, y, x) or 4 (with channels)"
        )
    words = [(name or "").lower() for name in names]
    letters = "".join("c" if word in _CHANNEL else word[:1] for word in words)
    plain = all(word in (*_CHANNEL, "z", "y", "x") for word in words)
    if plain and len(words) == rank and sorted(letters) == sorted("czyx" if rank == 4 else "zyx"):
        return letters
    return fallback[:rank] if fallback.startswith("x") else fallback[-rank:]


def voxel_size_of(attributes: Attributes, axes: str) -> VoxelSize | None:
    """Return the voxel size zyx in nm, or None if no attribute tells it.

    Attributes list numbers in the array's own order of axes, with or without the channel.

    Raises:
        VolumeError: an attribute of that name holds something else.
    """
    for name, named_unit in _SIZES.items():
        value: Any = attributes.get(name)
        unit = named_unit or attributes.get("unit", attributes.get("units", "nm"))
        if isinstance(value, Mapping):
            value, unit = value.get("dimensions"), value.get("unit", "nm")
        if value is None:
            continue
        size = _spatial(value, axes, name, float)
        scales = [_nanometers(u) for u in _per_axis(unit, axes)]
        if all(0 < s < float("inf") for s in size) and None not in scales:
            z, y, x = (s * (n or 0.0) for s, n in zip(size, scales, strict=True))
            return z, y, x
        return None
    return None


def voxel_offset_of(attributes: Attributes, axes: str) -> Triple:
    """Return the coordinates zyx of the first voxel; 0 where no `voxel_offset` tells.

    Raises:
        VolumeError: the attribute does not hold whole numbers.
    """
    value = attributes.get("voxel_offset")
    if value is None:
        return 0, 0, 0
    offset = _spatial(value, axes, "voxel_offset", float)
    if not all(number.is_integer() for number in offset):
        raise VolumeError(
            f"attribute voxel_offset holds {value}; expected whole voxels: set it in the config",
            key="voxel_offset",
        )
    return triple([int(number) for number in offset])


def _spatial(
    value: Any, axes: str, name: str, number: Callable[[Any], float]
) -> tuple[float, float, float]:
    """Return three numbers zyx out of a list in the order of `axes`."""
    spatial = axes.replace("c", "")
    try:
        numbers = [number(v) for v in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == len(axes):
        spatial = axes
    if len(numbers) != len(spatial) or not all(isfinite(n) for n in numbers):
        raise VolumeError(
            f"attribute {name} holds {value}; expected one number per axis: set it in the config",
            key="voxel_offset" if name == "voxel_offset" else "voxel_size",
        )
    z, y, x = (numbers[spatial.index(axis)] for axis in "zyx")
    return z, y, x


def _per_axis(unit: Any, axes: str) -> list[Any]:
    """Return the unit of z, y and x out of one unit or a list in the order of `axes`."""
    if isinstance(unit, str) or not isinstance(unit, Sequence):
        return [unit] * 3
    spatial = axes if len(unit) == len(axes) else axes.replace("c", "")
    return [unit[spatial.index(a)] if len(unit) == len(spatial) else None for a in "zyx"]


def _nanometers(unit: Any) -> float | None:
    return NANOMETERS.get(str(unit).strip().lower())
