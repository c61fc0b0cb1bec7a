"""The `run` verb: the one place that knows every part, and puts them together in order.

Decides nothing itself. Nothing is written before all is checked:

    rank 0          config, volumes, plan                -> every rank
    every rank      devices and threads                  -> all ranks decide alike
    rank 0          what earlier starts have left        -> every rank
    every rank      loads the network, one forward       -> the ranks that compute right
    every rank      one forward more, free memory        -> that what will be needed is there
    rank 0          output, journal, run directory       -> every rank sees them, opens the volumes
    every rank      blocks, until all have ended
    rank 0          summary, coverage                    -> one exit code

Where MPI survives the loss of a rank, the lowest one left stands in for rank 0.
"""

import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mpichunk.backends.devices.binding import Bindings
from mpichunk.backends.engine import EngineInfo
from mpichunk.block.inference import BlockInference
from mpichunk.block.pipeline import InputSource, Pipeline
from mpichunk.config.file import LoadedConfig, load_config, load_plain_config
from mpichunk.config.schema import Schedule
from mpichunk.errors import UserError
from mpichunk.job.assembly import (
    bind_ranks,
    engine_request,
    load_engine,
    make_inference,
    open_volumes,
    prepare_network,
)
from mpichunk.job.canary import find_sound_ranks
from mpichunk.job.exit_status import conclude, note_end
from mpichunk.job.forward_probe import MeasuredLoad
from mpichunk.job.leading import CoordinatorSetup, JournalKeeper
from mpichunk.job.memory_check import Crew, check_device, check_host, keep_probe, probe_ranks
from mpichunk.job.shared_filesystem import check_sight
from mpichunk.job.startup import (
    Job,
    changed_versions,
    expect,
    find_todo,
    library_versions,
    prepare,
    sync_first,
    threads_of_earlier_start,
    write_run_files,
)
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.plan.prediction import Forecast
from mpichunk.plan.probe import Probe
from mpichunk.process import this_process
from mpichunk.processmemory import peak_nbytes, settle_allocator
from mpichunk.ranks.agreement import on_every_rank, on_rank_0
from mpichunk.ranks.comm import start_mpi
from mpichunk.ranks.communicator import Communicator
from mpichunk.ranks.launcher import name_of
from mpichunk.ranks.neighbours import Neighbours
from mpichunk.ranks.recovery import Watchdog, survive
from mpichunk.ranks.slurm import Allocation, describe
from mpichunk.roles.drain import DrainSources, DrainWatch, Signals, clear_stop
from mpichunk.roles.loop import Heartbeats, Loop
from mpichunk.roles.monitor import CoordinatorRole, Monitor, watch_stopped
from mpichunk.roles.permits import Permits
from mpichunk.roles.worker import Worker
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.layout import STOP
from mpichunk.rundir.logs import lead_terminal, log_to_file
from mpichunk.schedule.messages import FAILURES, Records, Stop
from mpichunk.schedule.progress import Counters
from mpichunk.verbs.onranks import on_ranks
from mpichunk.volume import Writer, create_output
from mpichunk.words import count

PROGRESS_SECONDS = 5.0
"""How often a rank tells what it has done."""

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RankState:
    """What of a process outlasts the loss of another rank."""

    drain_sources: DrainSources
    """Signals, and the end of the allocation."""

    watchdog: Watchdog
    """Runs while ranks wait for one another."""

    allocation: Allocation = field(default_factory=lambda: Allocation({}))
    """Slurm's job, if there is one."""

    has_begun: bool = False
    """Whether the run directory is this run's: then nothing is set aside any more."""

    is_watching: bool = False
    """Whether a thread looks for ranks that a signal has stopped."""

    is_abandoning: bool = False
    """Whether threads compute what nobody waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What a rank takes into the computing, besides what every rank has."""

    source: InputSource
    inference: BlockInference
    writer: Writer
    neighbours: Neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFacts:
    """What is noted of a start before its first block."""

    bindings: Bindings
    """Devices and threads of the ranks."""

    engine: EngineInfo
    """What computes."""

    expected: Forecast
    """How long it will take."""

    told: Probe | None
    """What a forward told, for `plan` to know."""


def run(config_path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run a config, or what an earlier run of it left; return the exit code.

    To be called by every rank.
    """
    settle_allocator()
    who = name_of(os.environ, socket.gethostname())
    watchdog = Watchdog(_start_timeout(config_path, overrides), who=who)
    watchdog.start()
    comm = start_mpi()
    if comm.size == 1:
        watchdog.stop()
        watchdog = Watchdog()
    with Signals() as signals:
        allocation = Allocation(os.environ)
        drain_sources = DrainSources(signals=signals, end_time=allocation.end_time)
        state = RankState(drain_sources=drain_sources, watchdog=watchdog, allocation=allocation)
        code = run_on(comm, config_path, overrides, fresh=fresh, state=state)
    comm.leave(code)
    return code


def run_on(
    comm: Communicator,
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    state: RankState | None = None,
) -> int:
    """Do what `run` does, on the ranks given. Only rank 0 prints the user's mistakes."""
    own_state = state or RankState(drain_sources=DrainSources(), watchdog=Watchdog())

    def body() -> int:
        code = survive(comm, lambda: _run(comm, config_path, overrides, fresh, own_state))
        if own_state.is_abandoning:
            comm.leave(code, at_once=True)
        return code

    return on_ranks(comm, body)


def _start_timeout(config_path: Path, overrides: Sequence[str]) -> float:
    """Return how long the start may take, before there are other ranks to read the config."""
    try:
        loaded = load_plain_config(config_path, overrides)
        return loaded.config.schedule.start_timeout_seconds
    except (UserError, OSError):
        # It is told in good order once the ranks know one another.
        return Schedule().start_timeout_seconds


def _run(
    comm: Communicator, config_path: Path, overrides: Sequence[str], fresh: bool, state: RankState
) -> int:
    """Run it, or raise the same UserError on every rank."""
    loaded = on_rank_0(comm, lambda: load_config(config_path, overrides))
    fresh = fresh and not any(comm.allgather(state.has_begun))
    with loaded.locating():
        return _run_config(comm, loaded, fresh=fresh, state=state)


def _run_config(comm: Communicator, loaded: LoadedConfig, *, fresh: bool, state: RankState) -> int:
    """Do all that the module's docstring lists."""
    job = on_rank_0(comm, lambda: prepare(loaded.config))
    threads = None if fresh else on_rank_0(comm, lambda: threads_of_earlier_start(job.run_dir))
    bindings = bind_ranks(comm, job, threads=threads)
    processes = dict(zip(comm.alive, comm.allgather(this_process()), strict=True))
    neighbours = Neighbours(comm.rank, processes)
    if comm.size > 1 and not state.is_watching:
        state.is_watching = True
        patience = job.config.schedule.min_lease_seconds
        watch_stopped(neighbours, state.watchdog, seconds=patience, rank=comm.rank)
    found = on_rank_0(comm, lambda: find_todo(job, bindings, fresh=fresh))
    todo = found.unpack(len(job.plan))
    ending: Stop | None = None
    if todo.any():
        on_rank_0(comm, lambda: _log_start(comm, loaded, job, bindings))
        if not comm.is_coordinator:
            log.info("%s", bindings.of(comm.rank))
        request = engine_request(job, bindings.of(comm.rank))
        num_todo = int(np.count_nonzero(todo))
        crew = Crew(num_blocks=num_todo, ranks=comm.alive)
        check_host(comm, job, request, crew)
        prepared = on_rank_0(comm, lambda: prepare_network(job, request))
        loading = MeasuredLoad(lambda: load_engine(job, request, prepared))
        engine, sound = find_sound_ranks(comm, job.config.model, request, loading)
        probe, told = probe_ranks(comm, job, engine, request, sound, loading)
        crew = Crew(num_blocks=num_todo, ranks=sound, probe=probe, has_probed=True)
        check_host(comm, job, request, crew)
        check_device(comm, job, engine, bindings, crew)
        expected = on_rank_0(comm, lambda: expect(job, num_todo, len(sound), told))
        setup = CoordinatorSetup(comm=comm, job=job, todo=todo, sound=sound, expected=expected)
        with ExitStack() as stack:
            keeper = JournalKeeper(comm, job, found.fingerprint, processes.values(), stack)
            facts = StartFacts(bindings=bindings, engine=engine.info, expected=expected, told=told)
            _open_run(comm, keeper, facts, fresh=fresh, state=state)
            source, writer = on_every_rank(comm, lambda: open_volumes(stack, job, request))
            inference = make_inference(job, engine, request)
            parts = RankParts(
                source=source, inference=inference, writer=writer, neighbours=neighbours
            )
            ending = _compute(setup, keeper, parts, state)
    return on_rank_0(comm, lambda: conclude(job.run_dir, ending, num_blocks=len(job.plan)))


def _log_start(comm: Communicator, loaded: LoadedConfig, job: Job, bindings: Bindings) -> None:
    """Tell what is about to run."""
    ranks = count(comm.size, "rank")
    log.info("%s, MPI: %s; run directory %s", ranks, comm.library, job.run_dir)
    for line in bindings.table.splitlines():
        log.info("%s", line)
    for note in loaded.notes:
        log.info("%s", note)
    for warning in (*loaded.warnings(), *bindings.warnings):
        log.warning("%s", warning)


def _open_run(
    comm: Communicator, keeper: JournalKeeper, facts: StartFacts, *, fresh: bool, state: RankState
) -> None:
    """Begin or go on with the run directory and the output.

    Raises:
        UserError: they cannot be written, or a rank does not see them.
    """
    job = keeper.job

    def begin() -> str:
        lock = keeper.lock()
        create_output(job.output, sources=job.sources)
        journal = keeper.open(lock, fresh=fresh)
        if not state.has_begun:
            clear_stop(job.run_dir, before=lock.taken)
        _note_start(journal, facts, state.allocation)
        if facts.told is not None:
            keep_probe(job, facts.told)
        return write_run_files(job.config, job, facts.expected)

    nonce = on_rank_0(comm, begin)
    state.has_begun = True
    on_every_rank(comm, lambda: check_sight(job.run_dir, nonce, host=comm.host))
    on_every_rank(comm, lambda: log_to_file(job.run_dir, comm.rank))


def _note_start(journal: Journal, facts: StartFacts, allocation: Allocation) -> None:
    """Note this start in the journal, and what has changed since the first."""
    for change in changed_versions(journal.header, library_versions()):
        log.warning("%s", change)
    bindings = facts.bindings
    told: dict[str, object] = {
        "num_ranks": len(bindings.ranks),
        "hosts": sorted({binding.host for binding in bindings.ranks}),
        "device_kinds": list(bindings.device_kinds),
        "threads": bindings.ranks[0].threads,
        "engine": asdict(facts.engine),
    }
    if slurm := allocation.facts():
        log.info("%s", describe(slurm))
        told["slurm"] = slurm
    journal.append_start(told)
    sync_first(journal)


def _compute(
    setup: CoordinatorSetup, keeper: JournalKeeper, parts: RankParts, state: RankState
) -> Stop | None:
    """Compute the blocks still to do: this rank's part of it, until all ranks have ended.

    Returns, on the coordinator, why they have ended.
    """
    comm, job, wake = setup.comm, setup.job, threading.Event()
    permits = Permits(wake)
    records: Records = queue.SimpleQueue()
    pipeline = _pipeline(job, parts, records, permits, wake)
    counters = _counters(parts.inference)
    # A rank that computes wrongly asks for no blocks.
    depth = BLOCKS_IN_FLIGHT if comm.rank in setup.sound else 0
    worker = Worker(
        pipeline,
        records,
        counters,
        depth=depth,
        own_blocks=setup.own_blocks,
        permits=permits,
        since=setup.started,
    )
    silence = job.config.schedule.min_lease_seconds
    interval = min(PROGRESS_SECONDS, silence / 4)

    def take_over() -> CoordinatorRole:
        lead_terminal()
        return setup.take_over(keeper.open(keeper.lock()))

    def end(lead: CoordinatorRole) -> Stop:
        assert keeper.journal is not None
        ending = lead.coordinator.ending or Stop(reason=FAILURES, why="no rank is left")
        setup.tell(lead)
        note_end(keeper.journal, ending)
        return ending

    loop = Loop(
        comm=comm,
        worker=worker,
        lead=setup.begin(keeper.journal) if keeper.journal is not None else None,
        heartbeats=Heartbeats(counters, interval=interval),
        wake=wake,
        monitor=Monitor(comm, parts.neighbours, silence_seconds=silence, interval=interval),
        watch=_watch(job, state.drain_sources),
        take_over=take_over,
        conclude=lambda lead: conclude(job.run_dir, end(lead), num_blocks=len(job.plan)),
        watchdog=state.watchdog,
    )
    with pipeline:
        try:
            lead = loop.serve()
        finally:
            # Whoever begins anew must not wait for an answer that will not come.
            permits.close(())
        if worker.is_abandoning:
            pipeline.abandon()
            state.is_abandoning = True
    return None if lead is None else end(lead)


def _counters(inference: BlockInference) -> Counters:
    """Return what counts what this rank has done."""
    return Counters(host_peak=peak_nbytes, device_peak=lambda: inference.device_peak_nbytes)


def _pipeline(
    job: Job, parts: RankParts, records: Records, permits: Permits, wake: threading.Event
) -> Pipeline:
    """Return what computes this rank's blocks."""
    return Pipeline(
        plan=job.plan,
        source=parts.source,
        inference=parts.inference,
        writer=parts.writer,
        num_channels=job.output.num_channels,
        dtype=job.output.dtype,
        records=records,
        wake=wake,
        may_write=permits.may_write,
    )


def _watch(job: Job, drain_sources: DrainSources) -> DrainWatch:
    """Return what says when the run should end early."""
    return DrainWatch(
        drain_sources,
        stop_file=job.run_dir / STOP,
        stop_before_seconds=job.config.schedule.stop_before_seconds,
    )
