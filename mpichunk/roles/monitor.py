"""Looks after ranks that hang or have ended without a word, on every rank and for the coordinator.

    every rank      the process of one neighbour, and whether the coordinator is heard of
    coordinator     steps of every rank -> kill, give up, go on without

Decides by `schedule.hang`; sends through the loop. Knows no blocks.
"""

import logging
import threading
import time
from dataclasses import dataclass

from mpichunk.errors import ExitCode, MustEnd
from mpichunk.ranks.communicator import Communicator
from mpichunk.ranks.neighbours import Neighbours
from mpichunk.ranks.recovery import Watchdog
from mpichunk.roles.coordinator import Coordinator
from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.hang import KILL_SECONDS, HangDetector
from mpichunk.schedule.messages import CoordinatorHeartbeat, Heartbeat, Kill, Message, ProcessGone
from mpichunk.schedule.progress import totals

LOOK_SECONDS = 1.0
"""How often the ranks are looked after."""

GONE_SECONDS = 3.0
"""How long MPI may take to say that a process has died."""

PAUSE_SECONDS = 2.0
"""A turn that took so long: this process was stopped, or its machine slept."""

STANDSTILL_FACTOR = 3.0
"""The job ends when no rank at all has moved for so many times what a step may take."""

CHANGE = 0.25
"""By how much at least what a lease may take must have changed to be told at once."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorRole:
    """The second role of the lowest rank."""

    coordinator: Coordinator
    """Leases and journals."""

    attendance: Attendance
    """Knows when all have ended."""

    detector: HangDetector
    """Knows who moves."""


class Monitor:
    """What every rank watches.

    Args:
        comm: The ranks.
        neighbours: Their processes, as far as they can be seen from here.
        silence_seconds: How long the coordinator may be silent.
        interval: How often at least the coordinator gives a sign of life.
    """

    def __init__(
        self,
        comm: Communicator,
        neighbours: Neighbours,
        *,
        silence_seconds: float = float("inf"),
        interval: float = 5.0,
    ) -> None:
        self._comm = comm
        self._neighbours = neighbours
        self._silence_seconds = silence_seconds
        self._interval = interval
        self._next_look = float("-inf")
        self._next_word = float("-inf")
        self._last_turn = float("inf")
        self._blind_until = float("-inf")
        self._has_told_standstill = False
        self._gone: tuple[int, float] | None = None
        self._heard: float | None = None
        self._lease_seconds = float("inf")
        self._has_killed = False

    def again(self) -> None:
        """Begin anew with the ranks that are left."""
        self._gone, self._heard, self._has_killed = None, None, False
        self._next_word = float("-inf")

    def hear(self, now: float) -> None:
        """Take in a sign of life of the coordinator: whatever it sends."""
        self._heard, self._has_killed = now, False

    def kill(self, rank: int) -> None:
        """End the process of a rank of this machine, perhaps this one, which hangs."""
        if rank == self._comm.rank:
            self._comm.die(ExitCode.UNEXPECTED)
        self._neighbours.kill(rank)

    def step(
        self,
        lead: CoordinatorRole | None,
        now: float,
        *,
        is_asked_to_end: bool,
        disk_seconds: float = 0.0,
    ) -> list[tuple[int, Message]]:
        """Look after the others if it is time to; return what is to be sent.

        Args:
            lead: The second role, on the coordinator.
            now: When this turn began, seconds.
            is_asked_to_end: Whether this process was just asked to end.
            disk_seconds: What the journal has taken of this turn: a slow disk is no sleep.

        Raises:
            MustEnd: the job cannot go on.
        """
        has_slept = now - self._last_turn > PAUSE_SECONDS
        self._last_turn = now + disk_seconds
        if has_slept:
            # What happened meanwhile is no longer this process's to judge.
            self._blind_until = now + LOOK_SECONDS
            self.again()
            if lead is not None:
                lead.detector.forgive(now)
        # A launcher that loses a rank asks the others to end and kills them a moment later: look
        # now, or nobody is left to say which rank has died.
        is_due = now >= self._next_look
        if now < self._blind_until or not (is_due or is_asked_to_end):
            return []
        outgoing: list[tuple[int, Message]] = [
            (self._comm.coordinator, gone) for gone in self._look_beside(now)
        ]
        if not is_due:
            return outgoing
        self._next_look = now + min(LOOK_SECONDS, self._interval)
        if lead is None:
            self._look_up(now)
        else:
            outgoing += self._look_after(lead, now)
        return outgoing

    def _look_beside(self, now: float) -> list[ProcessGone]:
        """Look whether the next process on this machine lives."""
        comm = self._comm
        rank = self._neighbours.next_is_gone(comm.alive)
        if rank is None:
            self._gone = None
            return []
        if not comm.is_fault_tolerant:
            raise MustEnd(
                f"{self._name(rank)} has died, and this MPI cannot go on without it; nothing that "
                "is in the journal is lost: run the same again to resume",
                ExitCode.UNEXPECTED,
            )
        if self._gone is None or self._gone[0] != rank:
            self._gone = rank, now
        if now - self._gone[1] < GONE_SECONDS:
            return []
        if rank == comm.coordinator:
            raise MustEnd(
                f"{self._name(rank)} has ended by itself, which MPI does not report to the others; "
                "run the same again to resume",
                ExitCode.UNEXPECTED,
            )
        return [ProcessGone(rank=rank)]

    def _look_up(self, now: float) -> None:
        """Look whether the coordinator is heard of; end it if not, and if that can be."""
        comm = self._comm
        self._heard = now if self._heard is None else self._heard
        seconds = now - self._heard
        if seconds <= self._silence_seconds:
            return
        can_kill = self._neighbours.see(comm.coordinator)
        if can_kill and comm.is_fault_tolerant and not self._has_killed:
            self._has_killed = True
            self._tell_hung(comm.coordinator, seconds)
            self.kill(comm.coordinator)
        if seconds > self._silence_seconds + KILL_SECONDS:
            raise MustEnd(
                f"{self._name(comm.coordinator)}, the coordinator, has not been heard of for "
                f"{seconds:.0f} s; run the same again to resume",
                ExitCode.UNEXPECTED,
            )

    def _look_after(self, lead: CoordinatorRole, now: float) -> list[tuple[int, Message]]:
        """Find the ranks that hang, and let all hear what a lease may take."""
        comm, outgoing = self._comm, list[tuple[int, Message]]()
        is_ending = lead.coordinator.ending is not None
        if not is_ending:
            self._look_at_all(lead, now)
        for rank in lead.detector.new_hung(now, is_ending=is_ending):
            self._tell_hung(rank, lead.detector.durations.lease_seconds)
            if comm.is_fault_tolerant and comm.size > 1:
                outgoing += [(killer, Kill(rank=rank)) for killer in self._killers(rank, lead)]
        for rank in lead.detector.new_given_up(now, can_die=comm.is_fault_tolerant):
            log.error(
                "%s cannot be left behind; the others compute its blocks, and then the job is "
                "ended by force",
                self._name(rank),
            )
            lead.coordinator.give_up_rank(rank)
            lead.attendance.excuse(rank)
        word = CoordinatorHeartbeat(lease_seconds=lead.detector.durations.lease_seconds)
        change = abs(word.lease_seconds - self._lease_seconds)
        if now >= self._next_word or change > CHANGE * word.lease_seconds:
            self._next_word = now + self._interval
            self._lease_seconds = word.lease_seconds
            # This rank, too: its pipeline may stand still while its main thread takes turns.
            outgoing += [(rank, word) for rank in sorted(set(comm.alive) - lead.detector.given_up)]
        return outgoing

    def _look_at_all(self, lead: CoordinatorRole, now: float) -> None:
        """Tell when no rank moves, and end the job when that goes on."""
        seconds, limit = (
            lead.detector.standstill_seconds(now),
            lead.detector.durations.lease_seconds,
        )
        if seconds <= limit:
            self._has_told_standstill = False
            return
        if seconds > STANDSTILL_FACTOR * limit:
            raise MustEnd(
                f"no rank has moved for {seconds:.0f} s; when the file systems of input and output "
                "are well, run the same again to resume",
                ExitCode.UNEXPECTED,
            )
        if not self._has_told_standstill:
            self._has_told_standstill = True
            log.error(
                "no rank has moved for %.0f s: is a file system down? Waiting until %.0f s",
                seconds,
                STANDSTILL_FACTOR * limit,
            )

    def _killers(self, rank: int, lead: CoordinatorRole) -> list[int]:
        """Return who is to end a rank: one on its machine, and itself should it be able to."""
        hung = lead.detector.hung
        able = [r for r in self._neighbours.of(rank) if r in self._comm.alive and r not in hung]
        return [*able[:1], rank]

    def _tell_hung(self, rank: int, seconds: float) -> None:
        log.error("%s hangs: no step for %.0f s", self._name(rank), seconds)

    def _name(self, rank: int) -> str:
        """Return a rank as the user may look for it."""
        host = self._comm.hosts.get(rank, "an unknown host")
        return f"rank {rank} on {host} (process {self._neighbours.pid(rank)})"


def watch_stopped(
    neighbours: Neighbours, watchdog: Watchdog, *, seconds: float, rank: int
) -> threading.Thread:
    """Kill ranks of this machine that a signal has stopped while others wait for them for long.

    In a thread, since the main thread waits in a collective.

    Args:
        neighbours: The processes.
        watchdog: Runs while ranks wait for one another.
        seconds: What is long.
        rank: This rank.
    """

    def watch() -> None:
        suspects: set[int] = set()
        while True:
            time.sleep(min(LOOK_SECONDS, seconds / 2))
            since = watchdog.running_since
            if since is None or time.monotonic() - since < seconds:
                suspects = set()
                continue
            # Twice: when the whole job was stopped, the others are about to go on, too.
            stopped = set(neighbours.stopped())
            for other in stopped & suspects:
                log.error("rank %d is stopped (process %d)", other, neighbours.pid(other))
                neighbours.kill(other)
            suspects = stopped

    thread = threading.Thread(target=watch, name=f"watch-{rank}", daemon=True)
    thread.start()
    return thread


def note_heartbeat(lead: CoordinatorRole, rank: int, beat: Heartbeat, now: float) -> None:
    """Take in a sign of life, on the coordinator."""
    lead.attendance.note(rank, beat, now)
    counters = totals(beat.counters)
    if counters["ended"]:
        lead.detector.excuse(rank)
        lead.coordinator.note_end(rank)
        return
    if lead.detector.note(rank, counters["steps"], now, is_idle=not counters["held"]):
        log.warning("rank %d moves again", rank)
        lead.coordinator.welcome_back(rank)
        lead.attendance.readmit(rank)
