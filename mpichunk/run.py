"""The `run` verb: the one place that knows every part, and puts them together in order.

Decides nothing itself:

    rank 0          config, volumes, plan                -> every rank
    every rank      devices and threads                  -> all ranks decide alike
    rank 0          journal, output, run directory       -> every rank
    every rank      sees the run directory, opens the output, loads the network, one forward
    every rank      blocks, until all have ended
    rank 0          summary, coverage                    -> one exit code
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpichunk.agreement import on_every_rank, on_rank_0
from mpichunk.attendance import Attendance
from mpichunk.backends import get_backend
from mpichunk.binding import Binding, Bindings, RankFacts, bind, gpu_hints
from mpichunk.breaker import Breaker
from mpichunk.canary import find_sound_ranks
from mpichunk.comm import Communicator, start_mpi
from mpichunk.conclusion import conclude
from mpichunk.config import Schedule
from mpichunk.configfile import LoadedConfig, load_config
from mpichunk.coordinator import Coordinator
from mpichunk.crash import crash_guard
from mpichunk.drain import STOP_NAME, Outside, Signals, Watch, clear_stop
from mpichunk.engine import Engine, EngineRequest
from mpichunk.errors import ExitCode, UserError
from mpichunk.estimate import BLOCKS_IN_FLIGHT
from mpichunk.history import read_tries
from mpichunk.inference import BlockInference, scaling_for
from mpichunk.journal import Journal, changed_versions
from mpichunk.launcher import allocation_end, check_world_size
from mpichunk.lock import RunLock, this_process
from mpichunk.logs import close_logs, lead_terminal, log_to_file, log_to_terminal
from mpichunk.loop import Pulse, serve
from mpichunk.messages import FINISHED, State, Stop
from mpichunk.neighbours import Neighbours
from mpichunk.permits import Permits
from mpichunk.pipeline import Pipeline, Source
from mpichunk.progress import Counters, Heartbeat, get_display, summarise
from mpichunk.recovery import Fuse, survive
from mpichunk.scheduler import Scheduler, static_blocks
from mpichunk.sentry import Lead, Lookout, watch_stopped
from mpichunk.startup import (
    Job,
    check_sight,
    library_versions,
    open_journal,
    prepare,
    refuse_lost_output,
    sync_first,
    threads_of_earlier_start,
    write_run_files,
)
from mpichunk.status import QUIET_SECONDS
from mpichunk.vigil import Tempo, Vigil
from mpichunk.volume import Reader, Writer, open_output
from mpichunk.worker import Records, Worker

PROGRESS_SECONDS = 5.0
"""How often ranks that work contribute to the progress."""

BEAT_SECONDS = QUIET_SECONDS / 5
"""How often the journal notes that the run is alive."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What rank 0 sends once the run directory is ready."""

    nonce: str
    """What every rank must find in the run directory."""

    todo: bytes
    """A bit per block, packed: whether it is still to be computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What may end a run early."""

    outside: Outside
    """Signals, and the end of the allocation."""

    fuse: Fuse
    """Burns while ranks wait for one another."""

    abandoned: list[bool] = field(default_factory=list)
    """No longer empty when threads compute what nobody waits for."""


def run(config_path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run a config, or what an earlier run of it left; return the exit code.

    To be called by every rank.
    """
    fuse = Fuse(_start_timeout(config_path, overrides))
    fuse.light()
    comm = start_mpi()
    if comm.size == 1:
        fuse.put_out()
        fuse = Fuse()
    with Signals() as signals:
        outside = Outside(signals=signals, end_time=allocation_end(os.environ))
        code = run_on(comm, config_path, overrides, fresh=fresh, outside=outside, fuse=fuse)
    comm.leave(code)
    return code


def run_on(
    comm: Communicator,
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    outside: Outside | None = None,
    fuse: Fuse | None = None,
) -> int:
    """Do what `run` does, on the ranks given. Only rank 0 prints the user's mistakes."""
    ways = Ways(outside=outside or Outside(), fuse=fuse or Fuse())
    begun: list[bool] = []

    def attempt() -> int:
        return _run(comm, config_path, overrides, fresh=fresh, begun=begun, ways=ways)

    log_to_terminal(comm.rank)
    with crash_guard(comm):
        try:
            if not comm.is_fault_tolerant:  # as only a world of several ranks is
                check_world_size(comm.size, os.environ)
            code = survive(comm, attempt)
            if ways.abandoned:
                comm.leave(code, at_once=True)
            return code
        except UserError as error:
            if comm.is_coordinator:
                print(f"mpichunk: {error}", file=sys.stderr)
            return ExitCode.USER_ERROR
        finally:
            close_logs()


def _start_timeout(config_path: Path, overrides: Sequence[str]) -> float:
    """Return how long the start may take, before there are other ranks to read the config."""
    try:
        return load_config(config_path, overrides).config.schedule.start_timeout_seconds
    except (UserError, OSError):
        # It is told in good order once the ranks know one another.
        return Schedule().start_timeout_seconds


def _run(
    comm: Communicator,
    config_path: Path,
    overrides: Sequence[str],
    *,
    fresh: bool,
    begun: list[bool],
    ways: Ways,
) -> int:
    """Run it, or raise the same UserError on every rank.

    `begun` is no longer empty once the run directory is this run's: then nothing is set aside any
    more, should all of this be done again because a rank was lost.
    """
    loaded = on_rank_0(comm, lambda: load_config(config_path, overrides))
    try:
        if fresh and comm.is_fault_tolerant:
            fresh = not any(comm.allgather(bool(begun)))
        return _run_config(comm, loaded, fresh=fresh, begun=begun, ways=ways)
    except UserError as error:
        raise loaded.locate_error(error) from None


def _run_config(
    comm: Communicator, loaded: LoadedConfig, *, fresh: bool, begun: list[bool], ways: Ways
) -> int:
    """Do all that the module's docstring lists."""
    job = on_rank_0(comm, lambda: prepare(loaded.config))
    bindings = _bind(comm, job, fresh=fresh)
    processes = comm.allgather(this_process())
    neighbours = Neighbours(comm.rank, dict(zip(comm.alive, processes, strict=True)))
    if comm.size > 1:
        patience = loaded.config.schedule.min_lease_seconds
        watch_stopped(neighbours, ways.fuse, seconds=patience, rank=comm.rank)
    with ExitStack() as stack:
        ledger: list[Journal] = []  # the journal, on the coordinator only

        def open_ledger(fresh: bool = False) -> Journal:
            lock = RunLock.acquire(job.run_dir, processes=processes, job=comm.job)
            stack.enter_context(lock)
            opened = _open_journal(job, bindings, lock, fresh=fresh)
            ledger.append(stack.enter_context(opened))
            return opened

        def open_run() -> Start:
            open_ledger(fresh)
            clear_stop(job.run_dir)
            refuse_lost_output(job, int(np.count_nonzero(ledger[0].states == State.DONE)))
            nonce = write_run_files(loaded.config, job)
            todo = ledger[0].states != State.DONE
            return Start(nonce=nonce, todo=np.packbits(todo).tobytes())

        start = on_rank_0(comm, open_run)
        begun.append(True)
        on_every_rank(comm, lambda: check_sight(job.run_dir, start.nonce, host=comm.host))
        on_every_rank(comm, lambda: log_to_file(job.run_dir, comm.rank))
        on_rank_0(comm, lambda: _log_start(comm, loaded, job, bindings, ledger[0]))
        todo = np.unpackbits(np.frombuffer(start.todo, np.uint8), count=len(job.plan)).astype(bool)
        ending: Stop | None = Stop(reason=FINISHED)
        if todo.any():
            ending = _compute(comm, job, bindings, todo, ledger, open_ledger, neighbours, ways)
        return on_rank_0(comm, lambda: conclude(ledger[0], ending, num_blocks=len(job.plan)))


def _bind(comm: Communicator, job: Job, *, fresh: bool) -> Bindings:
    """Decide, alike on every rank, where each rank computes."""
    config = job.config
    earlier = None
    if not fresh:
        earlier = on_rank_0(comm, lambda: threads_of_earlier_start(job.run_dir))
    backend = get_backend(config.model.backend)
    facts = RankFacts(
        rank=comm.rank,
        host=comm.host,
        local_rank=comm.local_rank,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        num_host_cores=os.cpu_count() or 1,
        probe=backend.probe(config.compute.device),
        gpu_hints=gpu_hints(os.environ, glob("/dev/nvidia[0-9]*")),
    )
    return bind(
        comm.allgather(facts),
        device="cpu" if backend.cpu_only else config.compute.device,
        threads=config.compute.threads or earlier,
        share_device=config.compute.share_device,
    )


def _open_journal(job: Job, bindings: Bindings, lock: RunLock, *, fresh: bool) -> Journal:
    """Open the journal, on rank 0."""
    on_cpu = bindings.ranks[0].device == "cpu"
    return open_journal(
        job,
        device_kinds=bindings.device_kinds,
        # On an accelerator the number of CPU threads does not touch the result.
        threads=bindings.ranks[0].threads if on_cpu else None,
        fresh=fresh,
        guard=lock.check,
    )


def _log_start(
    comm: Communicator, loaded: LoadedConfig, job: Job, bindings: Bindings, journal: Journal
) -> None:
    """Tell what is about to run, and note it in the journal."""
    ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''}"
    log.info("%s, MPI: %s; run directory %s", ranks, comm.library, job.run_dir)
    for line in bindings.table.splitlines():
        log.info("%s", line)
    changed = changed_versions(journal.header, library_versions())
    for warning in (*loaded.warnings(), *bindings.warnings, *changed):
        log.warning("%s", warning)
    journal.append_start(
        {
            "num_ranks": comm.size,
            "hosts": sorted({binding.host for binding in bindings.ranks}),
            "device_kinds": list(bindings.device_kinds),
            "threads": bindings.ranks[0].threads,
        }
    )
    sync_first(journal)


def _compute(
    comm: Communicator,
    job: Job,
    bindings: Bindings,
    todo: npt.NDArray[np.bool_],
    ledger: Sequence[Journal],
    open_ledger: Callable[[], Journal],
    neighbours: Neighbours,
    ways: Ways,
) -> Stop | None:
    """Compute the blocks still to do: this rank's part of it, until all ranks have ended.

    Returns, on the coordinator, why they have ended.
    """
    config = job.config
    request = _request(job, bindings.of(comm.rank))
    source, writer, engine = on_every_rank(comm, lambda: _open_and_load(job, request))
    sound = find_sound_ranks(comm, config.model, request, engine)
    is_sound = comm.rank in sound
    if comm.rank == 0:
        _log_network(engine)
    inference = BlockInference(
        engine,
        request,
        scaling=scaling_for(job.volume.dtype, config.input.normalize),
        window_name=config.patch.window,
        activation=config.model.activation,
        skip_blank=config.model.skip_blank,
    )
    records: Records = queue.SimpleQueue()
    wake = threading.Event()
    counters = Counters()
    started = time.monotonic()
    own_blocks: Iterable[int] = ()
    if config.schedule.mode == "static" and is_sound:
        own_blocks = static_blocks(todo, len(sound), sound.index(comm.rank))
    interval = min(PROGRESS_SECONDS, config.schedule.min_lease_seconds / 4)
    permits = Permits(wake)
    pipeline = Pipeline(
        plan=job.plan,
        source=source,
        inference=inference,
        writer=writer,
        num_channels=config.model.out_channels,
        dtype=job.output.dtype,
        records=records,
        wake=wake,
        may_write=permits.may_write,
    )

    def take_over() -> Lead:
        lead_terminal()
        return _lead(comm, job, bindings, todo, open_ledger(), sound, started, is_first=False)

    def conclude_now(lead: Lead) -> int:
        lead.attendance.close()
        _log_summary(lead, todo, time.monotonic() - started)
        return conclude(ledger[0], lead.coordinator.ending, num_blocks=len(job.plan))

    lead = None
    if ledger:
        lead = _lead(comm, job, bindings, todo, ledger[0], sound, started, is_first=True)
    depth = BLOCKS_IN_FLIGHT if is_sound else 0  # who is not sound asks for no blocks
    worker = Worker(
        pipeline, records, counters, depth=depth, own_blocks=own_blocks, permits=permits
    )
    with pipeline:
        lead = serve(
            comm,
            worker,
            lead,
            Pulse(counters, interval=interval),
            wake=wake,
            watch=_watch(job, ways.outside),
            lookout=Lookout(
                comm,
                neighbours,
                silence_seconds=config.schedule.min_lease_seconds,
                interval=interval,
            ),
            take_over=take_over,
            conclude=conclude_now,
            fuse=ways.fuse,
        )
        if worker.is_abandoning:
            pipeline.abandon()
            ways.abandoned.append(True)
    if lead is None:
        return None
    lead.attendance.close()
    _log_summary(lead, todo, time.monotonic() - started)
    return lead.coordinator.ending


def _log_network(engine: Engine) -> None:
    """Tell what computes."""
    info = engine.info
    log.info(
        "network: %s backend, %s, %s (%s), %s, CPU threads: %d",
        info.backend,
        info.version,
        info.device,
        info.device_kind,
        info.precision,
        info.threads,
    )


def _watch(job: Job, outside: Outside) -> Watch:
    """Return what says when the run should end early."""
    return Watch(
        outside,
        stop_file=job.run_dir / STOP_NAME,
        stop_before_seconds=job.config.schedule.stop_before_seconds,
    )


def _request(job: Job, binding: Binding) -> EngineRequest:
    """Return what this rank's engine must do."""
    config = job.config
    return EngineRequest(
        patch_shape=config.patch.shape,
        crop=config.patch.crop,
        batch_size=config.patch.batch_size,
        in_channels=job.volume.num_channels,
        out_channels=config.model.out_channels,
        threads=binding.threads,
        precision=config.compute.precision,
        device=binding.device,
        deterministic=config.compute.deterministic,
    )


def _open_and_load(job: Job, request: EngineRequest) -> tuple[Source, Writer, Engine]:
    """Open the volumes as this rank sees them, and load the network.

    Raises:
        UserError: this rank cannot open a volume, or the network does not load.
    """
    mask = None
    if job.mask_handle is not None:
        mask = Reader.reopen(job.mask_handle, num_threads=request.threads)
    source = Source(
        volume=Reader.reopen(job.volume_handle, num_threads=request.threads),
        pad=job.config.input.pad,
        mask=mask,
        mask_grid=job.mask_grid,
    )
    writer = open_output(job.output, num_threads=request.threads)
    engine = get_backend(job.config.model.backend).load(job.config.model, request)
    return source, writer, engine


def _lead(
    comm: Communicator,
    job: Job,
    bindings: Bindings,
    todo: npt.NDArray[np.bool_],
    journal: Journal,
    sound: Sequence[int],
    started: float,
    *,
    is_first: bool,
) -> Lead:
    """Return the second role of the coordinator: of the first one, or of one that takes over."""
    num_before = len(todo) - int(np.count_nonzero(todo))
    schedule = job.config.schedule
    scheduler = Scheduler(
        len(job.plan),
        ranks=[rank for rank in comm.alive if rank in sound],
        done=~todo if is_first else journal.states == State.DONE,
        mode=schedule.mode if is_first else "dynamic",
        max_attempts=schedule.max_attempts,
    )
    if not is_first:
        scheduler.recall(*read_tries(journal.path))
    display = get_display(
        rank=0,
        size=comm.size,
        num_blocks=len(todo),
        num_before=num_before,
        start=started,
        stream=sys.stderr,
    )
    tempo = Tempo(schedule.min_lease_seconds)
    return Lead(
        coordinator=_coordinator(job, bindings, journal, scheduler, tempo),
        vigil=Vigil(comm.alive, tempo, time.monotonic()),
        attendance=Attendance(
            comm.alive,
            Heartbeat(display, journal.append_beat, interval=BEAT_SECONDS),
            num_done=lambda: scheduler.num_done - num_before,
        ),
    )


def _coordinator(
    job: Job, bindings: Bindings, journal: Journal, scheduler: Scheduler, tempo: Tempo
) -> Coordinator:
    """Return what leases and journals."""
    schedule = job.config.schedule
    grid = job.plan.grid
    hosts = {binding.rank: binding.host for binding in bindings.ranks}
    breaker = Breaker(
        size=len(bindings.ranks), max_consecutive_failures=schedule.max_consecutive_failures
    )
    return Coordinator(
        scheduler,
        journal,
        core_of=grid.__getitem__,
        hosts=hosts,
        breaker=breaker,
        tempo=tempo,
    )


def _log_summary(lead: Lead, todo: npt.NDArray[np.bool_], seconds: float) -> None:
    """Tell what all ranks have done."""
    summary = summarise(
        lead.attendance.vectors,
        num_blocks=len(todo),
        num_before=len(todo) - int(np.count_nonzero(todo)),
        num_done=lead.attendance.num_done,
        seconds=seconds,
    )
    for line in summary.splitlines():
        log.info("%s", line)
