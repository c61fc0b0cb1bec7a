"""The `bench` verb: how fast this machine runs this config, and what of it is the network alone.

Measures on every rank at the same time, and reports on rank 0. Touches neither the output nor the
journal of a run; what it writes goes to a temporary place.

    repeat    bare: half as many forwards of a batch that is there already
              whole: blocks read, predicted, written, as in a run     -->  Mvox/s, efficiency
              bare: the other half, so that a machine that slows down slows both
    at last   one block stage by stage
"""

import json
import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.bench.figures import Pass, RankFigures, combine, pace, suggest
from mpichunk.bench.report import Bench, bench_json, render_bench
from mpichunk.bench.scratch import scratch_output, scratch_parent
from mpichunk.bench.trial import BlockTrial
from mpichunk.block.inference import check_engine
from mpichunk.config.file import LoadedConfig, load_config
from mpichunk.errors import ExitCode, UserError
from mpichunk.geometry.box import Box
from mpichunk.geometry.symmetry import turns_of
from mpichunk.job.assembly import (
    bind_ranks,
    engine_request,
    load_engine,
    make_inference,
    open_volumes,
    prepare_network,
)
from mpichunk.job.forward_probe import (
    HeldMemory,
    MeasuredLoad,
    device_words,
    forward_nbytes,
    settle,
)
from mpichunk.job.masking import is_wanted
from mpichunk.job.memory_check import device_room, keep_probe
from mpichunk.job.startup import Job, open_config_mask, prepare
from mpichunk.plan.estimate import estimate
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT, unexplained_nbytes
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.processmemory import settle_allocator, trim
from mpichunk.ranks.agreement import on_every_rank, on_rank_0
from mpichunk.ranks.comm import start_mpi
from mpichunk.ranks.communicator import Communicator
from mpichunk.verbs.onranks import on_ranks
from mpichunk.words import count, duration

T = TypeVar("T")

MOST_BLOCKS_SEEN = 10_000
"""Blocks that are looked at to find whole ones."""

FEWEST_BLOCKS, MOST_BLOCKS, PASS_SECONDS = 4, 12, 30.0
"""Blocks per rank and repeat: as many as fill this time, within these bounds."""

SETTLING_FORWARDS = 12
"""Forwards until their peak of memory has settled: blocks run many."""

FAREWELL_SECONDS = 1.0
"""How long an interrupted rank waits for the others before it ends."""

LONG_SECONDS = 600.0
"""From so long a measurement on, ways to shorten it are named."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure."""

    num_repeats: int
    """Repeats of each measurement."""

    num_blocks: int | None = None
    """Blocks per rank and repeat; None for as many as take about half a minute."""

    scratch: Path | None = None
    """Folder for the scratch output; None for that of the real one."""

    as_json: bool = False
    """Print JSON."""


def bench(config_path: Path, overrides: Sequence[str], options: Options) -> int:
    """Measure a config and print what was found; return the exit code.

    To be called by every rank.
    """
    settle_allocator()
    comm = start_mpi()
    # As Ctrl-C: so that the scratch output is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = bench_on(comm, config_path, overrides, options)
    comm.leave(code)
    return code


def bench_on(
    comm: Communicator,
    config_path: Path,
    overrides: Sequence[str],
    options: Options,
) -> int:
    """Do what `bench` does, on the ranks given. Only rank 0 prints."""

    def body() -> int:
        try:
            loaded = on_rank_0(comm, lambda: load_config(config_path, overrides))
            with loaded.locating():
                found = _bench(comm, loaded, options)
            if comm.is_coordinator:
                text = json.dumps(bench_json(found), indent=2) if options.as_json else None
                print(text or render_bench(found), flush=True)
            return ExitCode.ALL_DONE
        except KeyboardInterrupt:
            # The first rank to end takes the others with it: let them tidy up, too.
            time.sleep(FAREWELL_SECONDS if comm.size > 1 else 0)
            raise

    return on_ranks(comm, body)


def _bench(comm: Communicator, loaded: LoadedConfig, options: Options) -> Bench:
    """Measure; every rank returns the same."""
    job = on_rank_0(comm, lambda: prepare(loaded.config))
    parent = on_rank_0(comm, lambda: scratch_parent(job.output, options.scratch))
    request = engine_request(job, bind_ranks(comm, job).of(comm.rank))
    prepared = on_rank_0(comm, lambda: prepare_network(job, request))
    loading = MeasuredLoad(lambda: load_engine(job, request, prepared))
    engine = on_every_rank(comm, loading)
    on_every_rank(comm, lambda: check_engine(engine, request))
    settle(engine, loading)
    nbytes = forward_nbytes(engine, request, SETTLING_FORWARDS)
    trim()
    with ExitStack() as stack:
        trial = on_every_rank(comm, lambda: _open(stack, job, engine, request, parent))
        num_blocks = _num_blocks(comm, job, trial, options)
        wanted = comm.size * num_blocks * options.num_repeats
        blocks = on_rank_0(comm, lambda: choose_blocks(job.plan, _wants(job), num=wanted))
        mine = _measure(comm, trial, blocks, num_blocks, options.num_repeats)
    # Now storage libraries are at work, too.
    held = HeldMemory.most(comm.allgather(settle(engine, loading)))
    ranks = comm.allgather(mine)
    figures = combine(ranks)
    premise = job.premise()
    found = estimate(premise)
    whole = replace(premise, num_blocks=num_blocks)
    if figures.seconds_per_batch > 0:
        room = device_room(engine)
        probe = Probe(
            seconds=figures.seconds_per_batch,
            nbytes=nbytes,
            device=device_words(engine),
            free_nbytes=None if room is None else room.nbytes,
            resident_nbytes=held.resident_nbytes,
            start_nbytes=held.start_nbytes,
            pace=pace(figures, ranks, found.work, num_blocks=num_blocks),
        )
        on_rank_0(comm, lambda: keep_probe(job, _complete(whole, probe, ranks)))
    advice = suggest(figures, job.config, found.work, device=request.device, num_blocks=num_blocks)
    return Bench(
        config=job.config,
        work=found.work,
        engine=engine.info,
        ranks=ranks,
        blocks=sorted(set(blocks)),
        num_blocks=num_blocks,
        scratch=str(parent),
        figures=figures,
        advice=[*advice, *found.advice],
    )


def _complete(premise: Premise, probe: Probe, ranks: Sequence[RankFigures]) -> Probe:
    """Return a probe with what ranks held at their peaks beyond what it tells."""
    peaks = [whole.peak_nbytes for rank in ranks for whole in rank.whole]
    known = [peak for peak in peaks if peak is not None]
    if not known:
        return probe
    more_nbytes = unexplained_nbytes(
        replace(premise, probe=probe),
        peak_nbytes=max(known),
        memory="cpu" if probe.free_nbytes is None else "host",
    )
    return replace(probe, more_nbytes=more_nbytes)


def _open(
    stack: ExitStack, job: Job, engine: Engine, request: EngineRequest, parent: Path
) -> BlockTrial:
    """Return what this rank measures with: the input, and an output of its own."""
    output = stack.enter_context(scratch_output(job.output, parent))
    scratch_job = replace(job, output=output)
    source, writer = open_volumes(stack, scratch_job, request)
    return BlockTrial(
        plan=job.plan,
        source=source,
        writer=writer,
        output=output,
        engine=engine,
        request=request,
        make_inference=lambda engine: make_inference(job, engine, request),
    )


def choose_blocks(plan: Plan, is_wanted: Callable[[Box], bool], *, num: int) -> list[int]:
    """Return up to `num` blocks from the middle of the volume on; whole ones if there are.

    Raises:
        UserError: the mask leaves nothing of any of them.
    """
    shape = plan.grid.shape
    z, y, x = (n // 2 for n in shape)
    middle = (z * shape[1] + y) * shape[2] + x
    whole: list[int] = []
    others: list[tuple[int, int]] = []
    for step in range(min(len(plan), MOST_BLOCKS_SEEN)):
        index = (middle + step) % len(plan)
        core = plan.grid[index]
        if not is_wanted(core):
            continue
        if core.shape == plan.block_shape:
            whole.append(index)
        else:
            others.append((-core.num_voxels, index))
        if len(whole) == num:
            break
    if not whole and not others:
        raise UserError(
            "the mask excludes every block that was examined; choose another roi", key="mask"
        )
    largest = min(others)[0] if others else 0
    return whole or [index for voxels, index in others if voxels == largest][:num]


def _wants(job: Job) -> Callable[[Box], bool]:
    """Return what says whether the mask leaves anything of a core."""
    section, grid = job.config.mask, job.mask_grid
    if section is None or grid is None:
        return lambda core: True

    def wants(core: Box) -> bool:
        with open_config_mask(section) as mask:
            return is_wanted(grid, mask, core)

    return wants


def _num_blocks(comm: Communicator, job: Job, trial: BlockTrial, options: Options) -> int:
    """Return how many blocks each rank runs per repeat, and say how long all will take."""
    seconds = trial.bare(1)
    work = job.work
    num_forwards = work.patches_per_block[1] / job.config.patch.batch_size
    block_seconds = (
        max(comm.allgather(seconds)) * num_forwards * len(turns_of(job.config.model.augment))
    )
    fitting = int(PASS_SECONDS / block_seconds) if block_seconds else MOST_BLOCKS
    num_blocks = options.num_blocks or min(MOST_BLOCKS, max(FEWEST_BLOCKS, fitting))
    total = 2 * options.num_repeats * num_blocks * block_seconds
    if comm.is_coordinator:
        shorter = "; --blocks 1 --repeats 1, or a smaller block.shape, is shorter"
        log.info(
            "%s per rank, %s: about %s%s",
            count(num_blocks, "block"),
            count(options.num_repeats, "repeat"),
            duration(total),
            shorter if total > LONG_SECONDS else "",
        )
    return num_blocks


def _measure(
    comm: Communicator, trial: BlockTrial, blocks: Sequence[int], num_blocks: int, num_repeats: int
) -> RankFigures:
    """Measure this rank while all others do, in turns: whole, bare, whole, bare."""
    whole: list[Pass] = []
    bare: list[float] = []
    place = comm.alive.index(comm.rank)

    def share(repeat: int) -> list[int]:
        first = repeat * comm.size * num_blocks + place
        return [blocks[(first + comm.size * i) % len(blocks)] for i in range(num_blocks)]

    # What happens only once, such as pages of memory that are touched first, is no part of it: as
    # many blocks have memory as are on their way at a time.
    warming = share(num_repeats - 1)[:1] * min(num_blocks, BLOCKS_IN_FLIGHT)
    first = on_every_rank(comm, lambda: trial.whole(warming))
    half = max(1, first.num_batches * num_blocks // (2 * first.num_blocks))
    for repeat in range(num_repeats):
        before = _together(comm, lambda: trial.bare(half))
        whole.append(_together(comm, partial(trial.whole, share(repeat))))
        after = _together(comm, lambda: trial.bare(half))
        bare.append((before + after) / (2 * half) * whole[-1].num_batches)
        log.info(
            "repeat %d of %d: whole %s, as many bare forwards %s",
            repeat + 1,
            num_repeats,
            duration(whole[-1].seconds),
            duration(bare[-1]),
        )
    stages = on_every_rank(comm, lambda: trial.stages(share(0)[0]))
    return RankFigures(
        host=comm.host,
        device=trial.engine.info.device,
        whole=tuple(whole),
        bare=tuple(bare),
        stages=stages,
    )


def _together(comm: Communicator, measure: Callable[[], T]) -> T:
    """Begin on all ranks at the same time; return this one's result when all have one."""
    comm.barrier()
    return on_every_rank(comm, measure)
