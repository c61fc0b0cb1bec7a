"""What is unwise about a geometry, and what would be better, in numbers.

Pure arithmetic over plans: what it advises, it has counted. Refuses nothing; knows no files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import lcm, prod

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Triple, ceil_div, triple
from mpichunk.plan.plan import Plan
from mpichunk.plan.work import Work, column_of, work_of
from mpichunk.words import count

AXES = "zyx"
_CHUNKS_TO_TRY = (64, 32, 16, 8)
MANY_BLOCKS = 10_000_000
"""So many lines of the journal are too many."""

_MANY_FILES = 1_000_000
_FEW_VOXELS = 16**3
"""A chunk of fewer is mostly overhead, on disk and in a viewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing that works but could be better."""

    key: str
    """Dotted config key that it is about."""

    message: str
    """What was found and what to do."""


def advise(plan: Plan, config: Config, work: Work, *, num_files: int) -> tuple[Advice, ...]:
    """Return everything that is unwise about a plan, the costliest kind first.

    Args:
        plan: what is to be run.
        config: where the plan comes from.
        work: what the plan computes.
        num_files: chunks or shards that will be written.
    """
    pieces: list[Iterable[Advice]] = [
        _block_fit(plan, config, work),
        _seamless_cost(plan, work),
        _margin(plan, work),
        _thin_layers(plan, work),
        _batch_tail(config, work),
        _small_volume(plan),
        _overlap(plan),
        _tiny_chunks(plan, config),
        _numbers(work, config, num_files),
    ]
    return tuple(advice for piece in pieces for advice in piece)


def _block_fit(plan: Plan, config: Config, work: Work) -> Iterator[Advice]:
    """A block that is no multiple of the stride: its last patch is shifted back over others.

    A block of 21 voxels with a margin of 1, output patches of 10 and a stride of 8::

        core        [===================]
        patches    [--------]
                           [--------]
                                [--------]      5 voxels on, not 8
    """
    if plan.stitch != "crop":
        return
    misfits = [
        axis
        for axis in range(3)
        if work.axes[axis].num_blocks > 1 and plan.block_shape[axis] % plan.stride[axis]
    ]
    if not misfits:
        return
    found = (
        f"{plan.block_shape} is not a multiple of the stride {plan.stride} (output patch - overlap)"
        f" on {_names(misfits)}: the last patches of every block are shifted back over others. "
    )
    shape, overlap = list(plan.block_shape), list(plan.overlap)
    for axis in misfits:
        extent = _nearest_extent(plan, config, axis)
        if extent is not None:
            shape[axis] = extent
        else:
            overlap[axis] = _nearest_overlap(plan, axis)
    better = _with_overlap(replace(plan, block_shape=triple(shape)), config, triple(overlap))
    if better == plan:
        advice = "No block or overlap near it fits; choose another write unit"
    else:
        changes = []
        if better.block_shape != plan.block_shape:
            changes.append(f"block.shape {better.block_shape}")
        if better.overlap != plan.overlap:
            changes.append(f"patch.overlap {better.overlap}")
        advice = f"Nearest that fits: {' with '.join(changes)}, {_saving(better, work)}"
    yield Advice(key="block.shape", message=found + advice)


def _nearest_extent(plan: Plan, config: Config, axis: int) -> int | None:
    """Return the block extent nearest to the present one that the stride and the write unit divide.

    Where the config leaves the chunk to the block, one is chosen that gives a chunk of decent size.
    None if there is none between half and twice the present extent.
    """
    extent, stride = plan.block_shape[axis], plan.stride[axis]
    is_fixed = config.output.chunk_shape is not None or config.output.shard_shape is not None
    units = (config.write_unit[axis],) if is_fixed else (*_CHUNKS_TO_TRY, 1)
    for unit in units:
        step = lcm(stride, unit)
        near = [n for n in (extent // step * step, ceil_div(extent, step) * step) if n > 0]
        fitting = [n for n in near if extent <= 2 * n and n <= 2 * extent]
        if fitting:
            return min(fitting, key=lambda n: (abs(n - extent), -n))
    return None


def _nearest_overlap(plan: Plan, axis: int) -> int:
    """Return the overlap nearest to the present one whose stride divides the block.

    At most half the output patch, and not zero unless it is now; the present one if there is none.
    """
    patch, overlap = plan.output_patch_shape[axis], plan.overlap[axis]
    fitting = [
        candidate
        for candidate in range(min(1, overlap), max(overlap, patch // 2) + 1)
        if plan.block_shape[axis] % (patch - candidate) == 0
    ]
    return min(fitting, key=lambda n: (abs(n - overlap), n), default=overlap)


def _with_overlap(plan: Plan, config: Config, overlap: Triple) -> Plan:
    """Return the plan with another overlap, and the margin that follows from it by default."""
    margin = plan.margin
    if config.block.margin is None:
        margin = triple([o // 2 for o in overlap])
    return replace(plan, overlap=overlap, margin=margin)


def _seamless_cost(plan: Plan, work: Work) -> Iterator[Advice]:
    """Small blocks of a seamless plan run the patches at their faces several times."""
    if plan.stitch != "seamless" or work.redundancy < 1.5:
        return
    shape = [
        2 * extent if axis.num_blocks > 1 else extent
        for extent, axis in zip(plan.block_shape, work.axes, strict=True)
    ]
    larger = replace(plan, block_shape=triple(shape))
    yield Advice(
        key="block.shape",
        message=f"seamless blocks repeat the patches at their faces: {work.redundancy:.2f} times "
        f"the patches of one lattice. Larger blocks repeat fewer: {larger.block_shape} runs "
        f"{_saving(larger, work)}",
    )


def _margin(plan: Plan, work: Work) -> Iterator[Advice]:
    """A margin that is not half the overlap."""
    if plan.stitch == "seamless":
        return
    half = triple([o // 2 for o in plan.overlap])
    split = [axis for axis in range(3) if work.axes[axis].num_blocks > 1]
    usual = replace(plan, margin=half)
    wide = [axis for axis in split if plan.margin[axis] > half[axis]]
    narrow = [axis for axis in split if plan.margin[axis] < half[axis]]
    if wide:
        yield Advice(
            key="block.margin",
            message=f"{plan.margin} is more than half the overlap on {_names(wide)}: it widens the "
            f"context at the faces of blocks; {half} would run {_saving(usual, work)}",
        )
    if narrow:
        yield Advice(
            key="block.margin",
            message=f"{plan.margin} is less than half the overlap on {_names(narrow)}: faces of "
            "blocks then show the borders of patches, where networks are worst; "
            f"{half} would run {_saving(usual, work)}",
        )


def _thin_layers(plan: Plan, work: Work) -> Iterator[Advice]:
    """A first or last layer of blocks much thinner than a patch costs as much as whole patches."""
    for axis in range(3):
        total = work.axes[axis]
        if total.num_blocks < 2:
            continue
        for place, index in (("first", 0), ("last", total.num_blocks - 1)):
            column = column_of(plan, axis, index)
            thickness = column.stop - column.start
            share = column.num_patches / total.num_patches
            extent = plan.roi.shape[axis]
            if 2 * thickness > plan.stride[axis] or share < 0.02 or share < 2 * thickness / extent:
                continue
            end = f"start at {column.stop}" if place == "first" else f"stop at {column.start}"
            yield Advice(
                key="block.shape",
                message=f"the {place} layer of blocks on {AXES[axis]} is only "
                f"{count(thickness, 'voxel')} thick, but runs {share:.0%} of all patches; "
                f"choose another block.shape, or let the ROI {end}",
            )


def _batch_tail(config: Config, work: Work) -> Iterator[Advice]:
    """The last batch of a block is filled up: a batch never mixes blocks."""
    batch, (_, typical, _) = config.patch.batch_size, work.patches_per_block
    run = ceil_div(typical, batch) * batch
    if run <= 1.1 * typical:
        return
    fitting = max(n for n in range(1, batch + 1) if ceil_div(typical, n) * n <= 1.1 * typical)
    yield Advice(
        key="patch.batch_size",
        message=f"a block has {count(typical, 'patch', 'patches')}, so batches of {batch} run "
        f"{run}, {run / typical - 1:.0%} of them padding; {fitting} fits",
    )


def _small_volume(plan: Plan) -> Iterator[Advice]:
    """What a patch longer than the volume sees is partly padding."""
    short = [a for a in range(3) if plan.volume.shape[a] < plan.output_patch_shape[a]]
    if short:
        yield Advice(
            key="patch.shape",
            message=f"the input {plan.volume.shape} is shorter than the output patch "
            f"{plan.output_patch_shape} on {_names(short)}: the network sees padding there",
        )


def _overlap(plan: Plan) -> Iterator[Advice]:
    """Without overlap nothing is blended."""
    bare = [
        axis
        for axis in range(3)
        if plan.overlap[axis] == 0 and plan.roi.shape[axis] > plan.output_patch_shape[axis]
    ]
    if bare:
        yield Advice(
            key="patch.overlap",
            message=f"{plan.overlap} has no overlap on {_names(bare)}: the borders of patches will "
            "show; a quarter of the output patch is usual",
        )


def _tiny_chunks(plan: Plan, config: Config) -> Iterator[Advice]:
    """Chunks of a few voxels, as the block's own shape may leave no others."""
    chunk = config.chunk_shape
    if prod(chunk) >= _FEW_VOXELS or prod(plan.block_shape) <= _FEW_VOXELS:
        return
    num_chunks = prod(n // c for n, c in zip(plan.block_shape, chunk, strict=True))
    message = f"chunks of {chunk} are tiny: a block is stored in {num_chunks:,} of them; "
    if config.output.chunk_shape is not None:
        usual = "32 to 128 voxels a side are usual"
        yield Advice(key="output.chunk_shape", message=message + usual)
        return
    step = _CHUNKS_TO_TRY[1]
    nearest = triple([ceil_div(n, step) * step for n in plan.block_shape])
    yield Advice(
        key="block.shape",
        message=f"{message}no larger ones divide {plan.block_shape}; {nearest} would be whole "
        f"chunks of {step} or more voxels a side",
    )


def _numbers(work: Work, config: Config, num_files: int) -> Iterator[Advice]:
    """Too many blocks for a journal of lines, too many files for a file system."""
    if work.num_blocks > MANY_BLOCKS:
        yield Advice(
            key="block.shape",
            message=f"{work.num_blocks:,} blocks make as many lines in the journal; "
            "use larger blocks",
        )
    if num_files > _MANY_FILES and config.output.shard_shape is None:
        yield Advice(
            key="output.shard_shape",
            message=f"{num_files:,} chunk files are hard on a shared file system; zarr3 gathers "
            f"the chunks of a shard in one file: shard_shape {config.block.shape} would make "
            f"{work.num_blocks:,}",
        )


def _saving(better: Plan, work: Work) -> str:
    """Return in words how many patches another plan runs."""
    patches = work_of(better).num_patches
    change = patches / work.num_patches - 1
    if abs(change) < 0.0005:
        return f"as many patches ({patches:,})"
    return f"{abs(change):.1%} {'fewer' if change < 0 else 'more'} patches ({patches:,})"


def _names(axes: Iterable[int]) -> str:
    """Return axes by name, e.g. `y and x`."""
    return " and ".join(AXES[axis] for axis in axes)
