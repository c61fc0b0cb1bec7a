import time

import numpy as np
import pytest

from mpichunk.ranks.comm import SerialCommunicator, start_mpi


def receive(comm, num):
    """Return `num` messages, in the order in which they came."""
    messages = []
    deadline = time.monotonic() + 30
    while len(messages) < num:
        messages += comm.receive()
        assert time.monotonic() < deadline
    return messages


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def test_ranks_are_known(comm):
    assert 0 <= comm.rank < comm.size
    assert 0 <= comm.local_rank < comm.local_size <= comm.size
    assert comm.allgather(comm.rank) == list(range(comm.size))
    assert sorted(comm.allgather(comm.local_rank)) == list(range(comm.size))
    assert comm.library


def test_collectives(comm):
    assert comm.bcast({"a": 1} if comm.rank == 0 else None) == {"a": 1}
    assert comm.bcast(comm.rank, root=comm.size - 1) == comm.size - 1
    gathered = comm.gather(np.full(3, comm.rank))
    if comm.rank == 0:
        assert [values.tolist() for values in gathered] == [[r] * 3 for r in range(comm.size)]
    else:
        assert gathered is None
    comm.barrier()


def test_messages_of_a_rank_come_in_order_and_all_of_them(comm):
    big = np.arange(100_000)
    for dest in range(comm.size):
        for number in range(100):
            comm.send(dest, (comm.rank, number, big if number == 7 else None))
    messages = receive(comm, 100 * comm.size)
    for rank in range(comm.size):
        from_rank = [message for source, message in messages if source == rank]
        assert [message[:2] for message in from_rank] == [(rank, n) for n in range(100)]
        assert (from_rank[7][2] == big).all()
    until(lambda: comm.num_unreceived() == 0)
    comm.barrier()
    assert comm.receive() == []
    # Nobody sends the next test's messages before everybody has looked.
    comm.barrier()


def test_a_message_counts_until_it_is_received(comm):
    comm.send(0, "hello")
    comm.barrier()
    assert comm.num_unreceived() == 1
    comm.barrier()
    if comm.rank == 0:
        assert sorted(receive(comm, comm.size)) == [(r, "hello") for r in range(comm.size)]
    until(lambda: comm.num_unreceived() == 0)
    comm.barrier()


def test_ranks_that_are_all_well_agree_and_stay(comm):
    assert comm.agree(True)
    assert comm.alive == tuple(range(comm.size))
    assert len(set(comm.allgather(comm.job))) == 1
    assert comm.allgather(comm.is_coordinator) == [True] + [False] * (comm.size - 1)


def test_mpi_is_started_once(world):
    again = start_mpi()
    assert (again.rank, again.size) == (world.rank, world.size)


def test_mpi_allows_threads(world):
    if isinstance(world, SerialCommunicator):
        pytest.skip(world.library)
    from mpi4py import MPI

    assert MPI.Query_thread() >= MPI.THREAD_FUNNELED
