"""Random fields that can be computed anywhere: a value depends on its coordinates and a key alone.

Pure integer hashing, then float32 without transcendental functions, so that the values are the same
in whatever box they are computed, and on every machine. Knows nothing of what it is noise for.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt

from mpichunk.geometry.box import Box, Triple

Bits = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


def smooth(box: Box, spacing: Triple, key: np.uint64) -> Floats:
    """Return value noise (z, y, x), -1 to 1: random on a lattice, smoothstep in between.

    `spacing` of the lattice is in voxels. Smoothstep as in Perlin 1985, "An image synthesizer".
    """
    first = [a // s for a, s in zip(box.start, spacing, strict=True)]
    last = [(b - 1) // s + 1 for b, s in zip(box.stop, spacing, strict=True)]
    lattice = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    noise = 2 * uniform(hash_grid(lattice, key), 0) - 1
    for axis in (2, 1, 0):
        voxel = np.arange(box.start[axis], box.stop[axis])
        index = voxel // spacing[axis] - first[axis]
        rest = (voxel % spacing[axis]).astype(np.float32)
        share = along(axis, smoothstep(rest, spacing[axis]))
        step = np.diff(noise, axis=axis)
        noise = noise.take(index, axis) + step.take(index, axis) * share
    return noise


def white(box: Box, key: np.uint64) -> Floats:
    """Return independent noise, mean 0 and deviation 1: sums of 8 random bytes, standardised."""
    bits = hash_grid([np.arange(a, b) for a, b in zip(box.start, box.stop, strict=True)], key)
    even = np.uint64(0x00FF00FF00FF00FF)
    pairs = (bits & even) + ((bits >> np.uint64(8)) & even)
    total = (pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)
    return (total.astype(np.float32) - np.float32(1020)) / np.float32(209)


def smoothstep(value: Floats, width: float) -> Floats:
    """Return 0 up to 0, 1 from `width` on, and 3t^2 - 2t^3 between, where t = value / width."""
    t: Floats = np.clip(value / width, 0, 1)
    return t * t * (3 - 2 * t)


def along(axis: int, values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """Return a vector shaped to lie along one of three axes."""
    return values.reshape([-1 if a == axis else 1 for a in range(3)])


# ---- Random bits ------------------------------------------------------------------------------


@lru_cache
def make_key(seed: int, use: str) -> np.uint64:
    """Return the key of one use of random bits, so that no two uses are alike."""
    bits = mix(mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(crc32(use.encode())))
    return np.uint64(bits[0])


def hash_grid(axes: Sequence[Longs], key: np.uint64) -> Bits:
    """Return random bits for each point of a grid, (z, y, x); coordinates may be negative."""
    z, y, x = (axis.astype(np.uint64) for axis in axes)
    return mix(mix(mix(key ^ z)[:, None] ^ y)[:, :, None] ^ x)


def uniform(bits: Bits, index: int) -> Floats:
    """Return one of the four 16-bit fields as a number from 0 to below 1."""
    return field(bits, index).astype(np.float32) / np.float32(65536)


def field(bits: Bits, index: int) -> Longs:
    """Return one of the four 16-bit fields, 0 to 65535."""
    return ((bits >> np.uint64(16 * index)) & np.uint64(0xFFFF)).astype(np.int64)


def mix(bits: Bits) -> Bits:
    """Return well mixed bits: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
