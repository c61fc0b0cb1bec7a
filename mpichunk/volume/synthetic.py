"""A volume that looks like electron microscopy and is computed on the fly, box by box.

A voxel depends on its absolute coordinates and the seed alone, so any box of a petabyte costs what
the box costs, and nothing is stored. numpy only; knows no drivers, no patches, no networks.

How a voxel comes about:

    cell        Its position, moved by smooth noise so that cells are curved, belongs to the nearest
                of many seeds, one in each cube of a grid: cellular noise (Worley 1996, "A cellular
                texture basis function"). Seeds have weights, so that cells differ in size (a power
                diagram, Aurenhammer 1987); z counts less, so that cells are long, as neurites are.
    interior    Grey and graininess of the cell.
    organelle   A dark body around the seed of some cells, darker than the membranes.
    membrane    Dark where the face between the nearest and the second nearest cell is near.
    noise       Of each voxel.

Cells are computed in integers, noise and greys in float32 without transcendental functions: a voxel
is the same in whatever box it is computed, and on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Grid, Triple
from mpichunk.volume import noise
from mpichunk.volume.noise import Bits, Floats

Ints = npt.NDArray[np.int32]

TILE: Triple = (32, 32, 32)
"""Voxels computed at once: few cells are near, and temporaries stay in the cache."""

UNITS: Triple = (3, 8, 8)
"""Units of fixed-point position per voxel, zyx."""

CUBE = 224
"""Edge, in units, of the cube that holds one seed."""

MARGIN = 34
"""Seeds keep this far from the border of their cube, in units."""

MAX_WEIGHT = 60_000
"""Of a seed, in square units: 1.2 * CUBE**2."""

INDEX_BITS = 9
"""Low bits of a weighted squared distance that say whose it is."""

WARPS = ((128, 64, 64), (5, 13, 13)), ((40, 20, 20), (1, 4, 4))
"""Noise that moves positions: spacing, and amplitude zyx, in voxels."""

MEMBRANE_RADIUS = 2.0
"""Voxels nearer than this to a face are membrane."""

MEMBRANE_GREY, ORGANELLE_GREY = 98.0, 73.0
"""These two, and the numbers in `_draw` and `_looks`, imitate FIB-SEM of fly brain (FIB-25)."""

FARTHEST = 2**50
"""Largest coordinate accepted: above any volume, below any overflow."""

PARAMETERS: dict[str, tuple[Callable[[str], int | float], int, float, float]] = {
    "shape": (int, 3, 1, FARTHEST),
    "seed": (int, 1, 0, 2**64 - 1),
    "offset": (int, 3, -FARTHEST, FARTHEST),
    "voxel_size": (float, 3, 1e-6, 1e12),
}
"""Of the URL: type, how many, smallest and largest."""

USAGE = (
    "synthetic://membranes?shape=64,512,512 and, if wanted, &seed=7 &offset=0,0,0 (first voxel) "
    "&voxel_size=10,10,10 (nm), all zyx"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membranes:
    """Cells with dark membranes and organelles, and where the membranes truly are."""

    shape: Triple
    """Voxels per axis."""

    seed: int = 0
    """Another seed is another volume."""

    offset: Triple = (0, 0, 0)
    """First voxel; another offset shows another part of the same endless tissue."""

    voxel_size: tuple[float, float, float] = (10.0, 10.0, 10.0)
    """zyx in nm."""

    @property
    def domain(self) -> Box:
        """The voxels that the volume has."""
        return Box.from_shape(self.offset, self.shape)

    def image(self, box: Box) -> npt.NDArray[np.uint8]:
        """Return the grey values of `box`, (z, y, x), all above 0."""
        image_zyx = np.empty(box.shape, dtype=np.uint8)
        for tile in Grid(origin=box.start, step=TILE, bounds=box):
            image_zyx[tile.slices(box.start)] = _draw(tile, self.seed)
        return image_zyx

    def truth(self, box: Box) -> npt.NDArray[np.bool_]:
        """Return which voxels of `box` are membrane, (z, y, x)."""
        truth_zyx = np.empty(box.shape, dtype=np.bool_)
        for tile in Grid(origin=box.start, step=TILE, bounds=box):
            truth_zyx[tile.slices(box.start)] = _cells(tile, self.seed).to_face < MEMBRANE_RADIUS
        return truth_zyx


def parse_synthetic(url: str, *, key: str = "input.volume") -> Membranes:
    """Return the volume that a URL like `synthetic://membranes?shape=64,512,512&seed=7` describes.

    Raises:
        VolumeError: the URL is not understood; `key` is the config key that it came from.
    """
    kind, _, query = url.partition("?")
    texts = parse_qs(query, keep_blank_values=True)
    try:
        if kind != "synthetic://membranes":
            raise ValueError("there is no such synthetic volume")
        if "shape" not in texts:
            raise ValueError("shape is missing")
        return Membranes(**{name: _value(name, ",".join(text)) for name, text in texts.items()})
    except ValueError as error:
        raise VolumeError(f"{url}: {error}; expected {USAGE}", key=key) from None


def _value(name: str, text: str) -> Any:
    """Return the number of one parameter, or its numbers in a tuple."""
    if name not in PARAMETERS:
        raise ValueError(f"{name} is unknown")
    number, count, low, high = PARAMETERS[name]
    try:
        numbers = tuple(number(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(low <= n <= high for n in numbers):
        kind = "whole number" if number is int else "number"
        raise ValueError(
            f"{name}={text} is not {count} {kind}{'s'[: count - 1]} from {low} to {high}"
        )
    return numbers if count > 1 else numbers[0]


# ---- What a tile looks like


def _draw(tile: Box, seed: int) -> npt.NDArray[np.uint8]:
    """Return the grey values of a tile, (z, y, x)."""
    cells = _cells(tile, seed)
    brightness, graininess, radius = (look[cells.owner] for look in _looks(cells.seeds))

    # Interior: grains of the size of vesicles.
    coarse = noise.smooth(tile, (5, 5, 5), noise.make_key(seed, "coarse grains"))
    fine = noise.smooth(tile, (3, 3, 3), noise.make_key(seed, "fine grains"))
    grains = coarse + fine
    grey = brightness + graininess * grains

    # Organelle: a ball around the seed, dented where the membrane is near.
    room = np.maximum(cells.to_face - MEMBRANE_RADIUS, 0.1)
    ball = 1 - (cells.to_seed / radius) ** 2 - (3 / room) ** 2
    grey += noise.smoothstep(ball, 0.5) * (ORGANELLE_GREY + 4 * grains - grey)

    # Membrane: half of its darkness is reached where it truly begins.
    membrane = noise.smoothstep(MEMBRANE_RADIUS + 1 - cells.to_face, 2)
    grey += membrane * (MEMBRANE_GREY + 4 * grains - grey)

    grey += 5 * noise.white(tile, noise.make_key(seed, "voxel"))
    return np.clip(np.rint(grey), 1, 255).astype(np.uint8)


def _looks(seeds: "_Seeds") -> tuple[Floats, Floats, Floats]:
    """Return brightness, graininess, and radius of the organelle in voxels, of each cell."""
    brightness = 103 + 75 * noise.uniform(seeds.bits, 0)
    graininess = 3 + 15 * noise.uniform(seeds.bits, 1)
    largest_radius = 12 + (22 / MAX_WEIGHT) * seeds.weight.astype(np.float32)
    radius = largest_radius * np.clip(2 * noise.uniform(seeds.bits, 2) - 0.4, 0.001, 1)
    return brightness, graininess, radius


# ---- Cells


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seeds:
    """The seeds that are nearest or second nearest to some voxel of a tile, and a few more."""

    position: Ints
    """(seed, 3) zyx in units, from the start of the tile."""

    weight: Ints
    """(seed,) taken off squared distances, in square units."""

    bits: Bits
    """(seed,) random: they decide what the cell looks like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """Which cell each voxel of a tile is in, and where in it; arrays (z, y, x)."""

    seeds: _Seeds
    """One for each cell."""

    owner: Ints
    """Index of the cell."""

    to_face: Floats
    """Distance to the nearest face of the cell, in voxels."""

    to_seed: Floats
    """Distance to the seed, in voxels of y and x."""


def _cells(tile: Box, seed: int) -> _Cells:
    """Return the cells of a tile."""
    position = _position(tile, seed)
    seeds = _seeds_near(tile, position, seed)

    # The two smallest weighted squared distances, each with the index of its seed in its low bits.
    first = np.full(tile.shape, np.iinfo(np.int32).max, dtype=np.int32)
    second = first.copy()
    for index, (point, weight) in enumerate(zip(seeds.position, seeds.weight, strict=True)):
        distance = _squared([p - q for p, q in zip(position, point, strict=True)])
        distance -= weight
        distance <<= INDEX_BITS
        distance |= np.int32(index)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    low_bits = np.int32(2**INDEX_BITS - 1)
    owner, other = first & low_bits, second & low_bits
    first >>= INDEX_BITS
    second >>= INDEX_BITS

    # They are equal on the face; away from it, their difference grows with a constant slope.
    apart = (seeds.position[:, None] - seeds.position).astype(np.int64) * UNITS
    slope = 2 * np.sqrt(_squared(list(np.moveaxis(apart, -1, 0))).astype(np.float32))
    return _Cells(
        seeds=seeds,
        owner=owner,
        to_face=(second - first).astype(np.float32) / slope[owner, other],
        to_seed=np.sqrt((first + seeds.weight[owner]).astype(np.float32)) / UNITS[2],
    )


def _position(tile: Box, seed: int) -> list[Ints]:
    """Return where each voxel is moved to: z, y and x in units from the start of the tile."""
    position = []
    for axis in range(3):
        moved = np.zeros(tile.shape, dtype=np.float32)
        for number, (spacing, amplitude) in enumerate(WARPS):
            move = noise.smooth(tile, spacing, noise.make_key(seed, f"warp {number} {axis}"))
            moved += amplitude[axis] * UNITS[axis] * move
        here = noise.along(axis, np.arange(tile.shape[axis], dtype=np.int32) * UNITS[axis])
        position.append(here + np.rint(moved).astype(np.int32))
    return position


def _seeds_near(tile: Box, position: Sequence[Ints], seed: int) -> _Seeds:
    """Return all seeds that can be nearest or second nearest to one of the positions.

    Two cubes further than the positions go is enough: of a seed in the voxel's own cube and one in
    the next, the second is at most 1.81 cubes away, and a seed three cubes off at least 2.15, while
    weights make up for less: 1.81**2 < 2.15**2 - 1.2. For the largest tile and warp these are at
    most 6 * 8 * 8 seeds, and the squared distances that are kept fit in 31 - INDEX_BITS bits.
    """
    low, high = (np.array([f(p) for p in position], dtype=np.int64) for f in (np.min, np.max))
    start = np.array(tile.start, dtype=np.int64) * UNITS
    ends = zip(start + low, start + high, strict=True)
    cubes = [np.arange(a // CUBE - 2, b // CUBE + 3) for a, b in ends]
    bits = noise.hash_grid(cubes, noise.make_key(seed, "seeds")).ravel()
    fields = np.stack([noise.field(bits, i) for i in range(4)], axis=-1)
    corner = np.stack(np.meshgrid(*cubes, indexing="ij"), axis=-1).reshape(-1, 3) * CUBE - start
    point = corner + MARGIN + (fields[:, :3] * (CUBE - 2 * MARGIN) >> 16)
    weight = fields[:, 3] * MAX_WEIGHT >> 16

    # Leave out seeds that are farther from every voxel than two others are from any.
    nearest = _squared(list((np.clip(point, low, high) - point).T)) - weight
    farthest = _squared(list(np.maximum(abs(point - low), abs(point - high)).T)) - weight
    near = nearest <= np.partition(farthest, 1)[1]
    return _Seeds(
        position=point[near].astype(np.int32),
        weight=weight[near].astype(np.int32),
        bits=noise.mix(bits[near]),
    )


def _squared(vector: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the squared length of vectors given as arrays of z, y and x."""
    z, y, x = vector
    squared: npt.NDArray[Any] = z * z
    squared += y * y
    squared += x * x
    return squared
