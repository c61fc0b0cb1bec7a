import random
import time
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np
import pytest

from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.messages import State
from tests.blocks import failed_blocks
from tests.fakeranks import NullDisplay, run
from tests.journals import read_states


@pytest.fixture
def journal(comm, world, tmp_path):
    if comm.rank != 0:
        yield None
        return
    with Journal.open(tmp_path, num_blocks=40, fingerprint={}, versions={}) as journal:
        yield journal


states_of = partial(read_states, num_blocks=40)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_every_block_is_computed_once_and_journaled(comm, tmp_path, journal, mode):
    before = np.arange(40) < 7
    computed = []

    def compute(lease):
        time.sleep(random.uniform(0.0, 0.004))
        computed.append(lease.block)
        return True

    run(comm, num_blocks=40, compute=compute, mode=mode, done=before, journal=journal)
    all_computed = comm.allgather(computed)
    assert sorted(chain(*all_computed)) == list(range(7, 40))
    if comm.rank == 0:
        assert np.flatnonzero(states_of(tmp_path) == State.DONE).tolist() == list(range(7, 40))
    if mode == "static":
        assert computed == sorted(computed)
        assert max(map(len, all_computed)) - min(map(len, all_computed)) <= 1
    assert comm.receive() == []


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_failed_blocks_are_tried_on_other_ranks_and_then_given_up(comm, tmp_path, journal, mode):
    tried = []

    def compute(lease):
        time.sleep(0.001)
        tried.append(lease.block)
        return lease.block % 10 != 3 and not (lease.block == 8 and lease.attempt == 1)

    ran = run(comm, num_blocks=40, compute=compute, mode=mode, journal=journal)
    ranks = [set(blocks) for blocks in comm.allgather(tried)]
    counts = Counter(chain(*comm.allgather(tried)))
    assert counts == {b: 3 if b % 10 == 3 else 2 if b == 8 else 1 for b in range(40)}
    for block in (3, 13, 23, 33):
        assert sum(block in blocks for blocks in ranks) == min(3, comm.size)
    if comm.rank == 0:
        assert failed_blocks(ran.scheduler, 40) == [3, 13, 23, 33]
        assert (np.flatnonzero(states_of(tmp_path) == State.FAILED) == [3, 13, 23, 33]).all()


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_ranks_without_work_end_too(comm, num_blocks):
    ran = run(comm, num_blocks=num_blocks, compute=lambda _: True)
    assert sum(comm.allgather(ran.counters["blocks"])) == num_blocks


def test_idle_ranks_leave_their_core_alone(comm):
    def compute(lease):
        time.sleep(1.0)
        return True

    ran = run(comm, num_blocks=1, compute=compute, interval=0.5)
    assert ran.seconds >= 1.0
    # 0.02 s for 1 s of waiting on an idle machine.
    assert ran.cpu_seconds < 0.15 * ran.seconds


def test_the_end_does_not_wait_for_the_next_progress_round(comm):
    ran = run(comm, num_blocks=4, compute=lambda _: True, interval=30.0)
    assert ran.seconds < 10.0


def test_the_coordinator_sees_the_sums_of_all_ranks_up_to_the_last(comm):
    class Recorder(NullDisplay):
        def __init__(self):
            self.seen = []

        def update(self, summed, now):
            self.seen.append(dict(summed))

    recorder = Recorder()

    def compute(lease):
        time.sleep(0.003)
        return True

    run(comm, num_blocks=40, compute=compute, display=recorder, interval=0.01)
    assert bool(recorder.seen) == comm.is_coordinator
    if comm.is_coordinator:
        assert recorder.seen[-1]["blocks"] == 40
        assert recorder.seen[-1]["patches"] == 40
        assert recorder.seen[-1]["ended"] == comm.size
        assert all(s["ended"] < comm.size for s in recorder.seen[:-1])


def test_a_crash_without_other_ranks_is_an_exception():
    """With other ranks it ends the job: see test_crash."""

    class Broken(NullDisplay):
        def update(self, summed, now):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(SerialCommunicator(), num_blocks=4, compute=lambda _: True, display=Broken())
