"""Never two ranks write one block, whatever the order in which things happen."""

import threading
import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpichunk.roles.permits import Permits
from mpichunk.schedule.messages import Lease, State
from tests.contest import World

SEEDS = st.integers(0, 10**9)


@given(seed=SEEDS, size=st.integers(2, 3), mode=st.sampled_from(["dynamic", "static"]))
@settings(max_examples=150, deadline=None)
def test_two_ranks_never_write_one_block(seed, size, mode):
    world = World(seed, size=size, num_blocks=5, mode=mode, slow=lambda rank: rank == seed % size)
    world.run()
    world.check()
    assert world.scheduler.num_done == 5


@given(seed=SEEDS, size=st.integers(2, 4), mode=st.sampled_from(["dynamic", "static"]))
@settings(max_examples=300, deadline=None)
def test_two_ranks_never_write_one_block_though_ranks_die_and_blocks_fail(seed, size, mode):
    world = World(
        seed,
        size=size,
        num_blocks=5,
        mode=mode,
        slow=lambda rank: rank == seed % size,
        fails=lambda rank, lease: world.random.random() < 0.15,
        write_failures=0.15,
        deaths=size - 1,
        max_attempts=4,
    )
    world.run()
    world.check()


@given(seed=SEEDS, deaths=st.integers(0, 2), mode=st.sampled_from(["dynamic", "static"]))
@settings(max_examples=200, deadline=None)
def test_a_rank_that_is_left_out_costs_no_block_and_writes_none_with_others(seed, deaths, mode):
    world = World(
        seed,
        size=4,
        num_blocks=12,
        mode=mode,
        fails=lambda rank, lease: rank == 2 and world.random.random() < 0.8,
        slow=lambda rank: rank == seed % 4,
        limit=2,
        deaths=deaths,
        max_attempts=6,
    )
    world.run()
    world.check()


@given(seed=SEEDS, is_equal=st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_is_journaled_is_what_is_stored_though_given_up_ranks_come_back(seed, is_equal):
    world = World(
        seed,
        size=3,
        num_blocks=5,
        slow=lambda rank: rank == seed % 3,
        write_failures=0.1,
        give_ups=3,
        max_attempts=9,
        value=lambda rank: "xxh3:0" if is_equal else f"xxh3:{rank}",
    )
    world.run()
    # What a rank does that is away to the end: then the job is ended by force.
    away = [world.ranks[rank].worker.held for rank in world.given_up]
    untold = {lease.block for held in away for lease in held}
    for block, line in world.book.last().items():
        if line[1] == "done" and block not in untold:
            assert world.disk.values[block] == line[3], f"block {block}: other bytes"
    if is_equal:
        assert not any(line[1] == "undone" for line in world.book.lines)
        assert world.scheduler.num_done == 5
        assert all(world.scheduler.state(block) == State.DONE for block in range(5))


def test_leases_wait_where_blocks_are_short():
    world = World(0, size=2, num_blocks=200, depth=2)
    world.run()
    world.check()
    assert 5 < world.most_waiting < 100
    world = World(0, size=2, num_blocks=200, depth=2, seconds=[2.0])
    world.run()
    assert world.most_waiting == 0


@given(
    seed=SEEDS,
    size=st.integers(1, 4),
    depth=st.integers(1, 3),
    mode=st.sampled_from(["dynamic", "static"]),
    seconds=st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.9]), min_size=1, max_size=4),
    drains=st.integers(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_leases_that_wait_are_lost_by_nobody(seed, size, depth, mode, seconds, drains):
    """Ranks die, blocks fail, are slow or fast in turn, and the run may be asked to end."""
    world = World(
        seed,
        size=size,
        num_blocks=40,
        depth=depth,
        mode=mode,
        seconds=seconds,
        slow=lambda rank: rank == seed % size,
        fails=lambda rank, lease: world.random.random() < 0.05,
        write_failures=0.05,
        deaths=size - 1,
        max_attempts=5,
        drains=drains,
    )
    world.run()
    assert all(rank.worker.is_ended for rank in world.ranks.values())
    if world.scheduler.is_finished:
        world.check()
    else:
        assert world.coordinator.ending.reason == "drained"
        # Of a static run what was not begun is nobody's: it was never handed out.
        assert world.scheduler.num_leased == 0 or mode == "static"
        world.check_done()


@given(seed=SEEDS, seconds=st.sampled_from([0.0, 0.02, 0.3]))
@settings(max_examples=100, deadline=None)
def test_leases_that_wait_for_a_rank_that_was_given_up_are_written_once(seed, seconds):
    world = World(
        seed,
        size=3,
        num_blocks=30,
        seconds=[seconds],
        slow=lambda rank: rank == seed % 3,
        give_ups=4,
        max_attempts=9,
    )
    world.run()
    assert world.scheduler.num_done == 30
    away = [world.ranks[rank].worker.held for rank in world.given_up]
    untold = {lease.block for held in away for lease in held}
    for block, line in world.book.last().items():
        assert block in untold or world.disk.values[block] == line[3]


@given(
    seed=SEEDS,
    size=st.integers(2, 4),
    mode=st.sampled_from(["dynamic", "static"]),
    seconds=st.sampled_from([0.0, 0.02, 0.3]),
)
@example(seed=10000001, size=4, mode="static", seconds=0.0)
@settings(max_examples=200, deadline=None)
def test_a_rank_that_stood_still_and_comes_back_writes_nothing_of_others(seed, size, mode, seconds):
    world = World(
        seed,
        size=size,
        num_blocks=30,
        mode=mode,
        seconds=[seconds],
        slow=lambda rank: rank == seed % size,
        standstills=4,
        max_attempts=9,
    )
    world.run()
    assert world.scheduler.num_done == 30


def test_an_answer_that_comes_after_all_was_closed_lets_nothing_be_written():
    permits, answers = Permits(threading.Event()), []
    lease = Lease(block=0, attempt=1, is_backup=True)
    permits.begin(lease)
    writer = threading.Thread(target=lambda: answers.append(permits.may_write(lease)))
    writer.start()
    while permits.questions() != [lease]:
        time.sleep(0.001)
    # The thread cannot wake before it has this lock.
    with permits._changed:
        assert permits.close([lease]) == set()
        permits.answer(lease, True)
        assert permits.writing() == set()
    writer.join()
    assert answers == [False]
