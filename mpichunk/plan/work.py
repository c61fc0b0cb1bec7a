"""How much a plan computes and reads, counted exactly and without visiting its blocks.

Blocks are a product of three axes, so totals are products of per-axis sums; along an axis, blocks
away from the ends repeat, so that a petabyte costs what a gigabyte costs. Knows no bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

from mpichunk.geometry.box import Triple, ceil_div, triple
from mpichunk.geometry.lattice import axis_lattice
from mpichunk.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One axis of the blocks that share a grid coordinate on it; positions in voxels."""

    start: int
    """First voxel of the core."""

    stop: int
    """One past the core."""

    input_start: int
    """First voxel that the network sees; may lie before the volume."""

    input_stop: int
    """One past the last voxel that the network sees; may lie past the volume."""

    num_patches: int
    """Output patches that touch the core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisWork:
    """What one axis contributes: totals over a plan are products of these over the axes."""

    num_blocks: int
    """Columns of blocks."""

    num_patches: int
    """Patches, summed over the columns."""

    least_patches: int
    """Patches of the column with the fewest."""

    typical_patches: int
    """Patches of the most frequent kind of column; of two equally frequent ones, the larger."""

    most_patches: int
    """Patches of the column with the most."""

    lattice_patches: int
    """Patches of one lattice over the whole ROI: what a single block would run."""

    core_extent: int
    """Voxels of the longest core."""

    input_extent: int
    """Voxels of the longest input box, padding included."""

    num_voxels_read: int
    """Voxels read, padding not counted, summed over the columns."""

    num_voxels_decoded: int | None
    """As `num_voxels_read`, each read widened to whole storage chunks; None if they are unknown."""

    is_padded: bool
    """Whether any column needs voxels outside the volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a plan computes and reads, over all blocks of the ROI."""

    axes: tuple[AxisWork, AxisWork, AxisWork]
    """z, y, x."""

    num_roi_voxels: int
    """Voxels that are written."""

    num_patch_voxels: int
    """Voxels of an output patch."""

    @property
    def num_blocks(self) -> int:
        """Blocks that touch the ROI."""
        return prod(axis.num_blocks for axis in self.axes)

    @property
    def num_patches(self) -> int:
        """Patches to run, before blank and masked ones are taken off."""
        return prod(axis.num_patches for axis in self.axes)

    @property
    def lattice_patches(self) -> int:
        """Patches of one lattice over the whole ROI."""
        return prod(axis.lattice_patches for axis in self.axes)

    @property
    def redundancy(self) -> float:
        """Patches to run, over those of one lattice over the whole ROI."""
        return self.num_patches / self.lattice_patches

    @property
    def patches_per_block(self) -> tuple[int, int, int]:
        """Least, typical and most patches of a block."""
        return (
            prod(axis.least_patches for axis in self.axes),
            prod(axis.typical_patches for axis in self.axes),
            prod(axis.most_patches for axis in self.axes),
        )

    @property
    def num_passes(self) -> float:
        """How often a voxel of the ROI is predicted, on average."""
        return self.num_patches * self.num_patch_voxels / self.num_roi_voxels

    @property
    def core_shape(self) -> Triple:
        """Shape of the largest core."""
        return triple([axis.core_extent for axis in self.axes])

    @property
    def input_shape(self) -> Triple:
        """Shape of the largest input box, padding included."""
        return triple([axis.input_extent for axis in self.axes])

    @property
    def is_padded(self) -> bool:
        """Whether any block needs voxels outside the volume."""
        return any(axis.is_padded for axis in self.axes)

    @property
    def num_voxels_read(self) -> int:
        """Voxels read over all blocks, padding not counted."""
        return prod(axis.num_voxels_read for axis in self.axes)

    @property
    def read_amplification(self) -> float:
        """Voxels read for each voxel of the ROI."""
        return self.num_voxels_read / self.num_roi_voxels

    @property
    def decode_amplification(self) -> float | None:
        """Voxels of whole storage chunks for each voxel of the ROI; None if chunks are unknown."""
        decoded = [axis.num_voxels_decoded for axis in self.axes]
        known = [n for n in decoded if n is not None]
        return prod(known) / self.num_roi_voxels if len(known) == len(decoded) else None


def work_of(plan: Plan, chunk_shape: Triple | None = None) -> Work:
    """Count the work of a plan.

    Args:
        plan: what is to be run.
        chunk_shape: storage chunk of the input, anchored at its first voxel, if it is known.
    """
    chunks = chunk_shape or (None, None, None)
    return Work(
        axes=(
            axis_work(plan, 0, chunks[0]),
            axis_work(plan, 1, chunks[1]),
            axis_work(plan, 2, chunks[2]),
        ),
        num_roi_voxels=plan.roi.num_voxels,
        num_patch_voxels=prod(plan.output_patch_shape),
    )


def axis_work(plan: Plan, axis: int, chunk: int | None = None) -> AxisWork:
    """Count the work along one axis, in time that does not grow with the number of blocks."""
    runs = list(_runs(plan, axis, chunk or 1))
    columns = [(column_of(plan, axis, run.first), run) for run in runs]
    frequency: dict[int, int] = {}
    for column, run in columns:
        frequency[column.num_patches] = frequency.get(column.num_patches, 0) + run.count
    low, high = plan.volume.start[axis], plan.volume.stop[axis]
    lattice = axis_lattice(
        plan.roi.start[axis],
        plan.roi.stop[axis],
        low=low,
        patch=plan.output_patch_shape[axis],
        stride=plan.stride[axis],
    )
    return AxisWork(
        num_blocks=plan.grid.shape[axis],
        num_patches=sum(patches * count for patches, count in frequency.items()),
        least_patches=min(frequency),
        typical_patches=max(frequency, key=lambda patches: (frequency[patches], patches)),
        most_patches=max(frequency),
        lattice_patches=len(lattice),
        core_extent=max(column.stop - column.start for column, _ in columns),
        input_extent=max(column.input_stop - column.input_start for column, _ in columns),
        num_voxels_read=sum(
            (min(column.input_stop, high) - max(column.input_start, low)) * run.count
            for column, run in columns
        ),
        num_voxels_decoded=None
        if chunk is None
        else sum(_decoded(plan, axis, column, run, chunk) for column, run in columns),
        is_padded=any(
            column.input_start < low or column.input_stop > high for column, _ in columns
        ),
    )


def column_of(plan: Plan, axis: int, index: int) -> Column:
    """Return column `index` of the block grid along one axis."""
    step = plan.block_shape[axis]
    corner = plan.output_domain.start[axis] + (plan.grid.first[axis] + index) * step
    start = max(corner, plan.roi.start[axis])
    stop = min(corner + step, plan.roi.stop[axis])
    lattice = plan.axis_lattice(axis, start)
    touching = lattice.touching(start, stop)
    patch, crop = plan.output_patch_shape[axis], plan.crop[axis]
    return Column(
        start=start,
        stop=stop,
        input_start=lattice[touching[0]] - crop,
        input_stop=lattice[touching[-1]] + patch + crop,
        num_patches=len(touching),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisKind:
    """Columns of blocks on one axis that cost the same."""

    num_columns: int
    """How many there are."""

    num_patches: int
    """Output patches that touch the core of each."""

    extent: int
    """Voxels of each core."""


def axis_kinds(plan: Plan, axis: int) -> tuple[AxisKind, ...]:
    """Return the kinds of columns along one axis, in time that does not grow with their number."""
    counts: dict[tuple[int, int], int] = {}
    for run in _runs(plan, axis, 1):
        column = column_of(plan, axis, run.first)
        kind = column.num_patches, column.stop - column.start
        counts[kind] = counts.get(kind, 0) + run.count
    return tuple(
        AxisKind(num_columns=count, num_patches=patches, extent=extent)
        for (patches, extent), count in sorted(counts.items())
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Columns first, first + period, ...: `count` of them, alike but for where they are."""

    first: int
    period: int
    count: int


def _runs(plan: Plan, axis: int, chunk: int) -> Iterator[_Run]:
    """Yield all columns of one axis, those far from its ends gathered into runs.

        |single|single|  A  B  C  A  B  C  A  B  |single|single|    period 3: runs of A, B and C

    With `crop` all columns in the middle are alike. With `seamless` they repeat as soon as a number
    of block lengths is a number of strides.
    """
    num, step, stride = plan.grid.shape[axis], plan.block_shape[axis], plan.stride[axis]
    period = 1 if plan.stitch == "crop" else stride // gcd(stride, step)
    # Beyond this distance from the ends of the ROI nothing is clipped, grown or shifted.
    reach = plan.output_patch_shape[axis] + plan.crop[axis] + plan.margin[axis] + stride + chunk
    edge = ceil_div(reach, step) + 1
    middle = num - 2 * edge
    if middle <= 2 * period:
        yield from (_Run(first=i, period=1, count=1) for i in range(num))
        return
    for i in range(edge):
        yield _Run(first=i, period=1, count=1)
        yield _Run(first=num - 1 - i, period=1, count=1)
    for i in range(period):
        yield _Run(first=edge + i, period=period, count=ceil_div(middle - i, period))


def _decoded(plan: Plan, axis: int, column: Column, run: _Run, chunk: int) -> int:
    """Return the voxels of the whole chunks that a run of columns reads along one axis."""
    low, high = plan.volume.start[axis], plan.volume.stop[axis]
    start = max(column.input_start, low) - low
    stop = min(column.input_stop, high) - low
    if run.count == 1:
        return min(ceil_div(stop, chunk) * chunk, high - low) - start // chunk * chunk
    distance = run.period * plan.block_shape[axis]
    above = floor_sum(run.count, distance, stop + chunk - 1, chunk)
    return (above - floor_sum(run.count, distance, start, chunk)) * chunk


def floor_sum(count: int, slope: int, offset: int, divisor: int) -> int:
    """Return the sum of floor((offset + i * slope) / divisor) over i < count, in O(log) steps.

    Euclid's algorithm on lattice points under a line (Graham, Knuth, Patashnik: Concrete
    Mathematics, 3.5).
    """
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (slope // divisor) + count * (offset // divisor)
        last = slope % divisor * count + offset % divisor
        count, slope, offset, divisor = last // divisor, divisor, last % divisor, slope % divisor
    return total
