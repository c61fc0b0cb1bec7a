"""The turns of one rank's main thread, on ranks that the test plays."""

import queue
import threading
from types import SimpleNamespace

import pytest

from mpichunk.errors import MustEnd, RankLost
from mpichunk.geometry.box import Box
from mpichunk.ranks.communicator import SerialCommunicator
from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.loop import Heartbeats, Loop
from mpichunk.roles.monitor import CoordinatorRole, Monitor
from mpichunk.roles.worker import Holding, Worker
from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.hang import BlockDurations, HangDetector
from mpichunk.schedule.messages import (
    Acknowledge,
    CoordinatorHeartbeat,
    Drain,
    Failed,
    Heartbeat,
    Lease,
    Request,
    Stop,
)
from mpichunk.schedule.progress import Counters
from mpichunk.schedule.scheduler import Scheduler
from tests.blocks import done
from tests.fakeranks import NullDisplay
from tests.fakeworker import FakePipeline
from tests.quiet import nobody_takes_over, patient_breaker, strangers, unasked, unexpected

NOTHING = Holding(leases=(), writing=(), stop=None)


class Aborted(BaseException):
    pass


class PlayedRanks(SerialCommunicator):
    """One rank of some whose part the test plays: what they send, and say in collectives."""

    def __init__(self, rank, size, *, arriving=(), gathered=()):
        super().__init__()
        self.rank, self.alive = rank, tuple(range(size))
        self.is_fault_tolerant = True
        self.arriving, self.gathered = list(arriving), list(gathered)
        self.sent, self.given, self.codes = [], [], []
        self._num_turns = 0

    def send(self, dest, message):
        if dest == self.rank:
            super().send(dest, message)
            return
        self.sent.append((dest, message))

    def receive(self):
        self._num_turns += 1
        assert self._num_turns < 1000, "the loop does not end"
        arrived = self.arriving.pop(0) if self.arriving else []
        if arrived is RankLost:
            raise RankLost("a rank is lost")
        return super().receive() + arrived

    def num_unreceived(self):
        if self.arriving and self.arriving[0] is RankLost:
            raise self.arriving.pop(0)("a rank is lost")
        return super().num_unreceived()

    def allgather(self, value):
        self.given.append(value)
        return self.gathered.pop(0)(value)

    def agree(self, is_well):
        self.alive = self.alive[:-1]
        return False

    def abort(self, code):
        self.codes.append(code)
        raise Aborted


class SlowJournal:
    """Takes three seconds of a made-up clock for a sync."""

    def __init__(self, time):
        self._time, self._is_new = time, False
        self.offsets = SimpleNamespace(begin=lambda: None, checksum=lambda block: None)

    def append(self, *_, **__):
        self._is_new = True

    def sync(self):
        seconds = 3.0 if self._is_new else 0.0
        self._time[0], self._is_new = self._time[0] + seconds, False
        return seconds


def make_lead(comm, *, num_blocks=0, journal=None, min_lease_seconds=300.0):
    scheduler = Scheduler(num_blocks, ranks=range(comm.size))
    durations = BlockDurations(min_lease_seconds)
    coordinator = Coordinator(
        scheduler,
        journal or SimpleNamespace(append=lambda *_, **__: None, sync=lambda: 0.0),
        core_of=lambda block: Box.from_shape((block, 0, 0), (1, 1, 1)),
        hosts=dict.fromkeys(comm.alive, "node"),
        breaker=patient_breaker(comm.size),
        durations=durations,
    )
    return CoordinatorRole(
        coordinator=coordinator,
        attendance=Attendance(comm.alive, NullDisplay(), num_done=lambda: 0),
        detector=HangDetector(comm.alive, durations, 0.0),
    )


def make_loop(comm, lead=None, *, time=None, depth=3, **options):
    time = time or [0.0]
    silence = options.pop("silence_seconds", float("inf"))
    monitor = Monitor(comm, strangers(comm.rank, comm.alive), silence_seconds=silence)
    counters = Counters()
    pipeline = FakePipeline()
    return Loop(
        comm=comm,
        worker=Worker(pipeline, queue.SimpleQueue(), counters, depth=depth),
        lead=lead,
        heartbeats=Heartbeats(counters, interval=0.0),
        wake=threading.Event(),
        monitor=monitor,
        clock=lambda: time[0],
        **({"watch": unasked(), "take_over": nobody_takes_over, "conclude": unexpected} | options),
    )


def beat(**values):
    counters = Counters()
    for name, value in values.items():
        counters[name] = value
    return Heartbeat(counters=tuple(counters.vector.tolist()))


# ---- A rank is lost while the coordinator lets all go ------------------------------------------


def test_a_coordinator_that_has_let_all_go_says_so_to_those_who_have_not_heard():
    others_holding = (1, NOTHING, False)
    comm = PlayedRanks(
        0,
        3,
        arriving=[[(1, [beat(ended=1)]), (2, [beat(ended=1)])], [], [], RankLost],
        gathered=[lambda mine: [mine, True], lambda mine: [mine, others_holding]],
    )
    lead = make_lead(comm)
    assert make_loop(comm, lead).serve() is lead
    is_computing, (rank, _, is_over) = comm.given
    assert (is_computing, rank, is_over) == (True, 0, True)
    assert lead.coordinator.is_ended


def test_a_rank_that_was_let_go_without_hearing_of_it_learns_it():
    comm = PlayedRanks(
        1,
        3,
        arriving=[[], RankLost],
        gathered=[lambda mine: [True, mine], lambda mine: [(0, NOTHING, True), mine]],
    )
    loop = make_loop(comm)
    assert loop.serve() is None
    assert loop.heartbeats.is_over
    assert comm.given[1] == (1, NOTHING, False)


def test_a_job_that_must_end_ends_though_a_rank_is_lost_that_is_told_so():
    comm = PlayedRanks(0, 2)
    watch = SimpleNamespace(is_time_up=True, poll=lambda *_, **__: None)
    comm.send = lambda *_: (_ for _ in ()).throw(RankLost("a rank is lost"))
    with pytest.raises(Aborted):
        make_loop(comm, make_lead(comm), watch=watch).serve()
    assert comm.codes[0] == 75


# ---- Who is heard of ----------------------------------------------------------------------------


def test_whatever_the_coordinator_sends_is_a_sign_of_life():
    def look_for(seconds, message):
        loop = make_loop(PlayedRanks(1, 2), silence_seconds=5.0)
        for turn in range(seconds):
            loop.comm.arriving.append([(0, [message])] if message else [])
            loop._turn(float(turn))

    for message in (
        Acknowledge(leases=(Lease(block=0, attempt=1),)),
        CoordinatorHeartbeat(lease_seconds=9.0),
    ):
        look_for(60, message)
    with pytest.raises(MustEnd, match="has not been heard of"):
        look_for(60, None)


def test_a_coordinator_whose_disk_is_slow_is_heard_of_and_looks_after_the_others():
    time = [0.0]
    comm = PlayedRanks(0, 2)
    lead = make_lead(comm, num_blocks=100, journal=SlowJournal(time), min_lease_seconds=1.0)
    loop = make_loop(comm, lead, time=time, depth=0)
    lead.coordinator.handle(1, Request(num_blocks=50))
    leases = lead.coordinator._scheduler.lease(1, 50, 0.0)
    for turn, lease in enumerate(leases):
        failed = Failed(lease=lease, error="BlockError", message="")
        comm.arriving.append([(1, [failed, beat(steps=turn, held=1)])])
        loop._turn(time[0])
        time[0] += 0.25
    assert time[0] > 40.0
    sent = [message for dest, messages in comm.sent for message in messages if dest == 1]
    assert sum(isinstance(message, CoordinatorHeartbeat) for message in sent) >= 6


def test_a_slow_disk_is_no_sleep_also_where_messages_are_taken_in():
    """What two ranks have written is compared with the journal, and so is synced before."""
    time, seen = [0.0], []
    comm = PlayedRanks(0, 2)
    lead = make_lead(comm, num_blocks=100, journal=SlowJournal(time))
    loop = make_loop(comm, lead, time=time, depth=0)
    loop.monitor.step = lambda *_, disk_seconds, **__: seen.append(disk_seconds) or []
    (lease,) = lead.coordinator._scheduler.lease(1, 1, 0.0)
    lead.coordinator.give_up_rank(1)
    comm.arriving.append([(1, [done(lease), done(lease)])])
    loop._turn(0.0)
    assert (time, seen) == ([3.0], [3.0])


# ---- Asked to end -------------------------------------------------------------------------------


def test_a_rank_that_was_asked_to_end_looks_at_once_but_not_in_every_turn_after():
    reasons = ["SIGTERM"]
    watch = SimpleNamespace(
        is_time_up=False, poll=lambda *_, **__: reasons.pop() if reasons else None
    )
    comm = PlayedRanks(1, 2, arriving=[[], [(0, [Stop(reason="drained")])]])
    loop = make_loop(comm, watch=watch)
    asked = []
    loop.monitor.step = lambda *_, is_asked_to_end, **__: asked.append(is_asked_to_end) or []
    for turn in range(4):
        loop._turn(0.1 * turn)
    assert asked == [True, False, False, False]
    assert any(Drain(reason="SIGTERM") in messages for _, messages in comm.sent)
