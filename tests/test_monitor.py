"""What the coordinator's monitor says, with a clock that the test sets."""

from types import SimpleNamespace

import pytest

from mpichunk.errors import MustEnd
from mpichunk.roles.monitor import CoordinatorRole, Monitor, note_heartbeat
from mpichunk.schedule.hang import BlockDurations, HangDetector
from mpichunk.schedule.messages import CoordinatorHeartbeat, Heartbeat
from mpichunk.schedule.progress import Counters
from tests.quiet import strangers


class FakeCoordinator:
    def __init__(self):
        self.calls = []
        self.ending = None

    def __getattr__(self, name):
        return lambda rank: self.calls.append((name, rank))


class FakeAttendance:
    def __init__(self):
        self.excused = set()

    def note(self, *_):
        pass

    def excuse(self, rank):
        self.excused.add(rank)

    def readmit(self, rank):
        self.excused.discard(rank)


def start(size=3, *, is_fault_tolerant=False, interval=5.0):
    comm = SimpleNamespace(
        rank=0,
        coordinator=0,
        size=size,
        alive=tuple(range(size)),
        hosts=dict.fromkeys(range(size), "node"),
        is_fault_tolerant=is_fault_tolerant,
    )
    durations = BlockDurations(1.0)
    durations.note(0.01)
    lead = CoordinatorRole(
        coordinator=FakeCoordinator(),
        attendance=FakeAttendance(),
        detector=HangDetector(comm.alive, durations, 0.0),
    )
    return Monitor(comm, strangers(comm.rank, comm.alive), interval=interval), lead


def look(monitor, lead, *, until, begin=0.0, moving=()):
    """Take turns every quarter of a second; return what is said, each with its time."""
    said, now = [], begin
    while now <= until:
        for rank in moving:
            lead.detector.note(rank, now, now, is_idle=False)
        said += [(now, *m) for m in monitor.step(lead, now, is_asked_to_end=False)]
        now += 0.25
    return said


def beat(lead, rank, now, **counters):
    found = Counters()
    for name, value in counters.items():
        found[name] = value
    note_heartbeat(lead, rank, Heartbeat(counters=tuple(found.vector.tolist())), now)


def test_a_standstill_is_told_once_and_then_ends_the_job(caplog):
    monitor, lead = start()
    look(monitor, lead, until=3.0)
    told = [r for r in caplog.messages if "no rank has moved for" in r]
    assert len(told) == 1
    with pytest.raises(MustEnd, match="no rank has moved for 4 s"):
        look(monitor, lead, begin=3.25, until=9.0)
    assert lead.coordinator.calls == []


def test_once_the_run_ends_a_rank_that_does_not_is_given_up_though_no_other_moves():
    monitor, lead = start(2)
    lead.coordinator.ending = "all blocks are done"
    lead.detector.excuse(0)
    look(monitor, lead, until=9.0)
    assert lead.attendance.excused == {1}


def test_a_standstill_that_passes_may_be_told_again(caplog):
    monitor, lead = start()
    look(monitor, lead, until=2.0)
    look(monitor, lead, begin=2.25, until=3.5, moving=(0, 1, 2))
    look(monitor, lead, begin=3.75, until=6.0)
    assert sum("no rank has moved for" in r for r in caplog.messages) == 2


def test_who_has_slept_blames_nobody():
    monitor, lead = start()
    look(monitor, lead, until=0.5, moving=(0, 1, 2))
    assert monitor.step(lead, 1000.0, is_asked_to_end=False) == []
    look(monitor, lead, begin=1000.25, until=1001.5, moving=(0,))
    assert lead.coordinator.calls == []


def test_a_rank_that_does_not_move_is_given_up_and_welcomed_back(caplog):
    monitor, lead = start()
    look(monitor, lead, until=3.0, moving=(0, 2))
    assert lead.coordinator.calls == [("give_up_rank", 1)]
    assert lead.attendance.excused == {1}
    assert "rank 1 on node (process 0) cannot be left behind" in caplog.text
    beat(lead, 1, 3.0, steps=5, held=1)
    assert lead.coordinator.calls[-1] == ("welcome_back", 1)
    assert lead.attendance.excused == set()


def test_all_hear_once_in_an_interval_unless_much_has_changed():
    monitor, lead = start(interval=20.0)
    said = look(monitor, lead, until=4.0, moving=(0, 1, 2))
    assert said == [(0.0, rank, CoordinatorHeartbeat(lease_seconds=1.0)) for rank in (0, 1, 2)]
    for seconds in (0.01, 0.01, 0.55):
        lead.detector.durations.note(seconds)  # 1.1 s now
    assert look(monitor, lead, begin=4.25, until=19.0, moving=(0, 1, 2)) == []
    said = look(monitor, lead, begin=19.25, until=38.0, moving=(0, 1, 2))
    assert {now for now, *_ in said} == {20.0}
    lead.detector.durations.note(2.0)
    said = look(monitor, lead, begin=38.25, until=39.5, moving=(0, 1, 2))
    assert [message.lease_seconds for _, _, message in said] == [4.0, 4.0, 4.0]


def test_who_is_asked_to_end_looks_beside_in_every_turn_and_after_all_ranks_as_ever():
    monitor, lead = start()
    looks, signs = [], []
    monitor._neighbours = SimpleNamespace(next_is_gone=looks.append)
    lead.detector.new_hung = lambda now, **_: signs.append(now) or []
    for turn in range(10):
        lead.detector.note(0, turn, 0.25 * turn, is_idle=False)
        monitor.step(lead, 0.25 * turn, is_asked_to_end=True)
    assert len(looks) == 10
    assert signs == [0.0, 1.0, 2.0]


def test_a_rank_that_has_ended_is_waited_for_no_more():
    monitor, lead = start()
    beat(lead, 1, 0.0, ended=1)
    assert lead.coordinator.calls == [("note_end", 1)]
    look(monitor, lead, until=5.0, moving=(0, 2))
    assert lead.coordinator.calls == [("note_end", 1)]


def test_a_rank_that_was_given_up_is_welcomed_back_though_this_process_has_slept():
    monitor, lead = start()
    look(monitor, lead, until=3.0, moving=(0, 2))
    monitor.step(lead, 100.0, is_asked_to_end=False)
    beat(lead, 1, 100.5, steps=5, held=1)
    assert lead.coordinator.calls == [("give_up_rank", 1), ("welcome_back", 1)]
    assert lead.attendance.excused == set()


def test_a_slow_disk_is_no_sleep():
    """Every turn takes 3 s, all of it under the journal: hung ranks are found all the same."""
    monitor, lead = start(interval=5.0)
    said = []
    for turn in range(10):
        now = 3.0 * turn
        for rank in (0, 2):
            lead.detector.note(rank, now, now, is_idle=False)
        said += [
            (now, rank)
            for rank, message in monitor.step(lead, now, is_asked_to_end=False, disk_seconds=2.9)
            if isinstance(message, CoordinatorHeartbeat)
        ]
    assert lead.coordinator.calls == [("give_up_rank", 1)]
    assert [now for now, rank in said if rank == 2] == [0.0, 6.0, 12.0, 18.0, 24.0]
