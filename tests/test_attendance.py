from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.messages import Heartbeat
from mpichunk.schedule.progress import Counters
from tests.fakeranks import NullDisplay


def start(*ranks):
    return Attendance(ranks, NullDisplay(), num_done=lambda: 7)


def end(attendance, rank, *, ended=1):
    counters = Counters()
    counters["ended"] = ended
    attendance.note(rank, Heartbeat(counters=tuple(counters.vector.tolist())), 0.0)


def test_it_is_over_when_all_have_ended():
    attendance = start(0, 1)
    end(attendance, 0)
    end(attendance, 1, ended=0)
    assert not attendance.is_over
    end(attendance, 1)
    assert attendance.is_over


def test_it_is_not_over_when_one_is_excused_and_has_ended_and_another_has_not():
    attendance = start(0, 1)
    end(attendance, 0)
    attendance.excuse(0)
    assert not attendance.is_over
    attendance.excuse(1)
    assert attendance.is_over
    attendance.readmit(1)
    assert not attendance.is_over


def test_ranks_that_are_lost_are_not_waited_for_and_the_others_anew():
    attendance = start(0, 1, 2)
    end(attendance, 1)
    attendance.excuse(0)
    attendance.regroup([1, 2])
    assert not attendance.is_over
    assert attendance.excused == set()
    end(attendance, 1)
    end(attendance, 2)
    assert attendance.is_over
