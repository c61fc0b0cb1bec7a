"""A rank's share of a run, with a pipeline that computes nothing but takes its time."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpichunk.geometry.box import Box
from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.loop import Heartbeats, Loop
from mpichunk.roles.monitor import CoordinatorRole, Monitor
from mpichunk.roles.worker import Worker
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.hang import BlockDurations, HangDetector
from mpichunk.schedule.messages import Done, Failed, Lease
from mpichunk.schedule.progress import Counters
from mpichunk.schedule.scheduler import Scheduler
from mpichunk.schedule.staticrun import static_blocks
from tests.quiet import nobody_takes_over, patient_breaker, strangers, unasked, unexpected


class SleepingPipeline:
    """One thread that calls `compute` for each lease and reports the outcome."""

    def __init__(self, compute: Callable[[Lease], bool], wake: threading.Event) -> None:
        self.records = queue.SimpleQueue()
        self._compute, self._wake = compute, wake
        self._leases = queue.SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def submit(self, lease):
        self._leases.put(lease)

    num_steps = 0

    def drop_waiting(self):
        dropped = []
        while not self._leases.empty():
            dropped.append(self._leases.get())
        return dropped

    def _run(self):
        while True:
            lease = self._leases.get()
            is_done = self._compute(lease)
            failed = Failed(lease=lease, error="BlockError", message="made to fail")
            self.records.put(record(lease) if is_done else failed)
            self._wake.set()


def record(lease):
    return Done(
        lease=lease,
        num_patches=1,
        num_voxels=1000,
        nbytes_read=1000,
        nbytes_written=1000,
        seconds={"read": 0.0, "infer": 0.001, "write": 0.0},
        checksum="xxh3:0",
    )


@dataclass
class Ran:
    """What one rank has to tell about a run."""

    counters: Counters
    scheduler: Scheduler | None
    seconds: float
    cpu_seconds: float


def run(
    comm,
    *,
    num_blocks,
    compute,
    mode="dynamic",
    done=None,
    max_attempts=3,
    journal=None,
    interval=0.05,
    display=None,
    depth=3,
    watch=None,
):
    """Compute `num_blocks` blocks on the ranks of `comm`; called on every rank."""
    todo = np.ones(num_blocks, bool) if done is None else ~done
    scheduler, lead = None, None
    if comm.is_coordinator:
        scheduler = Scheduler(
            num_blocks, ranks=range(comm.size), done=done, mode=mode, max_attempts=max_attempts
        )
        coordinator = Coordinator(
            scheduler,
            journal or NullJournal(),
            core_of=lambda block: Box.from_shape((block, 0, 0), (1, 1, 1)),
            hosts=dict.fromkeys(comm.alive, comm.host),
            breaker=patient_breaker(comm.size),
            durations=BlockDurations(float("inf")),
        )
        num_before = scheduler.num_done
        attendance = Attendance(
            comm.alive,
            display or NullDisplay(),
            num_done=lambda: scheduler.num_done - num_before,
        )
        detector = HangDetector(comm.alive, BlockDurations(300.0), time.monotonic())
        lead = CoordinatorRole(coordinator=coordinator, attendance=attendance, detector=detector)
    wake, counters = threading.Event(), Counters()
    pipeline = SleepingPipeline(compute, wake)
    own = static_blocks(todo, comm.size, comm.rank) if mode == "static" else ()
    worker = Worker(pipeline, pipeline.records, counters, own_blocks=own, depth=depth)
    heartbeats = Heartbeats(counters, interval=interval)
    comm.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    Loop(
        comm=comm,
        worker=worker,
        lead=lead,
        heartbeats=heartbeats,
        wake=wake,
        monitor=Monitor(comm, strangers(comm.rank, comm.alive)),
        watch=watch or unasked(),
        take_over=nobody_takes_over,
        conclude=unexpected,
    ).serve()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Ran(counters=counters, scheduler=scheduler, seconds=seconds, cpu_seconds=cpu_seconds)


class NullDisplay:
    """Shows nothing."""

    def update(self, summed, now):
        pass

    def close(self):
        pass


class NullJournal(Journal):
    """Keeps nothing."""

    def __init__(self):
        pass

    def append(self, *_, **__):
        pass

    def sync(self):
        return 0.0
