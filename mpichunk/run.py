"""The `run` verb: the one place that knows every part, and puts them together in order.

Decides nothing itself:

    rank 0          config, volumes, plan                -> every rank
    every rank      devices and threads                  -> all ranks decide alike
    rank 0          what earlier starts have left        -> every rank
    every rank      loads the network, one forward
    rank 0          output, journal, run directory       -> every rank sees them, opens the volumes
    every rank      blocks, until all have ended
    rank 0          summary, coverage                    -> one exit code
"""

import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from glob import glob
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpichunk.agreement import on_every_rank, on_rank_0
from mpichunk.backends import get_backend
from mpichunk.binding import Binding, Bindings, RankFacts, bind, gpu_hints
from mpichunk.comm import Communicator, crash_guard, start_mpi
from mpichunk.config import Config
from mpichunk.configfile import LoadedConfig, load_config
from mpichunk.coordinator import Coordinator
from mpichunk.engine import Engine, EngineRequest
from mpichunk.errors import ExitCode, UserError
from mpichunk.estimate import BLOCKS_IN_FLIGHT
from mpichunk.fingerprint import Fingerprint
from mpichunk.inference import BlockInference, check_engine, scaling_for
from mpichunk.journal import Journal
from mpichunk.launcher import check_world_size
from mpichunk.lock import RunLock, this_process
from mpichunk.logs import close_logs, log_to_file, log_to_terminal
from mpichunk.loop import Pulse, serve
from mpichunk.messages import Records
from mpichunk.pipeline import Pipeline, Source
from mpichunk.progress import Counters, Display, Heartbeat, get_display, summarise
from mpichunk.scheduler import Scheduler, static_blocks
from mpichunk.startup import (
    Job,
    changed_versions,
    check_sight,
    find_todo,
    library_versions,
    open_journal,
    prepare,
    threads_of_earlier_start,
    write_run_files,
)
from mpichunk.status import MOST_FAILURES_SHOWN, read_status
from mpichunk.volume import Reader, Writer, create_output, open_output
from mpichunk.worker import Worker

PROGRESS_SECONDS = 5.0
"""How often ranks that work contribute to the progress."""

BEAT_SECONDS = 30.0
"""How often the journal notes that the run is alive."""

log = logging.getLogger(__name__)


def run(config_path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run a config, or what an earlier run of it left; return the exit code.

    To be called by every rank.
    """
    return run_on(start_mpi(), config_path, overrides, fresh=fresh)


def run_on(
    comm: Communicator, config_path: Path, overrides: Sequence[str] = (), *, fresh: bool = False
) -> int:
    """Do what `run` does, on the ranks given. Only rank 0 prints the user's mistakes."""
    log_to_terminal(comm.rank)
    with crash_guard(comm):
        try:
            return _run(comm, config_path, overrides, fresh=fresh)
        except UserError as error:
            if comm.rank == 0:
                print(f"mpichunk: {error}", file=sys.stderr)
            return ExitCode.USER_ERROR
        finally:
            close_logs()


def _run(comm: Communicator, config_path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run it, or raise the same UserError on every rank."""
    check_world_size(comm.size, os.environ)
    loaded = on_rank_0(comm, lambda: load_config(config_path, overrides))
    try:
        return _run_config(comm, loaded, fresh=fresh)
    except UserError as error:
        raise loaded.locate_error(error) from None


def _run_config(comm: Communicator, loaded: LoadedConfig, *, fresh: bool) -> int:
    """Do all that the module's docstring lists. Nothing is written before all is checked."""
    job = on_rank_0(comm, lambda: prepare(loaded.config))
    bindings = _bind(comm, job, fresh=fresh)
    found = on_rank_0(comm, lambda: find_todo(job, bindings, fresh=fresh))
    todo = found.unpack(len(job.plan))
    if todo.any():
        if comm.rank == 0:
            _log_start(comm, loaded, job, bindings)
        request = _request(job, bindings.ranks[comm.rank])
        engine = on_every_rank(comm, lambda: _load(job, request))
        with ExitStack() as stack:
            journal = _open_run(comm, stack, loaded.config, job, found.fingerprint, fresh=fresh)
            if journal is not None:
                _note_start(journal, bindings)
            source, writer = on_every_rank(comm, lambda: _open_volumes(stack, job, request))
            inference = _inference(job, engine, request)
            _compute(comm, job, bindings, todo, journal, (source, inference, writer))
    return on_rank_0(comm, lambda: _conclude(job))


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


def _open_run(
    comm: Communicator,
    stack: ExitStack,
    config: Config,
    job: Job,
    fingerprint: Fingerprint,
    *,
    fresh: bool,
) -> Journal | None:
    """Begin or go on with the run directory and the output; return the journal on rank 0.

    Raises:
        UserError: they cannot be written, or a rank does not see them.
    """
    ledger: list[Journal] = []

    def begin() -> str:
        stack.enter_context(RunLock.acquire(job.run_dir, processes=processes))
        create_output(job.output, sources=job.sources)
        ledger.append(stack.enter_context(open_journal(job, fingerprint, fresh=fresh)))
        return write_run_files(config, job)

    processes = comm.allgather(this_process())
    nonce = on_rank_0(comm, begin)
    on_every_rank(comm, lambda: check_sight(job.run_dir, nonce, host=comm.host))
    on_every_rank(comm, lambda: log_to_file(job.run_dir, comm.rank))
    return ledger[0] if ledger else None


def _log_start(comm: Communicator, loaded: LoadedConfig, job: Job, bindings: Bindings) -> None:
    """Tell what is about to run."""
    ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''}"
    log.info("%s, MPI: %s; run directory %s", ranks, comm.library, job.run_dir)
    for line in bindings.table.splitlines():
        log.info("%s", line)
    for warning in (*loaded.warnings(), *bindings.warnings):
        log.warning("%s", warning)


def _note_start(journal: Journal, bindings: Bindings) -> None:
    """Note this start in the journal, and what has changed since the first."""
    for change in changed_versions(journal.header, library_versions()):
        log.warning("%s", change)
    journal.append_start(
        {
            "num_ranks": len(bindings.ranks),
            "hosts": sorted({binding.host for binding in bindings.ranks}),
            "device_kinds": list(bindings.device_kinds),
            "threads": bindings.ranks[0].threads,
        }
    )
    journal.sync()


def _compute(
    comm: Communicator,
    job: Job,
    bindings: Bindings,
    todo: npt.NDArray[np.bool_],
    journal: Journal | None,
    parts: tuple[Source, BlockInference, Writer],
) -> None:
    """Compute the blocks still to do: this rank's part of it, until all ranks have ended."""
    source, inference, writer = parts
    records: Records = queue.SimpleQueue()
    wake = threading.Event()
    counters = Counters()
    started = time.monotonic()
    display = _display(comm, todo, journal, started)
    own_blocks: Iterable[int] = ()
    if job.config.schedule.mode == "static":
        own_blocks = static_blocks(todo, comm.size, comm.rank)
    pipeline = Pipeline(
        plan=job.plan,
        source=source,
        inference=inference,
        writer=writer,
        num_channels=job.config.model.out_channels,
        dtype=job.output.dtype,
        records=records,
        wake=wake,
    )
    with pipeline:
        serve(
            comm,
            Worker(pipeline, records, counters, depth=BLOCKS_IN_FLIGHT, own_blocks=own_blocks),
            _coordinator(job, bindings, todo, journal) if journal is not None else None,
            Pulse(comm, counters, display, interval=PROGRESS_SECONDS),
            wake=wake,
        )
    display.close()
    # Linux counts in KiB.
    counters["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    vectors = comm.gather(counters.vector)
    if vectors is not None:
        _log_summary(np.array(vectors), todo, time.monotonic() - started)


def _display(
    comm: Communicator, todo: npt.NDArray[np.bool_], journal: Journal | None, started: float
) -> Display:
    """Return what shows the progress and, on rank 0, notes in the journal that the run is alive."""
    display = get_display(
        rank=comm.rank,
        size=comm.size,
        num_blocks=len(todo),
        num_before=len(todo) - int(np.count_nonzero(todo)),
        start=started,
        stream=sys.stderr,
    )
    if journal is None:
        return display
    return Heartbeat(display, journal.append_beat, interval=BEAT_SECONDS)


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


def _load(job: Job, request: EngineRequest) -> Engine:
    """Load the network and run one batch through it.

    Raises:
        UserError: it does not load or does not fit.
    """
    engine = get_backend(job.config.model.backend).load(job.config.model, request)
    check_engine(engine, request)
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
    return engine


def _open_volumes(stack: ExitStack, job: Job, request: EngineRequest) -> tuple[Source, Writer]:
    """Open the volumes as this rank sees them.

    Raises:
        UserError: this rank cannot open one.
    """
    num_threads = request.threads
    mask = None
    if job.mask_handle is not None:
        mask = stack.enter_context(Reader.reopen(job.mask_handle, num_threads=num_threads))
    source = Source(
        volume=stack.enter_context(Reader.reopen(job.volume_handle, num_threads=num_threads)),
        pad=job.config.input.pad,
        mask=mask,
        mask_grid=job.mask_grid,
    )
    return source, open_output(job.output, num_threads=num_threads)


def _inference(job: Job, engine: Engine, request: EngineRequest) -> BlockInference:
    """Return what turns a block's raw voxels into its core."""
    config = job.config
    return BlockInference(
        engine,
        request,
        scaling=scaling_for(job.volume.dtype, config.input.normalize),
        window_name=config.patch.window,
        activation=config.model.activation,
        skip_blank=config.model.skip_blank,
    )


def _coordinator(
    job: Job, bindings: Bindings, todo: npt.NDArray[np.bool_], journal: Journal
) -> Coordinator:
    """Return rank 0's second role."""
    schedule = job.config.schedule
    scheduler = Scheduler(
        len(job.plan),
        size=len(bindings.ranks),
        done=~todo,
        mode=schedule.mode,
        max_attempts=schedule.max_attempts,
    )
    grid = job.plan.grid
    hosts = [binding.host for binding in bindings.ranks]
    return Coordinator(scheduler, journal, core_of=grid.__getitem__, hosts=hosts)


def _log_summary(
    vectors: npt.NDArray[np.float64], todo: npt.NDArray[np.bool_], seconds: float
) -> None:
    """Tell what all ranks have done."""
    num_before = len(todo) - int(np.count_nonzero(todo))
    summary = summarise(vectors, num_blocks=len(todo), num_before=num_before, seconds=seconds)
    for line in summary.splitlines():
        log.info("%s", line)


def _conclude(job: Job) -> ExitCode:
    """Read the journal once more, and let what it proves decide the exit code."""
    found = read_status(job.run_dir)
    if found.exit_code == ExitCode.ALL_DONE:
        log.info("all %d blocks are done", found.num_blocks)
    for failure in found.failures[:MOST_FAILURES_SHOWN]:
        log.error("block %d, %s, failed: %s", failure.block, failure.core, failure.message)
    if found.num_failed:
        log.error(
            "%d of %d blocks failed; `python -m mpichunk status` lists them, running again tries "
            "them again",
            found.num_failed,
            found.num_blocks,
        )
    return found.exit_code
