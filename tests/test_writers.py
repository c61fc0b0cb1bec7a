"""Who may write a block: the protocol alone, without ranks and mail (those: test_permits)."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mpichunk.schedule.messages import Lease
from mpichunk.schedule.writers import Writers

LEASE = Lease(block=3, attempt=1)
RANKS, BLOCKS = st.integers(0, 3), st.integers(0, 1)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["ask", "release", "finish", "give up"]), RANKS, BLOCKS)
    )
)
def test_between_two_endings_one_rank_alone_may_write(events):
    writers, allowed = Writers(), {}
    for event, rank, block in events:
        if event == "ask":
            may_write = writers.may_write(rank, block)
            assert may_write == (allowed.setdefault(block, rank) == rank)
        elif event == "release":
            writers.release(rank, Lease(block=block, attempt=1))
            if allowed.get(block) == rank:
                del allowed[block]
        elif event == "finish":
            writers.finish(block)
            allowed.pop(block, None)
        else:
            writers.give_up_rank(rank)
            allowed = {b: r for b, r in allowed.items() if r != rank}
        assert writers.by_block == allowed


def test_a_lease_is_contested_once_and_promised_by_its_holder():
    writers = Writers()
    assert not writers.has_promised(0, LEASE)
    assert writers.contest(0, LEASE)
    assert not writers.contest(0, LEASE)
    assert not writers.has_promised(0, LEASE)
    writers.promise(0, LEASE)
    assert writers.has_promised(0, LEASE)
    assert not writers.contest(0, LEASE)


def test_a_promise_binds_one_rank_and_one_lease():
    writers = Writers()
    for other, lease in ((1, LEASE), (0, replace(LEASE, attempt=2))):
        writers.contest(0, LEASE)
        writers.promise(0, LEASE)
        assert not writers.has_promised(other, lease)
        # What another has given up ends nothing here; what is contested anew does.
        writers.release(other, lease)
        assert writers.has_promised(0, LEASE)
        assert writers.contest(other, lease)
        assert not writers.has_promised(0, LEASE)


def test_a_promise_ends_with_its_lease_with_the_block_and_with_the_ranks():
    ends = (
        lambda writers: writers.release(0, LEASE),
        lambda writers: writers.finish(LEASE.block),
        lambda writers: writers.regroup({}),
    )
    for end in ends:
        writers = Writers()
        writers.contest(0, LEASE)
        writers.promise(0, LEASE)
        end(writers)
        assert not writers.has_promised(0, LEASE)
        assert writers.contest(0, LEASE)


def test_what_survivors_write_is_theirs():
    writers = Writers()
    assert writers.may_write(0, 7)
    writers.regroup({1: [LEASE], 2: [Lease(block=4, attempt=1)]})
    assert writers.by_block == {3: 1, 4: 2}
    assert not writers.may_write(2, 3)
    assert writers.may_write(2, 7)
