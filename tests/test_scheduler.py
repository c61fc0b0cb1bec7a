"""Which block is leased to whom, and what follows from each report; what it costs."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.schedule.messages import Lease, State
from mpichunk.schedule.scheduler import MOST_LEASED, Scheduler
from mpichunk.schedule.staticrun import WINDOW, static_blocks, static_run
from tests.blocks import drain


def test_blocks_are_leased_in_plan_order():
    scheduler = Scheduler(5, ranks=range(1))
    assert [lease.block for lease in scheduler.lease(0, 3, 0.0)] == [0, 1, 2]
    assert [lease.block for lease in scheduler.lease(0, 3, 0.0)] == [3, 4]
    assert scheduler.lease(0, 3, 0.0) == ()


def test_blocks_done_before_are_not_leased():
    done = np.array([True, False, True, False, True])
    scheduler = Scheduler(5, ranks=range(1), done=done)
    assert scheduler.num_done == 3
    assert drain(scheduler, 0) == [1, 3]
    assert scheduler.is_finished


def test_no_blocks_to_do_is_finished():
    assert Scheduler(0, ranks=range(2)).is_finished
    for mode in ("dynamic", "static"):
        scheduler = Scheduler(3, ranks=range(2), done=np.ones(3, bool), mode=mode)
        assert scheduler.is_finished
        assert scheduler.lease(0, 1, 0.0) == ()


def test_the_first_to_ask_does_not_take_all_of_a_short_run():
    scheduler = Scheduler(4, ranks=range(4))
    assert [len(scheduler.lease(rank, 3, 0.0)) for rank in range(4)] == [1, 1, 1, 1]

    scheduler = Scheduler(100, ranks=range(4))
    assert [len(scheduler.lease(rank, 3, 0.0)) for rank in range(4)] == [3, 3, 3, 3]


def test_a_rank_without_a_block_always_gets_one_at_the_end():
    scheduler = Scheduler(3, ranks=range(2))
    first = scheduler.lease(0, 3, 0.0)
    assert len(first) == 1
    scheduler.finish(0, first[0])
    assert len(scheduler.lease(0, 3, 0.0)) == 1
    assert len(scheduler.lease(1, 3, 0.0)) == 1


def test_a_failed_block_goes_to_another_rank_and_then_fails_for_good():
    scheduler = Scheduler(1, ranks=range(2), max_attempts=3)
    (lease,) = scheduler.lease(0, 1, 0.0)
    assert scheduler.fail(0, lease) == State.PENDING
    assert scheduler.lease(0, 1, 0.0) == ()

    (lease,) = scheduler.lease(1, 1, 0.0)
    assert lease == Lease(block=0, attempt=2)
    assert scheduler.fail(1, lease) == State.PENDING

    # Both have failed on it, so either may try again.
    (lease,) = scheduler.lease(1, 1, 0.0)
    assert lease.attempt == 3
    assert scheduler.fail(1, lease) == State.FAILED
    assert scheduler.is_finished
    assert scheduler.state(0) == State.FAILED


def test_a_single_rank_tries_its_failed_blocks_again_after_the_others():
    scheduler = Scheduler(3, ranks=range(1), max_attempts=2)
    (lease,) = scheduler.lease(0, 1, 0.0)
    scheduler.fail(0, lease)
    assert drain(scheduler, 0) == [1, 2, 0]
    assert scheduler.is_finished
    assert scheduler.num_failed == 0


def test_a_late_duplicate_changes_nothing():
    scheduler = Scheduler(2, ranks=range(2), max_attempts=1)
    (lease,) = scheduler.lease(0, 1, 0.0)
    assert scheduler.finish(0, lease)
    assert not scheduler.finish(0, lease)
    assert not scheduler.finish(1, lease)
    assert scheduler.fail(0, lease) is None
    assert scheduler.state(0) == State.DONE


def test_a_late_result_of_a_block_given_up_counts():
    scheduler = Scheduler(1, ranks=range(2), max_attempts=1)
    (lease,) = scheduler.lease(0, 1, 0.0)
    scheduler.fail(0, lease)
    assert scheduler.finish(1, Lease(block=0, attempt=9))
    assert (scheduler.num_done, scheduler.num_failed) == (1, 0)


def test_a_block_finished_while_it_waits_to_be_tried_again_is_not_leased():
    scheduler = Scheduler(1, ranks=range(2))
    (lease,) = scheduler.lease(0, 1, 0.0)
    scheduler.fail(0, lease)
    assert scheduler.finish(0, lease)
    assert scheduler.lease(1, 1, 0.0) == ()
    assert scheduler.is_finished


def test_a_failure_of_someone_else_s_lease_changes_nothing():
    scheduler = Scheduler(1, ranks=range(2))
    (lease,) = scheduler.lease(0, 1, 0.0)
    assert scheduler.fail(1, lease) is None
    assert scheduler.fail(0, Lease(block=0, attempt=2)) is None
    assert scheduler.state(0) == State.LEASED


@given(num_todo=st.integers(0, 1000), size=st.integers(1, 70))
def test_static_runs_are_contiguous_and_equal(num_todo, size):
    runs = [static_run(num_todo, size, rank) for rank in range(size)]
    assert [place for run in runs for place in run] == list(range(num_todo))
    lengths = {len(run) for run in runs}
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 7))
def test_static_blocks_are_held_by_their_rank_from_the_start(todo, size):
    todo = np.array(todo, bool)
    scheduler = Scheduler(len(todo), ranks=range(size), done=~todo, mode="static", max_attempts=1)
    assert scheduler.num_pending == 0
    for rank in range(size):
        for block in static_blocks(todo, size, rank):
            lease = Lease(block=block, attempt=1)
            assert scheduler.fail((rank + 1) % size, lease) is None or size == 1
            if size > 1:
                assert scheduler.finish(rank, lease)
    assert scheduler.is_finished


def test_static_blocks_that_fail_are_handed_out():
    scheduler = Scheduler(4, ranks=range(2), mode="static")
    assert scheduler.fail(0, Lease(block=1, attempt=1)) == State.PENDING
    assert scheduler.lease(0, 3, 0.0) == ()
    assert scheduler.lease(1, 3, 0.0) == (Lease(block=1, attempt=2),)
    assert scheduler.fail(0, Lease(block=1, attempt=1)) is None


def test_a_decision_costs_the_same_however_many_blocks_there_are():
    done = np.ones(20_000_000, bool)
    done[-5:] = False
    scheduler = Scheduler(len(done), ranks=range(1), done=done)
    start = time.perf_counter()
    assert len(drain(scheduler, 0)) == 5
    assert time.perf_counter() - start < 2.0


@given(st.integers(1, 9), st.floats(0.0, 1.0), st.integers(0, 3))
def test_static_runs_of_many_blocks_are_the_todo_cut_in_pieces(size, share, seed):
    todo = np.random.default_rng(seed).random(5 * WINDOW + 17) < share
    runs = [list(static_blocks(todo, size, rank)) for rank in range(size)]
    assert [block for run in runs for block in run] == np.flatnonzero(todo).tolist()
    scheduler = Scheduler(len(todo), ranks=range(size), done=~todo, mode="static")
    for rank, run in enumerate(runs):
        for block in (run[0], run[-1]) if len(run) > 1 else run:
            assert scheduler.finish(rank, Lease(block=block, attempt=1))


def test_giving_up_a_rank_costs_little_however_long_its_static_run():
    scheduler = Scheduler(20_000_000, ranks=range(2), mode="static")
    scheduler.finish(1, Lease(block=10_000_000, attempt=1))
    start = time.perf_counter()
    scheduler.give_up_rank(1)
    first = scheduler.lease(0, 1, 0.0)
    assert time.perf_counter() - start < 2.0
    assert first == (Lease(block=10_000_001, attempt=1),)
    assert (scheduler.num_pending, scheduler.num_leased) == (9_999_998, 10_000_001)


@pytest.mark.parametrize("size", [1, 3])
def test_blocks_that_fail_in_thousands_cost_no_search(size):
    scheduler = Scheduler(20_000, ranks=range(size), max_attempts=2)
    for rank in range(size):
        while leases := scheduler.lease(rank, 1, 0.0):
            if leases[0].attempt == 2:
                scheduler.finish(rank, leases[0])
            else:
                scheduler.fail(rank, leases[0])
    drain(scheduler, 0)
    assert scheduler.is_finished
    assert scheduler.num_failed == 0


def test_a_block_that_failed_on_all_others_is_not_stranded_when_the_last_is_given_up():
    scheduler = Scheduler(1, ranks=range(3), max_attempts=9)
    for rank in (0, 1):
        (lease,) = scheduler.lease(rank, 1, 0.0)
        scheduler.fail(rank, lease)
    assert scheduler.lease(0, 1, 0.0) == ()
    scheduler.give_up_rank(2)
    assert drain(scheduler, 0) == [0]


def test_a_failure_told_again_after_a_regroup_counts_once():
    scheduler = Scheduler(2, ranks=range(3), max_attempts=2)
    (lease,) = scheduler.lease(0, 1, 0.0)
    assert scheduler.fail(0, lease) == State.PENDING
    scheduler.regroup({0: [lease], 1: []}, 1.0, lost=[2])
    assert scheduler.fail(0, lease) is None
    assert scheduler.num_pending == 2
    assert sorted(drain(scheduler, 1)) == [0, 1]


def test_what_was_not_to_be_written_is_leased_again():
    scheduler = Scheduler(1, ranks=range(2))
    (first,) = scheduler.lease(0, 1, 0.0)
    second = scheduler.back_up(1, 0, 5.0)
    assert second == Lease(block=0, attempt=1, is_backup=True)
    assert scheduler.fail(1, second) == State.LEASED
    scheduler.give_back(0, first)
    assert drain(scheduler, 0) == [0]


def test_a_block_is_given_up_after_so_many_deaths():
    scheduler = Scheduler(2, ranks=range(5))
    for dead in (4, 3, 2):
        (lease,) = scheduler.lease(dead, 1, 0.0)
        assert lease.block == 0
        left = {rank: [] for rank in range(dead)}
        ((rank, found, state),) = scheduler.regroup(left, 0.0, lost=[dead])
        assert (rank, found) == (dead, lease)
    assert state == State.FAILED
    assert drain(scheduler, 0) == [1]
    assert scheduler.is_finished


def test_two_tries_of_one_rank_count_as_one_block_after_a_regroup():
    scheduler = Scheduler(3, ranks=range(2), max_attempts=3)
    first, second = Lease(block=0, attempt=1), Lease(block=0, attempt=2)
    scheduler.regroup({0: [second, first]}, 0.0, lost=[1], writers={0: 0})
    assert scheduler.finish(0, second)
    assert scheduler.is_idle(0)
    assert drain(scheduler, 0) == [1, 2]


def test_what_a_rank_was_given_first_is_what_it_has_died_of():
    scheduler = Scheduler(6, ranks=range(2))
    (zero,) = scheduler.lease(0, 1, 0.0)
    scheduler.fail(0, zero)
    leases = scheduler.lease(1, 3, 1.0)
    ((_, suspect, _),) = scheduler.regroup({0: []}, 2.0, lost=[1])
    assert suspect == leases[0]


def test_a_rank_that_finishes_nothing_is_late_with_all_that_it_holds():
    scheduler = Scheduler(6, ranks=range(2))
    stuck, well = scheduler.lease(0, 3, 0.0), scheduler.lease(1, 3, 0.0)
    assert scheduler.late_leases(4.0, 4.0) == []
    scheduler.finish(1, well[0], 4.0)
    assert scheduler.late_leases(4.5, 4.0) == [(0, lease) for lease in stuck]
    # A rank that moves takes as many times longer for a block as it holds.
    assert (1, well[1]) not in scheduler.late_leases(7.9, 4.0)
    assert (1, well[1]) in scheduler.late_leases(8.1, 4.0)


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_leases_that_are_out_are_bounded_however_many_are_asked_for(size):
    scheduler = Scheduler(3 * MOST_LEASED, ranks=range(size))
    num_out = sum(len(scheduler.lease(rank, 10**6, 0.0)) for rank in range(size))
    assert 0.9 * MOST_LEASED < num_out <= MOST_LEASED
