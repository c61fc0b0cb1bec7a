import pytest

from mpichunk.schedule.hang import KILL_SECONDS, BlockDurations, HangDetector


def start(*ranks, seconds=0.1):
    """Return a detector whose ranks may take a second for a step."""
    durations = BlockDurations(1.0)
    durations.note(seconds)
    return HangDetector(ranks, durations, 0.0)


def test_before_a_block_is_done_a_step_may_take_ten_times_the_floor():
    assert BlockDurations(2.0).lease_seconds == 20.0
    assert BlockDurations(2.0).slow_seconds == float("inf")


def test_what_is_typical_is_the_median_of_late_blocks():
    durations = BlockDurations(1.0)
    for seconds in (1.0, 1.0, 30.0):
        durations.note(seconds)
    assert durations.lease_seconds == 60.0
    assert durations.slow_seconds == 4.0


def test_a_rank_hangs_only_while_another_moves():
    detector = start(0, 1)
    assert detector.new_hung(5.0) == []
    assert detector.standstill_seconds(5.0) == 5.0
    detector.note(0, 1.0, 5.0, is_idle=False)
    assert detector.new_hung(5.1) == [1]
    assert detector.new_hung(5.2) == [], "told once"
    assert detector.hung == {1}


def test_a_sign_of_life_without_a_step_is_no_movement_unless_the_rank_is_idle():
    detector = start(0, 1, 2)
    for now in (0.1, 1.0, 2.0):
        detector.note(0, now, now, is_idle=False)
        detector.note(1, 7.0, now, is_idle=False)
        detector.note(2, 7.0, now, is_idle=True)
    assert detector.new_hung(2.0) == [1]


def test_a_hung_rank_is_given_up_once_and_may_come_back():
    detector = start(0, 1)
    detector.note(0, 1.0, 5.0, is_idle=False)
    assert detector.new_hung(5.0) == [1]
    assert detector.new_given_up(5.0, can_die=True) == []
    assert detector.new_given_up(5.0 + KILL_SECONDS, can_die=True) == [1]
    assert detector.new_given_up(99.0, can_die=True) == []
    assert detector.note(1, 3.0, 99.0, is_idle=False)
    assert not detector.note(1, 4.0, 99.5, is_idle=False)
    assert detector.given_up == set()


@pytest.mark.parametrize("can_die", [True, False])
def test_a_process_that_is_gone_is_given_up_at_once(can_die):
    detector = start(0, 1)
    detector.condemn(1)
    assert detector.new_given_up(0.0, can_die=can_die) == [1]


def test_who_is_given_up_stays_so_though_all_are_forgiven():
    detector = start(0, 1)
    detector.note(1, 3.0, 0.0, is_idle=False)
    detector.note(0, 1.0, 5.0, is_idle=False)
    assert detector.new_hung(5.0) == [1]
    assert detector.new_given_up(5.0, can_die=False) == [1]
    detector.forgive(9.0)
    assert detector.given_up == {1}
    assert detector.standstill_seconds(9.5) == 0.5
    assert not detector.note(1, 3.0, 9.5, is_idle=False), "it has not moved"
    assert detector.note(1, 4.0, 9.5, is_idle=False)


def test_a_rank_that_hangs_is_given_its_time_again_when_all_are_forgiven():
    detector = start(0, 1)
    detector.note(0, 1.0, 5.0, is_idle=False)
    assert detector.new_hung(5.0) == [1]
    detector.forgive(9.0)
    assert detector.hung == set()
    detector.note(0, 2.0, 9.9, is_idle=False)
    assert detector.new_hung(9.9) == []
    detector.note(0, 3.0, 10.1, is_idle=False)
    assert detector.new_hung(10.1) == [1]
