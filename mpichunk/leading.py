"""The coordinator's part of a run, put together: of the first one, and of one that takes over.

Knows the parts, decides nothing and calls no collective.
"""

import logging
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mpichunk.attendance import Attendance
from mpichunk.breaker import Breaker
from mpichunk.communicator import Communicator
from mpichunk.coordinator import Coordinator
from mpichunk.history import read_tries
from mpichunk.journal import Journal
from mpichunk.messages import State
from mpichunk.progress import Heartbeat, get_display, summarise
from mpichunk.scheduler import Scheduler
from mpichunk.sentry import Lead
from mpichunk.startup import Job
from mpichunk.status import QUIET_SECONDS
from mpichunk.vigil import Tempo, Vigil

BEAT_SECONDS = QUIET_SECONDS / 5
"""How often the journal notes that the run is alive."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """What every rank must know to become the coordinator."""

    comm: Communicator
    """The ranks."""

    job: Job
    """What is computed."""

    todo: npt.NDArray[np.bool_]
    """(num_blocks,) whether a block was still to be computed at the start."""

    sound: tuple[int, ...]
    """The ranks that compute right."""

    started: float = field(default_factory=time.monotonic)
    """Monotonic seconds."""

    @property
    def num_before(self) -> int:
        """Blocks that earlier runs have done."""
        return len(self.todo) - int(np.count_nonzero(self.todo))

    def begin(self, journal: Journal) -> Lead:
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

    def take_over(self, journal: Journal) -> Lead:
        """Return the second role of a rank that goes on where the journal ends."""
        scheduler = Scheduler(
            len(self.job.plan),
            ranks=[rank for rank in self.comm.alive if rank in self.sound],
            done=journal.states == State.DONE,
            max_attempts=self.job.config.schedule.max_attempts,
        )
        scheduler.recall(*read_tries(journal.path))
        return self._lead(journal, scheduler)

    def end(self, lead: Lead) -> None:
        """Tell what all ranks have done."""
        lead.attendance.close()
        summary = summarise(
            lead.attendance.vectors,
            num_blocks=len(self.todo),
            num_before=self.num_before,
            num_done=lead.attendance.num_done,
            seconds=time.monotonic() - self.started,
        )
        for line in summary.splitlines():
            log.info("%s", line)

    def _lead(self, journal: Journal, scheduler: Scheduler) -> Lead:
        comm, schedule = self.comm, self.job.config.schedule
        tempo = Tempo(schedule.min_lease_seconds)
        display = get_display(
            rank=0,
            size=comm.size,
            num_blocks=len(self.todo),
            num_before=self.num_before,
            start=self.started,
            stream=sys.stderr,
        )
        return Lead(
            coordinator=Coordinator(
                scheduler,
                journal,
                core_of=self.job.plan.grid.__getitem__,
                hosts=comm.hosts,
                breaker=Breaker(
                    size=comm.size, max_consecutive_failures=schedule.max_consecutive_failures
                ),
                tempo=tempo,
            ),
            vigil=Vigil(comm.alive, tempo, time.monotonic()),
            attendance=Attendance(
                comm.alive,
                Heartbeat(display, journal.append_beat, interval=BEAT_SECONDS),
                num_done=lambda: scheduler.num_done - self.num_before,
            ),
        )
