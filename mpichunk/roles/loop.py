"""The main thread of a rank while blocks are computed: receive, decide, send, sleep.

Joins the roles to the ranks; knows no policy and nothing of how a block is computed. It works in
turns. When a turn finds nothing to do the next one comes later and later, up to 40 ms, unless the
pipeline wakes it: an idle rank leaves its core alone.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mpichunk.errors import ExitCode, MustEnd, RankLost, StartOver
from mpichunk.ranks.communicator import Communicator
from mpichunk.ranks.crash import crash
from mpichunk.ranks.recovery import Watchdog, regroup
from mpichunk.roles.drain import DrainWatch
from mpichunk.roles.monitor import CoordinatorRole, Monitor, note_heartbeat
from mpichunk.roles.worker import Holding, Worker
from mpichunk.schedule.messages import (
    FINISHED,
    AskToWrite,
    Drain,
    Heartbeat,
    Kill,
    Leave,
    Message,
    ProcessGone,
    ToCoordinator,
    ToWorker,
    WriteVerdict,
)
from mpichunk.schedule.progress import Counters

SHORTEST_NAP_SECONDS = 0.0002
LONGEST_NAP_SECONDS = 0.04
LONGEST_NAP_OF_COORDINATOR_SECONDS = 0.02
FIRST_HEARTBEAT_SECONDS = 0.1
FAREWELL_SECONDS = 5.0

log = logging.getLogger(__name__)


class Heartbeats:
    """The signs of life of one rank, and how it learns that all have ended.

    A rank sends its counters every `interval` seconds, more often at first, and at once when it has
    ended. When all have ended the coordinator lets everybody leave, so that none leaves a message
    behind.
    """

    def __init__(self, counters: Counters, *, interval: float) -> None:
        self._counters = counters
        self._most_seconds = interval
        self._interval = min(FIRST_HEARTBEAT_SECONDS, interval)
        self._next = float("-inf")
        self._is_ended = False

        self.is_over = False
        """Whether all have ended."""

        self.abort_code: int | None = None
        """Exit code of a job that must be ended by force."""

    def step(self, now: float, *, is_ended: bool) -> list[Heartbeat]:
        """Return a sign of life if it is time for one."""
        # After the last one there must be none: nobody would receive it.
        if self._is_ended or (now < self._next and not is_ended):
            return []
        self._next = now + self._interval
        self._interval = min(2 * self._interval, self._most_seconds)
        self._is_ended = is_ended
        self._counters["ended"] = is_ended
        self._counters.measure_memory()
        return [Heartbeat(counters=tuple(self._counters.vector.tolist()))]

    def again(self) -> None:
        """Begin with the next step, for a coordinator that has not heard of this rank."""
        self._next = float("-inf")
        self._is_ended = False


@dataclass(slots=True, kw_only=True)
class Loop:
    """The turns of one rank's main thread, until every rank has ended.

    When ranks are lost the others go on: the pipelines with what they compute, the lowest rank as
    coordinator. Any exception ends this rank, and at once: unwinding the stack first could wait for
    threads that wait for other ranks.
    """

    comm: Communicator
    """The ranks."""

    worker: Worker
    """This rank's role."""

    lead: CoordinatorRole | None
    """The second role, on the coordinator only."""

    heartbeats: Heartbeats
    """This rank's signs of life."""

    wake: threading.Event
    """Set by the pipeline's threads when there is a record."""

    monitor: Monitor
    """Watches the others."""

    watch: DrainWatch
    """Says when the run should end early."""

    take_over: Callable[[], CoordinatorRole]
    """Makes the second role for a rank that has become the lowest."""

    conclude: Callable[[CoordinatorRole], int]
    """Returns the exit code, when the job must then be ended by force."""

    watchdog: Watchdog = field(default_factory=Watchdog)
    """Runs while ranks wait for one another; running when `serve` returns."""

    clock: Callable[[], float] = time.monotonic
    """Monotonic seconds."""

    _is_asked_to_end: bool = False

    def serve(self) -> CoordinatorRole | None:
        """Work until every rank has ended; called by the main thread of every rank.

        Returns:
            The second role, if this rank has it at the end.

        Raises:
            StartOver: ranks were lost, and not all others had come here.
        """
        comm = self.comm
        is_met = True
        try:
            while not (is_met and self.heartbeats.is_over):
                try:
                    if not is_met:
                        self._rejoin()
                        is_met = True
                    self.watchdog.stop()
                    self._work()
                except RankLost:
                    if self.heartbeats.abort_code is not None:
                        comm.abort(self.heartbeats.abort_code)
                    self.watchdog.start()
                    is_met = False
                    if not regroup(comm, is_computing=True):
                        raise StartOver from None
        except StartOver:
            raise
        except BaseException as error:
            if comm.size == 1 and not comm.is_fault_tolerant:
                raise
            crash(comm, error)
        self.watchdog.start()
        return self.lead

    def _work(self) -> None:
        """Take turns until every rank has ended."""
        nap = SHORTEST_NAP_SECONDS
        is_lead = self.lead is not None
        longest = LONGEST_NAP_OF_COORDINATOR_SECONDS if is_lead else LONGEST_NAP_SECONDS
        try:
            while not self.heartbeats.is_over:
                # Cleared before looking: what comes while we look sets it again.
                self.wake.clear()
                if self._turn(self.clock()):
                    nap = SHORTEST_NAP_SECONDS
                else:
                    self.wake.wait(nap)
                    nap = min(2 * nap, longest)
        except MustEnd as end:
            sys.stderr.write(f"mpichunk: {end}\n")
            self.heartbeats.abort_code = end.code
            self._tell_all(Leave(code=end.code))
        self._see_off()

    def _rejoin(self) -> None:
        """Tell the coordinator, which may be a new one, what this rank holds.

        Raises:
            RankLost: another rank was lost meanwhile; then all of this is to be done again.
        """
        comm = self.comm
        # A rank may be lost while the coordinator lets all go: some know by now, and others do not.
        lets_go = self.lead is not None and self.heartbeats.is_over
        told = comm.allgather((comm.rank, self.worker.rejoin(), lets_go))
        self.heartbeats.is_over = any(is_over for *_, is_over in told)
        if self.heartbeats.is_over:
            return
        holdings: dict[int, Holding] = {rank: holding for rank, holding, _ in told}
        self.heartbeats.again()
        self.monitor.again()
        if not comm.is_coordinator:
            return
        if self.lead is None:
            self.lead = self.take_over()
        held = {rank: holding.leases for rank, holding in holdings.items()}
        writing = {rank: holding.writing for rank, holding in holdings.items()}
        stops = [holding.stop for holding in holdings.values() if holding.stop is not None]
        early = next((stop for stop in stops if stop.reason != FINISHED), None)
        idle = {rank for rank, holding in holdings.items() if holding.is_idle}
        now = self.clock()
        self.lead.coordinator.regroup(held, now, writing=writing, ending=early, idle=idle)
        self.lead.attendance.regroup(comm.alive)
        self.lead.detector.regroup(comm.alive, now)

    def _turn(self, now: float) -> bool:
        """Do all that can be done without waiting; return whether there was anything."""
        comm, lead = self.comm, self.lead
        disk_before = 0.0 if lead is None else lead.coordinator.disk_seconds
        arrived = comm.receive()
        for source, messages in arrived:
            if source == comm.coordinator:
                self.monitor.hear(now)
            for message in messages:
                self._deliver(source, message, now)
        if self.heartbeats.is_over:
            # Nobody receives any more.
            return True
        outgoing: list[tuple[int, Message]] = [(comm.coordinator, m) for m in self._say(now)]
        disk_seconds = 0.0
        if lead is not None:
            outgoing += lead.coordinator.assign(now)
            outgoing += lead.coordinator.commit(now)
            disk_seconds = lead.coordinator.disk_seconds - disk_before
        outgoing += self.monitor.step(
            lead, now, is_asked_to_end=self._is_asked_to_end, disk_seconds=disk_seconds
        )
        num_sent = _send(comm, outgoing)
        # Only then looked at: of many ranks many messages are on their way.
        is_ended = self.worker.is_ended and not self._unreceived(lead)
        beats = self.heartbeats.step(now, is_ended=is_ended)
        num_sent += _send(comm, ((comm.coordinator, beat) for beat in beats))
        if lead is not None and lead.attendance.is_over:
            self._let_go(lead)
        return num_sent + len(arrived) > 0

    def _say(self, now: float) -> list[ToCoordinator]:
        """Return what the coordinator must know of this rank."""
        messages = self.worker.step()
        if self.comm.is_coordinator and self.watch.is_time_up:
            raise MustEnd(
                "the allocation ends now; blocks in flight are dropped: run it again to go on",
                ExitCode.DRAINED,
            )
        reason: str | None = None
        if not self.worker.is_stopped:
            reason = self.watch.poll(now, is_leader=self.comm.is_coordinator)
            if reason is not None:
                messages.append(Drain(reason=reason))
        self._is_asked_to_end = reason is not None
        return messages

    def _deliver(self, source: int, message: Message, now: float) -> None:
        """Give a message to the role that it is for."""
        match message:
            case Leave(code=code):
                self.heartbeats.is_over = True
                self.heartbeats.abort_code = code
            case Kill(rank=rank):
                self.monitor.kill(rank)
            case _ if isinstance(message, ToWorker):
                self.worker.handle(message)
            case _:
                assert self.lead is not None, f"rank {source} takes this rank for the coordinator"
                self._deliver_to_lead(self.lead, source, message, now)

    def _deliver_to_lead(
        self, lead: CoordinatorRole, source: int, message: ToCoordinator, now: float
    ) -> None:
        """Give a message to one of those who are the coordinator."""
        match message:
            case Heartbeat():
                note_heartbeat(lead, source, message, now)
            case ProcessGone(rank=rank):
                lead.detector.condemn(rank)
            case AskToWrite(lease=lease):
                may_write = lead.coordinator.may_write(source, lease)
                _send(self.comm, [(source, WriteVerdict(lease=lease, may_write=may_write))])
            case _:
                lead.coordinator.handle(source, message)

    def _unreceived(self, lead: CoordinatorRole | None) -> set[int]:
        """Return who has not yet taken a message, of those who are waited for."""
        unreceived = self.comm.unreceived_by()
        return unreceived if lead is None else unreceived - lead.attendance.excused

    def _let_go(self, lead: CoordinatorRole) -> None:
        """Let everybody leave: in good order, or by force when a rank can neither."""
        code = None
        if lead.attendance.excused:
            code = self.conclude(lead)
            names = ", ".join(map(str, sorted(lead.attendance.excused)))
            log.warning("the job is now ended by force, since rank %s cannot be ended alone", names)
        self.heartbeats.abort_code = code
        self._tell_all(Leave(code=code))

    def _tell_all(self, message: Leave) -> None:
        """Send the others their last message, without waiting for them."""
        self.heartbeats.is_over = True
        excused = self.lead.attendance.excused if self.lead is not None else set[int]()
        others = set(self.comm.alive) - excused - {self.comm.rank}
        _send(self.comm, ((rank, message) for rank in others))

    def _see_off(self) -> None:
        """Wait until the last messages of the coordinator have been received; others have none."""
        comm, code = self.comm, self.heartbeats.abort_code
        end = self.clock() + FAREWELL_SECONDS
        while self.lead is not None and comm.num_unreceived() and self.clock() < end:
            comm.receive()
            time.sleep(SHORTEST_NAP_SECONDS)
        if code is not None:
            comm.abort(code)


def _send(comm: Communicator, outgoing: Iterable[tuple[int, Message]]) -> int:
    """Send each rank what is for it in one parcel; return the number of parcels."""
    parcels: dict[int, list[Message]] = {}
    for dest, message in outgoing:
        parcels.setdefault(dest, []).append(message)
    for dest, messages in parcels.items():
        comm.send(dest, messages)
    return len(parcels)
