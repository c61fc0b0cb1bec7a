"""The main thread of a rank while blocks are computed: receive, decide, send, sleep.

Joins the roles to the ranks; knows no policy and nothing of how a block is computed. It works in
turns. When a turn finds nothing to do the next one comes later and later, up to 20 ms, unless the
pipeline wakes it: an idle rank leaves its core alone.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable

from mpichunk.communicator import Communicator
from mpichunk.crash import crash
from mpichunk.drain import Watch
from mpichunk.errors import ExitCode, RankLost
from mpichunk.messages import (
    FINISHED,
    Ask,
    Beat,
    Drain,
    Gone,
    Heard,
    Kill,
    Leave,
    Message,
    ToCoordinator,
    ToWorker,
    Verdict,
)
from mpichunk.progress import Counters
from mpichunk.recovery import Fuse, StartOver, regroup
from mpichunk.sentry import Lead, Lookout, MustEnd, note_beat
from mpichunk.worker import Holding, Worker

SHORTEST_NAP_SECONDS = 0.0002
LONGEST_NAP_SECONDS = 0.02
FIRST_BEAT_SECONDS = 0.1
FAREWELL_SECONDS = 5.0


class Pulse:
    """The signs of life of one rank, and how it learns that all have ended.

    A rank sends its counters every `interval` seconds, more often at first, and at once when it has
    ended. When all have ended the coordinator lets everybody leave, so that none leaves a message
    behind.
    """

    def __init__(self, counters: Counters, *, interval: float) -> None:
        self._counters = counters
        self._most_seconds = interval
        self._interval = min(FIRST_BEAT_SECONDS, interval)
        self._next = float("-inf")
        self._is_ended = False

        self.is_over = False
        """Whether all have ended."""

        self.abort_code: int | None = None
        """Exit code of a job that must be ended by force."""

    def step(self, now: float, *, is_ended: bool) -> list[Beat]:
        """Return a sign of life if it is time for one."""
        # After the last one there must be none: nobody would receive it.
        if self._is_ended or (now < self._next and not is_ended):
            return []
        self._next = now + self._interval
        self._interval = min(2 * self._interval, self._most_seconds)
        self._is_ended = is_ended
        self._counters["ended"] = is_ended
        self._counters.measure_memory()
        return [Beat(counters=tuple(self._counters.vector.tolist()))]

    def again(self) -> None:
        """Begin with the next step, for a coordinator that has not heard of this rank."""
        self._next = float("-inf")
        self._is_ended = False


def serve(
    comm: Communicator,
    worker: Worker,
    lead: Lead | None,
    pulse: Pulse,
    *,
    wake: threading.Event,
    watch: Watch | None = None,
    lookout: Lookout | None = None,
    take_over: Callable[[], Lead] | None = None,
    conclude: Callable[[Lead], int] = lambda _: ExitCode.UNEXPECTED,
    fuse: Fuse | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Lead | None:
    """Work until every rank has ended; called by the main thread of every rank.

    When ranks are lost the others go on: the pipelines with what they compute, the lowest rank as
    coordinator. Any exception ends this rank, and at once: unwinding the stack first could wait for
    threads that wait for other ranks.

    Args:
        comm: The ranks.
        worker: This rank's role.
        lead: The second role, on the coordinator only.
        pulse: This rank's signs of life.
        wake: Set by the pipeline's threads when there is a record.
        watch: Says when the run should end early; default: never.
        lookout: Watches the others; default: nobody is watched.
        take_over: Makes the second role for a rank that has become the lowest.
        conclude: Returns the exit code, when the job must then be ended by force.
        fuse: Burns while ranks wait for one another; lit when this returns.
        clock: Monotonic seconds.

    Returns:
        The second role, if this rank has it at the end.

    Raises:
        StartOver: ranks were lost, and not all others had come here.
    """
    fuse = fuse or Fuse()
    turns = _Turns(
        comm, worker, pulse, lead, wake, watch, lookout or Lookout(comm), conclude, clock
    )
    is_met = True
    try:
        while not pulse.is_over:
            try:
                if not is_met:
                    turns.rejoin(take_over)
                    is_met = True
                fuse.put_out()
                turns.work()
            except RankLost:
                fuse.light()
                is_met = False
                if not regroup(comm, is_computing=True):
                    raise StartOver from None
    except StartOver:
        raise
    except BaseException as error:
        if comm.size == 1 and not comm.is_fault_tolerant:
            raise
        crash(comm, error)
    fuse.light()
    return turns.lead


class _Turns:
    """What `serve` does again and again; its arguments are those of `serve`."""

    def __init__(
        self,
        comm: Communicator,
        worker: Worker,
        pulse: Pulse,
        lead: Lead | None,
        wake: threading.Event,
        watch: Watch | None,
        lookout: Lookout,
        conclude: Callable[[Lead], int],
        clock: Callable[[], float],
    ) -> None:
        self.lead = lead
        self._comm = comm
        self._worker = worker
        self._pulse = pulse
        self._wake = wake
        self._watch = watch
        self._lookout = lookout
        self._conclude = conclude
        self._clock = clock
        self._is_asked_to_end = False

    def work(self) -> None:
        """Take turns until every rank has ended."""
        nap = SHORTEST_NAP_SECONDS
        try:
            while not self._pulse.is_over:
                # Cleared before looking: what comes while we look sets it again.
                self._wake.clear()
                if self._turn(self._clock()):
                    nap = SHORTEST_NAP_SECONDS
                else:
                    self._wake.wait(nap)
                    nap = min(2 * nap, LONGEST_NAP_SECONDS)
        except MustEnd as end:
            sys.stderr.write(f"mpichunk: {end}\n")
            self._tell_all(Leave(code=end.code))
            self._pulse.abort_code = end.code
        self._see_off()

    def rejoin(self, take_over: Callable[[], Lead] | None) -> None:
        """Tell the coordinator, which may be a new one, what this rank holds.

        Raises:
            RankLost: another rank was lost meanwhile; then all of this is to be done again.
        """
        comm, worker = self._comm, self._worker
        holdings: dict[int, Holding] = dict(comm.allgather((comm.rank, worker.rejoin())))
        self._pulse.again()
        self._lookout.again()
        if not comm.is_coordinator:
            return
        if self.lead is None:
            assert take_over is not None, "nobody can take over"
            self.lead = take_over()
        held = {rank: holding.leases for rank, holding in holdings.items()}
        stops = [holding.stop for holding in holdings.values() if holding.stop is not None]
        early = next((stop for stop in stops if stop.reason != FINISHED), None)
        idle = {rank for rank, holding in holdings.items() if holding.is_idle}
        now = self._clock()
        self.lead.coordinator.regroup(held, now, ending=early, idle=idle)
        self.lead.attendance.regroup(comm.alive)
        self.lead.vigil.regroup(comm.alive, now)

    def _turn(self, now: float) -> bool:
        """Do all that can be done without waiting; return whether there was anything."""
        comm, lead = self._comm, self.lead
        arrived = comm.receive()
        for source, messages in arrived:
            for message in messages:
                self._deliver(source, message, now)
        outgoing: list[tuple[int, Message]] = [(comm.coordinator, m) for m in self._say(now)]
        if lead is not None:
            outgoing += lead.coordinator.assign(now)
            outgoing += lead.coordinator.commit(now)
        outgoing += self._lookout.step(lead, now, is_asked_to_end=self._is_asked_to_end)
        num_sent = _send(comm, outgoing)
        waits_for = comm.unreceived_by() if lead is None else self._unreceived(lead)
        is_ended = self._worker.is_ended and not waits_for
        beats = self._pulse.step(now, is_ended=is_ended)
        num_sent += _send(comm, ((comm.coordinator, beat) for beat in beats))
        if lead is not None and lead.attendance.is_over:
            self._let_go(lead)
        return num_sent + len(arrived) > 0

    def _say(self, now: float) -> list[ToCoordinator]:
        """Return what the coordinator must know of this rank."""
        messages = self._worker.step()
        if self._watch is not None and not self._worker.is_stopped:
            reason = self._watch.poll(now, is_leader=self._comm.is_coordinator)
            if reason is not None:
                messages.append(Drain(reason=reason))
            self._is_asked_to_end = reason is not None
        return messages

    def _deliver(self, source: int, message: Message, now: float) -> None:
        """Give a message to the role that it is for."""
        match message:
            case Leave(code=code):
                self._pulse.is_over = True
                self._pulse.abort_code = code
            case Heard():
                self._lookout.hear(now)
                self._worker.handle(message)
            case Kill(rank=rank):
                self._lookout.kill(rank)
            case _ if isinstance(message, ToWorker):
                self._worker.handle(message)
            case _:
                assert self.lead is not None, f"rank {source} takes this rank for the coordinator"
                self._deliver_to_lead(self.lead, source, message, now)

    def _deliver_to_lead(self, lead: Lead, source: int, message: ToCoordinator, now: float) -> None:
        """Give a message to one of those who are the coordinator."""
        match message:
            case Beat():
                note_beat(lead, source, message, now)
            case Gone(rank=rank):
                lead.vigil.condemn(rank)
            case Ask(lease=lease):
                may_write = lead.coordinator.may_write(lease)
                _send(self._comm, [(source, Verdict(lease=lease, may_write=may_write))])
            case _:
                lead.coordinator.handle(source, message)

    def _unreceived(self, lead: Lead) -> set[int]:
        """Return who has not yet taken a message, of those who are waited for."""
        return self._comm.unreceived_by() - lead.attendance.excused

    def _let_go(self, lead: Lead) -> None:
        """Let everybody leave: in good order, or by force when a rank can neither."""
        code = None
        if lead.attendance.excused:
            code = self._conclude(lead)
        self._tell_all(Leave(code=code))
        self._pulse.abort_code = code

    def _tell_all(self, message: Leave) -> None:
        """Send the others their last message, without waiting for them."""
        self._pulse.is_over = True
        excused = self.lead.attendance.excused if self.lead is not None else set[int]()
        others = set(self._comm.alive) - excused - {self._comm.rank}
        _send(self._comm, ((rank, message) for rank in others))

    def _see_off(self) -> None:
        """Wait until the last messages of this rank have been received."""
        comm, code = self._comm, self._pulse.abort_code
        end = self._clock() + FAREWELL_SECONDS
        while comm.num_unreceived() and (code is None or self._clock() < end):
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
