"""What a benchmark has measured, what follows from it, and what would make a run faster.

Pure arithmetic on seconds and counts. Knows no ranks, no networks and no files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mpichunk.bench.shares import BlockSeconds, shares_of
from mpichunk.config.schema import Config
from mpichunk.plan.advice import Advice
from mpichunk.plan.prediction import pace_of, voxels_of_a_read
from mpichunk.plan.probe import Pace
from mpichunk.plan.work import Work
from mpichunk.words import count

NETWORK, BLENDING, READING, WRITING = "the network", "blending", "reading", "writing"
HOST = "the host"
"""What a run can be bound by."""

_NOISE = 1.02
"""A run cannot be faster than its forwards alone; where it is by more, the repeats say nothing."""

_WELL = 0.9
"""A run that computes so much of its time has nothing else to improve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Blocks that one rank has run through the pipeline, from the first read to the last write."""

    seconds: float
    num_voxels: int
    """Voxels written, not counted once more per channel."""

    num_patches: int
    """Patches that went through the network."""

    num_batches: int
    """Forwards, those of every turn of an augmentation."""

    nbytes_read: int
    nbytes_written: int

    peak_nbytes: int | None = None
    """The most memory that the rank held meanwhile; None if nobody knows."""

    num_blocks: int

    read_seconds: float
    """Of all blocks together, some of which were read at the same time."""

    write_seconds: float
    """The same of writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFigures:
    """What one rank has measured."""

    host: str
    device: str
    whole: tuple[Pass, ...]
    """One per repeat."""

    bare: tuple[float, ...]
    """Seconds of as many forwards, per repeat."""

    stages: Mapping[str, float]
    """Seconds of each stage of one block, none beside another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure of several repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(median=median(values), least=min(values), most=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What all ranks together have measured."""

    bare: Spread
    """Mvox/s of output, if there were nothing but forwards."""

    whole: Spread
    """Mvox/s of output, read to written."""

    efficiency: Spread
    """Share of the time that the bare forwards take: bare seconds over whole seconds."""

    seconds_per_batch: float
    """Of one forward; with several ranks, while the others compute too."""

    stages: Mapping[str, float]
    """Median over the ranks, seconds of one block."""

    blending: float
    """Share of a rank's time for gathering, activation, accumulating and finishing."""

    waiting: float
    """Share of the time for input and output that was not hidden, and the first read and the last
    write, which hide behind nothing; no more than their seconds explain."""

    host: float
    """Share of the time that is none of these: the device waits for the host's own work."""

    own_host: float
    """What the host's own work of a block, which was measured alone, is of its time."""

    slower: str
    """Whether reading or writing takes longer."""

    bound_by: str
    """What takes most of the time."""

    num_voxels: int
    """Voxels written per repeat."""

    num_patches: int
    """Patches run per repeat."""

    @property
    def network(self) -> float:
        """Share of the time for forwards, which is all of it at most."""
        return min(1.0, self.efficiency.median)

    @property
    def is_noise(self) -> bool:
        """Whether a part took longer than the whole, so that nothing follows from its share."""
        return self.efficiency.median > _NOISE


def combine(ranks: Sequence[RankFigures]) -> Figures:
    """Return the figures of all ranks together; a repeat takes as long as its slowest rank."""
    num_repeats = len(ranks[0].whole)
    whole_seconds, bare_seconds, voxels = [], [], []
    for repeat in range(num_repeats):
        whole_seconds.append(max(rank.whole[repeat].seconds for rank in ranks))
        bare_seconds.append(max(rank.bare[repeat] for rank in ranks))
        voxels.append(sum(rank.whole[repeat].num_voxels for rank in ranks))
    pairs = list(zip(bare_seconds, whole_seconds, voxels, strict=True))
    efficiency = Spread.of([bare / whole for bare, whole, _ in pairs])
    stages = {name: median([rank.stages[name] for rank in ranks]) for name in ranks[0].stages}
    num_blocks = ranks[0].whole[0].num_blocks
    seconds = _block_seconds(ranks, median(whole_seconds), num_blocks)
    shares = shares_of(
        seconds,
        stages,
        efficiency=efficiency.median,
        num_blocks=num_blocks,
        is_on_cpu=ranks[0].device == "cpu",
    )
    slower = READING if seconds.read >= seconds.write else WRITING
    by_name = {
        NETWORK: shares.network,
        BLENDING: shares.blending,
        slower: shares.waiting,
        HOST: shares.host,
    }
    num_batches = sum(rank.whole[i].num_batches for rank in ranks for i in range(num_repeats))
    total_bare = sum(sum(rank.bare) for rank in ranks)
    return Figures(
        bare=Spread.of([n / bare / 1e6 if bare else 0.0 for bare, _, n in pairs]),
        whole=Spread.of([n / whole / 1e6 for _, whole, n in pairs]),
        efficiency=efficiency,
        seconds_per_batch=total_bare / num_batches if num_batches else 0.0,
        stages=stages,
        blending=shares.blending,
        waiting=shares.waiting,
        host=shares.host,
        own_host=stages["host"] / seconds.whole if seconds.whole else 0.0,
        slower=slower,
        bound_by=max(by_name, key=lambda name: by_name[name]),
        num_voxels=int(median(voxels)),
        num_patches=int(
            median(sum(r.whole[i].num_patches for r in ranks) for i in range(num_repeats))
        ),
    )


def pace(figures: Figures, ranks: Sequence[RankFigures], work: Work, *, num_blocks: int) -> Pace:
    """Return what predicts a run: seconds per patch, voxel read and voxel written, on one rank.

    Args:
        figures: of all ranks together.
        ranks: of each.
        work: of the plan whose blocks were run.
        num_blocks: blocks per rank and repeat.
    """
    passes = [item for rank in ranks for item in rank.whole]
    num_repeats = len(ranks[0].whole)
    whole = [max(rank.whole[i].seconds for rank in ranks) for i in range(num_repeats)]
    stages, num_all = figures.stages, len(passes) * num_blocks
    return pace_of(
        batch_seconds=figures.seconds_per_batch,
        num_patches=sum(item.num_patches for item in passes) / num_all,
        num_batches=sum(item.num_batches for item in passes) / num_all,
        num_core_voxels=sum(item.num_voxels for item in passes) / num_all,
        num_read_voxels=voxels_of_a_read(work),
        blend_seconds=stages["gather"] + stages["accumulate"],
        finish_seconds=stages["finalise"],
        read_seconds=stages["read"],
        write_seconds=stages["write"],
        whole_seconds=median(whole),
        num_blocks=num_blocks,
        num_ranks=len(ranks),
    )


def _block_seconds(
    ranks: Sequence[RankFigures], whole_seconds: float, num_blocks: int
) -> BlockSeconds:
    """Return what a block took, on average over all that were run."""
    passes = [item for rank in ranks for item in rank.whole]
    num_all = sum(item.num_blocks for item in passes)
    return BlockSeconds(
        whole=whole_seconds / num_blocks,
        read=sum(item.read_seconds for item in passes) / num_all,
        write=sum(item.write_seconds for item in passes) / num_all,
    )


def suggest(
    figures: Figures, config: Config, work: Work, *, device: str, num_blocks: int
) -> Iterator[Advice]:
    """Yield what would make a run of this config faster, the largest part of its time first.

    `device` is where ranks compute, as an engine is asked for it.
    """
    on_cpu = device == "cpu"
    if figures.num_patches == 0:
        yield Advice(
            key="roi",
            message="no patch ran: the blocks that were taken are blank or masked; choose a roi "
            "with an image in it",
        )
        return
    pieces = {
        NETWORK: _about_network(figures, config, on_cpu),
        BLENDING: _about_blending(config, on_cpu),
        READING: _about_reading(work),
        WRITING: _about_writing(config),
        HOST: _about_host(figures, config, device),
    }
    if figures.efficiency.median >= _WELL:
        yield from pieces[NETWORK]
    elif figures.blending >= max(figures.waiting, figures.host):
        yield from pieces[BLENDING]
    elif figures.host > figures.waiting:
        yield from pieces[HOST]
    else:
        yield from pieces[figures.slower]
        yield Advice(
            key="block.shape",
            message="nothing hides the first read and the last write, and a rank ran only "
            f"{count(num_blocks, 'block')} here: use more (--blocks) to see whether a long run "
            "waits too",
        )
    if work.num_passes > 2 and figures.bound_by == NETWORK:
        yield Advice(
            key="patch.overlap",
            message=f"patches overlap so far that each voxel is predicted {work.num_passes:.2f} "
            "times; half the overlap, or larger patches, may be as good",
        )


def _about_network(figures: Figures, config: Config, on_cpu: bool) -> Iterator[Advice]:
    """The device is busy with what it is there for."""
    yield Advice(
        key="model.backend",
        message=f"{figures.network:.0%} of the time is the network's own: only another "
        "device or backend, fewer or larger patches, or more ranks make the run faster",
    )
    if on_cpu and config.model.backend == "pytorch":
        yield Advice(
            key="model.backend",
            message="on a CPU, openvino runs most networks faster than pytorch: `tune` compares "
            "them, and precisions",
        )
    if not on_cpu and config.patch.batch_size == 1:
        yield Advice(
            key="patch.batch_size",
            message="an accelerator may do more with several patches at a time: `tune` finds how "
            "many, and compares precisions",
        )


def _about_blending(config: Config, on_cpu: bool) -> Iterator[Advice]:
    """Every predicted voxel is multiplied and added once per channel."""
    if config.model.backend == "identity":
        yield Advice(
            key="model.backend",
            message="there is no network here, so what is left is blending, as expected",
        )
        return
    unused = config.model.out_channels - len(config.used_channels)
    more = (
        f"; {unused} of its channels are not written: remove them from its output" if unused else ""
    )
    where = "on the CPU" if on_cpu else "on the device"
    yield Advice(
        key="patch.overlap",
        message=f"the network is so small that adding up its output {where} costs as much: fewer "
        f"channels, less overlap or larger patches help{more}",
    )


def _about_reading(work: Work) -> Iterator[Advice]:
    """Blocks arrive more slowly than they are computed."""
    message = "the input arrives more slowly than it is computed"
    decoded = work.decode_amplification
    if decoded is not None and decoded > 1.5:
        message += (
            f"; its storage chunks are read {decoded:.2f} times, since blocks share them: larger "
            "blocks, or blocks that are multiples of those chunks, read less"
        )
    else:
        message += ": faster storage, or fewer ranks per node, help"
    yield Advice(key="block.shape", message=message)


def _about_writing(config: Config) -> Iterator[Advice]:
    """Blocks are computed more quickly than they are stored."""
    message = "blocks are stored more slowly than they are computed"
    if config.output.dtype == "float32":
        message += "; uint8 holds a probability in a quarter of the bytes"
    yield Advice(key="output.dtype", message=message)
    if config.output.shard_shape is None:
        yield Advice(
            key="output.chunk_shape",
            message="every chunk is a file of its own: larger chunks, or zarr3 shards, are fewer",
        )


def _about_host(figures: Figures, config: Config, device: str) -> Iterator[Advice]:
    """Neither the device nor the storage is what is waited for."""
    on_cpu = device == "cpu"
    if not on_cpu:
        yield Advice(
            key="patch.batch_size",
            message=f"{figures.host:.0%} of the time the device waits for the host, which does "
            "work for each batch: larger batches or larger patches need less of it",
        )
    has_graphs = device.startswith("cuda") and config.model.backend == "pytorch"
    if has_graphs and not config.compute.cuda_graphs:
        yield Advice(
            key="compute.cuda_graphs",
            message="a forward that is replayed by one launch leaves the host time for the rest",
        )
    if figures.own_host < figures.host / 2:
        yield Advice(
            key="compute.threads",
            message=f"{figures.host:.0%} of the time is in no stage: something else uses these "
            "cores. Measure when nothing else runs, with no more threads in all than cores",
        )
    elif on_cpu:
        yield Advice(
            key="patch.shape",
            message=f"{figures.host:.0%} of the time is work between the stages, done anew for "
            "each patch: larger patches, and larger blocks, need less of it",
        )
