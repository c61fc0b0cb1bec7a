"""How a core is cut to be written a little at a time: in parts of whole write units.

`volume` writes by it, `plan` counts memory by it.
"""

from math import prod

from mpichunk.geometry.box import Box, Grid, Triple, ceil_div, triple

PART_NBYTES = 4 << 20
"""Of a part, unless one write unit has more: enough not to notice what each part costs."""

WINDOW_NBYTES = 16 << 20
"""Parts under way at the same time, unless one has more: enough to keep disks and networks busy."""


def write_parts(core: Box, origin: Triple, unit: Triple, voxel_nbytes: int) -> Grid:
    """Return a core as parts of whole write units, in C order.

    Args:
        core: what is written.
        origin: where write units are counted from.
        unit: shape of a write unit.
        voxel_nbytes: bytes of a voxel, all channels.
    """
    step = _part_shape(core.shape, unit, voxel_nbytes)
    return Grid(origin=origin, step=step, bounds=core)


def most_under_way(core_shape: Triple, unit: Triple, voxel_nbytes: int) -> int:
    """Return the most bytes of a core that are being written at the same time."""
    part = prod(_part_shape(core_shape, unit, voxel_nbytes)) * voxel_nbytes
    return min(prod(core_shape) * voxel_nbytes, max(WINDOW_NBYTES, part))


def _part_shape(core_shape: Triple, unit: Triple, voxel_nbytes: int) -> Triple:
    """Return the shape of a part: units along x, then rows of them, then layers of those."""
    step = list(unit)
    for axis in (2, 1, 0):
        fitting = PART_NBYTES // (prod(step) * voxel_nbytes)
        step[axis] *= max(1, min(fitting, ceil_div(core_shape[axis], unit[axis])))
    return triple(step)
