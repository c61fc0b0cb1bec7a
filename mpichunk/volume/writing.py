"""A core on its way to the disk, a window of it at a time, so that little of it lies there encoded.

Knows no storage, only futures.

    core    [durable | under way: WINDOW_NBYTES at most | waiting]     in parts of whole write units
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box, Grid
from mpichunk.geometry.write_parts import WINDOW_NBYTES
from mpichunk.volume.future import BlockFuture


class Writing:
    """A core that is being written.

    The first part begins at once, the others while `result` waits.

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
        self._begin_next()

    def result(self) -> None:
        """Return once all bytes are durable.

        Raises:
            BlockError: they are not; the message names volume, core and cause.
            DiskFullError: there is no space or no quota left; the same message for every core.
        """
        try:
            self._fill()
            while self._under_way:
                nbytes, future = self._under_way.popleft()
                future.result()
                self._nbytes -= nbytes
                self._fill()
        finally:
            # After a failure another rank may be given the block: it should meet little of this.
            for _, future in self._under_way:
                with suppress(BlockError):
                    future.result()

    def _fill(self) -> None:
        """Begin what the window has room for, one part at least."""
        while self._waiting and (
            not self._under_way or self._nbytes + self._next_nbytes <= WINDOW_NBYTES
        ):
            self._begin_next()

    @property
    def _next_nbytes(self) -> int:
        return self._waiting[0].num_voxels * self._voxel_nbytes

    def _begin_next(self) -> None:
        nbytes = self._next_nbytes
        self._under_way.append((nbytes, self._begin(self._waiting.popleft())))
        self._nbytes += nbytes
