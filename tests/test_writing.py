"""A core on its way to the disk: in parts of whole write units, so many bytes at a time."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box, Grid, Triple
from mpichunk.geometry.write_parts import PART_NBYTES, most_under_way, write_parts
from mpichunk.volume.future import BlockFuture
from mpichunk.volume.writing import Writing

MIB = 1 << 20
UNIT_SHAPES = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
ORIGIN = (-3, 5, 7)


@given(
    unit=UNIT_SHAPES,
    num_units=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    cut=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    voxel_nbytes=st.sampled_from([1, 12, 400, 5000]),
)
def test_parts_are_whole_write_units_and_tile_the_core(
    unit: Triple, num_units: Triple, cut: Triple, voxel_nbytes: int
) -> None:
    shape = tuple(n * u for n, u in zip(num_units, unit, strict=True))
    whole = Box.from_shape(ORIGIN, shape)
    # As a ROI cuts the last block of an axis.
    stop = (max(a + 1, b - c) for a, b, c in zip(ORIGIN, whole.stop, cut, strict=True))
    core = Box(start=ORIGIN, stop=tuple(stop))
    count = np.zeros(core.shape, np.uint8)
    for part in write_parts(core, ORIGIN, unit, voxel_nbytes):
        count[part.slices(core.start)] += 1
        for axis in range(3):
            assert (part.start[axis] - ORIGIN[axis]) % unit[axis] == 0
            is_whole = (part.stop[axis] - ORIGIN[axis]) % unit[axis] == 0
            assert is_whole or part.stop[axis] == core.stop[axis]
        is_one = all(n <= u for n, u in zip(part.shape, unit, strict=True))
        assert is_one or part.num_voxels * voxel_nbytes <= PART_NBYTES
    assert (count == 1).all()


def test_parts_are_not_smaller_than_they_need_be() -> None:
    core = Box.from_shape((0, 0, 0), (1024, 1024, 1024))
    parts = write_parts(core, (0, 0, 0), (8, 8, 8), 1)
    assert max(part.num_voxels for part in parts) == PART_NBYTES
    assert len(parts) == core.num_voxels // PART_NBYTES


class Disk:
    """Takes what is written when it is asked for; fails one part."""

    def __init__(self, failing: Box | None = None) -> None:
        self.num_under_way = self.most_under_way = self.num_begun = 0
        self.durable: list[Box] = []
        self._failing = failing

    def begin(self, part: Box) -> BlockFuture[None]:
        """Begin to write a part."""
        self.num_begun += 1
        self.num_under_way += part.num_voxels
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        return BlockFuture(DiskFuture(self, part), task="write it", finish=lambda _: None)

    def end(self, part: Box) -> None:
        """Have a part on the disk."""
        self.num_under_way -= part.num_voxels
        if part == self._failing:
            raise ValueError("no")
        self.durable.append(part)


class DiskFuture:
    """What TensorStore returns."""

    def __init__(self, disk: Disk, part: Box) -> None:
        self._disk, self._part = disk, part

    def force(self) -> None:
        """Begin."""

    def done(self) -> bool:
        """Return that it is."""
        return True

    def result(self, timeout: float | None = None) -> None:
        """Wait."""
        self._disk.end(self._part)


@pytest.mark.parametrize(
    ("core_shape", "unit", "voxel_nbytes", "expected"),
    [
        ((256, 256, 256), (64, 64, 64), 12, 15 * MIB),  # units of 3 MiB
        ((256, 256, 256), (256, 256, 256), 12, 192 * MIB),
        ((16, 16, 16), (8, 8, 8), 4, 16 * 1024),
        ((64, 1024, 1024), (64, 64, 64), 1, 16 * MIB),
    ],
)
def test_bytes_under_way_are_bounded(
    core_shape: Triple, unit: Triple, voxel_nbytes: int, expected: int
) -> None:
    disk, core = Disk(), Box.from_shape(ORIGIN, core_shape)
    parts = write_parts(core, ORIGIN, unit, voxel_nbytes)
    written = Writing(parts, disk.begin, voxel_nbytes)
    assert disk.num_begun == 1
    written.result()
    assert disk.most_under_way * voxel_nbytes == expected
    assert disk.durable == list(parts)
    bound = most_under_way(core_shape, unit, voxel_nbytes)
    assert disk.most_under_way * voxel_nbytes <= bound <= prod(core_shape) * voxel_nbytes


def test_after_a_failure_nothing_is_under_way_and_nothing_more_begins() -> None:
    core = Box.from_shape((0, 0, 0), (64, 1024, 1024))
    parts: Grid = write_parts(core, (0, 0, 0), (64, 64, 64), 4)
    disk = Disk(failing=parts[1])
    written = Writing(parts, disk.begin, 4)
    with pytest.raises(BlockError, match="could not write it: no"):
        written.result()
    # One more was begun when the first was durable.
    assert disk.num_under_way == 0 and disk.num_begun == 5 < len(parts)


def test_what_was_begun_is_waited_for_where_the_next_cannot_begin() -> None:
    core = Box.from_shape((0, 0, 0), (64, 1024, 1024))
    disk = Disk()

    def begin(part: Box) -> BlockFuture[None]:
        if disk.num_begun == 3:
            raise MemoryError
        return disk.begin(part)

    written = Writing(write_parts(core, (0, 0, 0), (64, 64, 64), 4), begin, 4)
    with pytest.raises(MemoryError):
        written.result()
    assert disk.num_under_way == 0 and len(disk.durable) == 3
