"""What lies outside a volume: `numpy.pad` of the whole volume, from the part that was read.

Pure numpy and geometry. Knows no storage; a block asks for one box, however large the volume is.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpichunk.geometry.box import Box, triple

Mode = Literal["reflect", "edge", "zero"]


def source_box(wanted: Box, domain: Box) -> Box:
    """Return the part of `domain` that every padding mode needs to fill `wanted`; zyx voxels.

    It is `wanted` itself where nothing is missing, and never reaches past `domain`. `wanted` may
    lie wholly outside; it is only empty if `wanted` or `domain` is.
    """
    if wanted.is_empty or domain.is_empty:
        return Box(start=wanted.start, stop=wanted.start)
    if domain.contains(wanted):
        return wanted
    spans = [_needed_span(wanted, domain, axis) for axis in range(3)]
    return Box(
        start=triple([low for low, _ in spans]), stop=triple([high + 1 for _, high in spans])
    )


def pad(
    inside_czyx: npt.NDArray[Any], inside: Box, wanted: Box, domain: Box, mode: Mode
) -> npt.NDArray[Any]:
    """Return the (c, z, y, x) voxels of `wanted`, those outside `domain` made up by `mode`.

    `inside_czyx` holds the voxels of `inside`, which contains `source_box(wanted, domain)`. The
    result equals `numpy.pad` of the whole volume: `reflect` mirrors about the first and the last
    voxel without repeating them, again where the pad is longer than the volume, and repeats the
    voxel of an axis of 1; `edge` repeats the outermost voxel; `zero` is 0. The very same array
    comes back if nothing is missing; any other result is a C-contiguous copy.
    """
    if inside == wanted:
        return inside_czyx
    if mode == "zero" or domain.contains(wanted):
        return _pad_with_zeros(inside_czyx, inside, wanted, domain)
    padded_czyx = inside_czyx
    for axis in range(3):
        if (inside.start[axis], inside.stop[axis]) == (wanted.start[axis], wanted.stop[axis]):
            continue
        index = _source_index(wanted, domain, axis, mode) - inside.start[axis]
        padded_czyx = padded_czyx.take(index, axis=axis + 1)
    return padded_czyx


def _pad_with_zeros(
    inside_czyx: npt.NDArray[Any], inside: Box, wanted: Box, domain: Box
) -> npt.NDArray[Any]:
    """Copy the voxels that `wanted` shares with the volume into an array of zeros."""
    padded_czyx = np.zeros((inside_czyx.shape[0], *wanted.shape), inside_czyx.dtype)
    shared = wanted.intersect(domain)
    if not shared.is_empty:
        target, source = shared.slices(wanted.start), shared.slices(inside.start)
        padded_czyx[(slice(None), *target)] = inside_czyx[(slice(None), *source)]
    return padded_czyx


def _needed_span(wanted: Box, domain: Box, axis: int) -> tuple[int, int]:
    """Return the first and last voxel of one axis that any mode looks at."""
    index = np.concatenate(
        [_source_index(wanted, domain, axis, mode) for mode in ("reflect", "edge")]
    )
    return int(index.min()), int(index.max())


def _source_index(
    wanted: Box, domain: Box, axis: int, mode: Literal["reflect", "edge"]
) -> npt.NDArray[np.int64]:
    """Return, for each position of `wanted` on one axis, the voxel of `domain` it is a copy of."""
    position = np.arange(wanted.start[axis], wanted.stop[axis], dtype=np.int64)
    low, last = domain.start[axis], domain.stop[axis] - 1
    if mode == "edge" or low == last:
        return position.clip(low, last)
    # A mirror at both ends is a triangle wave of this period.
    period = 2 * (last - low)
    phase = (position - low) % period
    return low + np.minimum(phase, period - phase)
