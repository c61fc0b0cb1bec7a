"""A core on its way to the disk, a window of it at a time, so that encoded copies of it stay few.

Knows no storage, only futures; `plan` counts memory by the same arithmetic.

    core    [durable | under way: WINDOW_NBYTES at most | waiting]     in parts of whole write units
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import prod

from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box, Grid, Triple, ceil_div, triple
from mpichunk.volume.future import BlockFuture

PART_NBYTES = 8 << 20
"""Of a part, unless one write unit has more: enough not to notice what each part costs."""

WINDOW_NBYTES = 32 << 20
"""Parts under way at the same time, unless one has more: enough to keep disks and networks busy."""


class Writing:
    """A core that is being written.

    The first parts begin at once, the others while `result` waits.

    Args:
        parts: What is to be written, in this order.
        begin: Begins to write one part.
        voxel_nbytes: Bytes of a voxel.
    """

    def __init__(
        self, parts: Grid, begin: Callable[[Box], BlockFuture[None]], voxel_nbytes: int
    ) -> None:
        self._waiting = deque(parts)
        self._begin = begin
        self._voxel_nbytes = voxel_nbytes
        self._under_way: deque[tuple[int, BlockFuture[None]]] = deque()
        self._nbytes = 0
        self._fill()

    def result(self) -> None:
        """Return once all bytes are durable.

        Raises:
            BlockError: they are not; the message names volume, core and cause.
            DiskFullError: there is no space or no quota left; the same message for every core.
        """
        try:
            while self._under_way:
                nbytes, future = self._under_way.popleft()
                future.result()
                self._nbytes -= nbytes
                self._fill()
        finally:
            # After a failure: another rank may be given the block, and must not meet this one.
            for _, future in self._under_way:
                with suppress(BlockError):
                    future.result()

    def _fill(self) -> None:
        """Begin what the window has room for."""
        while self._waiting:
            nbytes = self._waiting[0].num_voxels * self._voxel_nbytes
            if self._under_way and self._nbytes + nbytes > WINDOW_NBYTES:
                break
            self._under_way.append((nbytes, self._begin(self._waiting.popleft())))
            self._nbytes += nbytes


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
