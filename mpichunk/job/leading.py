"""The coordinator's part of a run, put together: of the first one, and of one that takes over.

Lock and journal, scheduler, breaker, detector of hangs. Decides nothing and calls no collective.
"""

import logging
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mpichunk.job.display import get_display, summarise
from mpichunk.job.forward_probe import write_peak
from mpichunk.job.startup import Job, open_journal
from mpichunk.plan.fingerprint import Fingerprint
from mpichunk.plan.prediction import Forecast, format_outcome
from mpichunk.plan.probe import Peak
from mpichunk.process import Process
from mpichunk.ranks.communicator import Communicator
from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.monitor import CoordinatorRole
from mpichunk.rundir.history import read_tries
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.lock import RunLock
from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.hang import BlockDurations, HangDetector
from mpichunk.schedule.messages import State
from mpichunk.schedule.progress import JournaledDisplay, totals
from mpichunk.schedule.scheduler import Scheduler
from mpichunk.schedule.staticrun import static_blocks

HEARTBEAT_SECONDS = 30.0
"""How often the journal notes that the run is alive."""

log = logging.getLogger(__name__)


class JournalKeeper:
    """Holds the lock and the journal, on the coordinator; both are let go with the stack."""

    def __init__(
        self,
        comm: Communicator,
        job: Job,
        fingerprint: Fingerprint,
        processes: Iterable[Process],
        stack: ExitStack,
    ) -> None:
        self.job = job
        """What is computed."""

        self.journal: Journal | None = None
        """Open for writing, on the coordinator only."""

        self._comm = comm
        self._fingerprint = fingerprint
        self._processes = tuple(processes)
        self._stack = stack

    def lock(self) -> RunLock:
        """Take the run directory."""
        run_dir, job = self.job.run_dir, self._comm.job
        lock = RunLock.acquire(run_dir, processes=self._processes, job=job)
        return self._stack.enter_context(lock)

    def open(self, lock: RunLock, *, fresh: bool = False) -> Journal:
        """Begin the journal, or go on with it."""
        journal = open_journal(self.job, self._fingerprint, fresh=fresh, guard=lock.check)
        self.journal = self._stack.enter_context(journal)
        return journal


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSetup:
    """What every rank must know to become the coordinator."""

    comm: Communicator
    """The ranks."""

    job: Job
    """What is computed."""

    todo: npt.NDArray[np.bool_]
    """(num_blocks,) whether a block was still to be computed at the start."""

    sound: tuple[int, ...]
    """The ranks that compute right."""

    expected: Forecast | None = None
    """What the blocks of this start were expected to take."""

    started: float = field(default_factory=time.monotonic)
    """Monotonic seconds."""

    @property
    def num_before(self) -> int:
        """Blocks that earlier runs have done."""
        return len(self.todo) - int(np.count_nonzero(self.todo))

    @property
    def own_blocks(self) -> Iterable[int]:
        """With static scheduling, the blocks that are this rank's without asking."""
        if self.job.config.schedule.mode != "static" or self.comm.rank not in self.sound:
            return ()
        return static_blocks(self.todo, len(self.sound), self.sound.index(self.comm.rank))

    def begin(self, journal: Journal) -> CoordinatorRole:
        """Return the second role of the first coordinator."""
        schedule = self.job.config.schedule
        scheduler = Scheduler(
            len(self.job.plan),
            ranks=self.sound,
            done=~self.todo,
            mode=schedule.mode,
            max_attempts=schedule.max_attempts,
        )
        return self._lead(journal, scheduler)

    def take_over(self, journal: Journal) -> CoordinatorRole:
        """Return the second role of a rank that goes on where the journal ends."""
        scheduler = Scheduler(
            len(self.job.plan),
            ranks=[rank for rank in self.comm.alive if rank in self.sound],
            done=journal.states == State.DONE,
            max_attempts=self.job.config.schedule.max_attempts,
        )
        tries = read_tries(journal.path)
        scheduler.recall(tries.failed_on, tries.died_on, tries.given_up)
        return self._lead(journal, scheduler)

    def tell(self, lead: CoordinatorRole) -> None:
        """Tell what all ranks have done."""
        lead.attendance.close()
        vectors, num_done = lead.attendance.vectors, lead.attendance.num_done
        seconds = time.monotonic() - self.started
        summary = summarise(
            vectors,
            num_blocks=len(self.todo),
            num_before=self.num_before,
            num_done=num_done,
            seconds=seconds,
        )
        for line in summary.splitlines():
            log.info("%s", line)
        num_patches = int(totals(vectors.sum(axis=0))["patches"])
        told = format_outcome(
            self.expected, num_done=num_done, num_patches=num_patches, seconds=seconds
        )
        log.info("%s", told)
        most = totals(vectors.max(axis=0))
        nbytes, on_device = int(most["peak_bytes"]), int(most["device_peak_bytes"])
        self._keep_peak(Peak(nbytes=nbytes, device_nbytes=on_device or None))

    def _keep_peak(self, peak: Peak) -> None:
        """Keep what the largest rank took, for `plan`; a run does not fail for that."""
        with suppress(OSError):
            write_peak(self.job.run_dir, self.job.config, self.job.model_files(), peak)

    def _lead(self, journal: Journal, scheduler: Scheduler) -> CoordinatorRole:
        comm, schedule, num_before = self.comm, self.job.config.schedule, self.num_before
        durations = BlockDurations(schedule.min_lease_seconds)
        display = get_display(
            size=comm.size,
            num_blocks=len(self.todo),
            num_before=num_before,
            start=self.started,
            stream=sys.stderr,
        )
        return CoordinatorRole(
            coordinator=Coordinator(
                scheduler,
                journal,
                core_of=self.job.plan.grid.__getitem__,
                hosts=comm.hosts,
                breaker=Breaker(
                    num_ranks=len(scheduler.ranks),
                    max_consecutive_failures=schedule.max_consecutive_failures,
                ),
                durations=durations,
            ),
            detector=HangDetector(comm.alive, durations, time.monotonic()),
            attendance=Attendance(
                comm.alive,
                JournaledDisplay(display, journal.append_beat, interval=HEARTBEAT_SECONDS),
                # Asked again and again: a difference of numbers, not a count of all blocks.
                num_done=lambda: scheduler.num_done - num_before,
            ),
        )
