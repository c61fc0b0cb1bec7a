"""The part of a block that patches still touch: added to at the bottom, finished from the top.

Patches come in lattice order, z slowest. What lies above the next one is complete: it is checked,
reduced and sent to the host, and its rows hold what comes below. So the memory of a device does not
grow with the length of a block. Knows no networks, and no arrays but through an engine's.

    core      finished | slab: rows that are added to | not yet touched
                       '- num_finished
    memory    a ring: row z of the core lies in row z modulo the slab's length

On a host that writes the sums as they are the core itself is the ring, and nothing is copied.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends.engine import Arrays, DeviceArray
from mpichunk.backends.reduction import shut, store
from mpichunk.block.nonfinite import (
    NOT_FINITE,
    NOT_FLOAT16,
    Blame,
    Spot,
    describe,
    find_spot,
    joined,
)
from mpichunk.block.windows import Windows
from mpichunk.config.reduction import Reduction
from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box, Grid, Slices, Triple


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is made of a block's blended channels, and where it goes."""

    core: Box
    """What the block writes."""

    core_czyx: npt.NDArray[Any]
    """The finished core, on the host."""

    mask_zyx: npt.NDArray[np.bool_] | None
    """Wanted voxels of the core; None for all."""

    reduction: Reduction
    """What is made of the blended channels."""


class Slab:
    """The sums of one block, for one thread.

    Args:
        arrays: The engine's.
        windows: Weights of each patch.
        num_channels: Channels of the network.
        patch_length: Q, voxels of an output patch along z.
        target: What becomes of the sums.
    """

    def __init__(
        self,
        arrays: Arrays,
        windows: Windows,
        *,
        num_channels: int,
        patch_length: int,
        target: Target,
    ) -> None:
        self._arrays = arrays
        self._windows = windows
        self._target = target
        self._num_rows, num_y, num_x = target.core.shape
        self._num_finished = 0
        self._has_sums = target.reduction.keeps_sums(num_channels, target.core_czyx.dtype)
        self._is_core = arrays.is_host and self._has_sums
        self._length = self._num_rows if self._is_core else min(patch_length, self._num_rows)
        if self._is_core:
            self._ring_czyx = arrays.outgoing(target.core_czyx)
            arrays.clear(self._ring_czyx)
        else:
            self._ring_czyx = arrays.zeros((num_channels, self._length, num_y, num_x))
        self._flags: list[DeviceArray] = []
        self._parts: list[Part] = []

    def add(self, box: Box, patch_czyx: DeviceArray) -> None:
        """Add the weighted output of a patch, and finish what lies above it.

        What falls outside the core is left out: it belongs to other blocks.
        """
        core = self._target.core
        self._finish(min(box.start[0] - core.start[0], self._num_rows))
        window = self._windows.of(box)
        inner = box.intersect(core)
        rows, *plane = inner.slices(core.start)
        part_z, *part_plane = inner.slices(box.start)
        for in_ring, first, stop in self._pieces(rows.start, rows.stop):
            offset = part_z.start - rows.start
            where: Slices = (in_ring, plane[0], plane[1])
            part: Slices = (slice(first + offset, stop + offset), part_plane[0], part_plane[1])
            self._arrays.add_weighted(self._ring_czyx, where, patch_czyx, part, window)

    def finish(self, blame: Blame) -> "Unsettled":
        """Finish what is left; the core is on its way to the host.

        Args:
            blame: Says which patch it was, should the result not be finite; on a host it is asked
                before this returns.
        """
        self._finish(self._num_rows)
        wrong = next((part for part in self._parts if part.spot is not None), None)
        if wrong is not None and wrong.spot is not None and wrong.kind == NOT_FINITE:
            blame = _answering(blame(wrong.spot.voxel))
        return Unsettled(
            settle=self._arrays.settle(self._flags),
            parts=self._parts,
            target=self._target,
            # A gate may have set to zero what was NaN.
            has_sums=self._has_sums and self._target.reduction.gate is None,
            blame=blame,
        )

    def _finish(self, stop: int) -> None:
        """Finish the rows of the core before `stop`, in parts that a cache may hold."""
        start, self._num_finished = self._num_finished, max(stop, self._num_finished)
        for in_ring, first, _ in self._pieces(start, self._num_finished):
            ring_czyx = self._ring_czyx[:, in_ring]
            for part in parts(tuple(ring_czyx.shape), self._arrays.finish_nbytes):
                self._finish_part(ring_czyx[(slice(None), *part.slices())], part, first)
                if first + part.start[0] + self._length < self._num_rows:
                    # Zero for the rows that come next, while it is still in the cache.
                    self._arrays.clear(ring_czyx[(slice(None), *part.slices())])

    def _finish_part(self, total_czyx: DeviceArray, part: Box, first: int) -> None:
        """Mask, check, reduce, quantise and send one part."""
        arrays, target, reduction = self._arrays, self._target, self._target.reduction
        place = part.translate((first, 0, 0))
        where = place.slices()
        if target.mask_zyx is not None:
            arrays.apply_mask(total_czyx, target.mask_zyx[where])
        self._check(NOT_FINITE, place, total_czyx)
        shut(reduction, arrays, total_czyx)
        if self._is_core:
            return
        host_czyx = target.core_czyx[(slice(None), *where)]
        out_czyx = arrays.outgoing(host_czyx)
        store(reduction, arrays, total_czyx, out_czyx)
        if host_czyx.dtype == np.float16:
            self._check(NOT_FLOAT16, place, out_czyx)
        arrays.send(out_czyx, host_czyx)

    def _check(self, kind: str, place: Box, array: DeviceArray) -> None:
        """Note whether a part is finite; nobody waits now for the answer of an accelerator."""
        where = place.translate(self._target.core.start)
        flag = self._arrays.is_finite(array)
        # What is wrong on a host is looked at before it is overwritten.
        is_wrong = self._arrays.is_host and not flag
        spot = find_spot(where, self._arrays.download(array)) if is_wrong else None
        self._flags.append(flag)
        self._parts.append(Part(kind=kind, place=where, spot=spot))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[slice, int, int]]:
        """Yield where rows of the core lie in the ring, and which they are: one or two pieces."""
        while start < stop:
            at = start % self._length
            num = min(stop - start, self._length - at)
            yield slice(at, at + num), start, start + num
            start += num


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the core that was checked."""

    kind: str
    """What to say if it is not finite."""

    place: Box
    """Where it is."""

    spot: Spot | None
    """What is not finite, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """A core that may still be on its way from the device; any thread may wait for it."""

    settle: Callable[[], list[bool]]
    """Waits for the device; returns whether each part was finite."""

    parts: list[Part]
    """What each answer is about."""

    target: Target
    """Where the core goes."""

    has_sums: bool
    """Whether the core holds all that was blended, as it was when it was checked."""

    blame: Blame
    """Says which patch it was, if it is not finite."""

    def wait(self) -> None:
        """Return when the core is on the host.

        Raises:
            BlockError: it holds NaN or inf, or more than float16 can where that is written.
        """
        answers = zip(self.settle(), self.parts, strict=True)
        bad = [part for is_good, part in answers if not is_good]
        if bad:
            kind, core = bad[0].kind, self.target.core
            spot = joined(self._spot(part) for part in bad if part.kind == kind)
            told = describe(kind, core, bad[0].place, spot, self.blame)
            raise BlockError(told, kind=kind)

    def _spot(self, part: Part) -> Spot | None:
        """Return what is not finite of a part, if its values are still to be seen."""
        if part.spot is not None or not self.has_sums:
            return part.spot
        where = part.place.slices(self.target.core.start)
        return find_spot(part.place, self.target.core_czyx[(slice(None), *where)])


def _answering(text: str) -> Blame:
    """Return what blames the same patch for every voxel."""

    def answer(_: Triple) -> str:
        return text

    return answer


def parts(shape: tuple[int, ...], nbytes: int) -> Grid:
    """Return parts of a (c, z, y, x) array that hold about `nbytes` of float32.

    Whole slices, or whole rows of one slice.
    """
    num_channels, num_z, num_y, num_x = shape
    num_rows = max(1, nbytes // (4 * num_channels * num_x))
    step = max(1, num_rows // num_y), min(num_rows, num_y), num_x
    return Grid(
        origin=(0, 0, 0), step=step, bounds=Box(start=(0, 0, 0), stop=(num_z, num_y, num_x))
    )
