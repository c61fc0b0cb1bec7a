"""Leases that wait in a worker where blocks are short."""

import threading

import pytest

from mpichunk.roles.permits import Permits
from mpichunk.roles.worker import REPORT_SECONDS
from mpichunk.schedule.lookahead import MOST_WAITING, STALE_SECONDS
from mpichunk.schedule.messages import (
    Acknowledge,
    AskToWrite,
    Assign,
    Contest,
    CoordinatorHeartbeat,
    Done,
    Failed,
    GiveBack,
    PromiseToAsk,
    Request,
    Stop,
    WriteVerdict,
)
from tests.blocks import leases
from tests.fakeworker import asked_for, start_worker


class Fast:
    """A worker whose blocks take a millisecond, and a clock that the test sets."""

    def __init__(self, **kwargs):
        self.now = 0.0
        self.worker, self.pipeline, self.counters = start_worker(clock=lambda: self.now, **kwargs)
        self.worker.step()
        self.worker.handle(Assign(leases=leases(0, 1, 2)))
        self.finish(0)
        (_, self.request) = self.worker.step()

    def finish(self, *blocks):
        for block in blocks:
            lease = next(lease for lease in self.pipeline.submitted if lease.block == block)
            self.pipeline.submitted.remove(lease)
            self.pipeline.finish(lease, seconds=0.001)

    def give(self, num_blocks):
        """Assign blocks from 3 on."""
        self.worker.handle(Assign(leases=leases(*range(3, 3 + num_blocks))))

    def submitted(self):
        return [lease.block for lease in self.pipeline.submitted]


def test_where_blocks_are_short_leases_wait_and_the_pipeline_holds_no_more_than_ever():
    fast = Fast()
    assert 100 < fast.request.num_blocks <= MOST_WAITING
    fast.give(100)
    assert fast.submitted() == [1, 2, 3]
    assert len(fast.worker.held) == 102
    fast.worker.step()
    assert fast.counters["held"] == 3
    fast.finish(1, 2)
    fast.worker.step()
    assert fast.submitted() == [3, 4, 5], "in the order in which they were leased"


def test_records_are_reported_together_but_at_once_when_nothing_is_left_to_compute():
    fast = Fast()
    fast.give(4)
    fast.now = 5.0
    fast.finish(1)
    assert [m.lease.block for m in fast.worker.step() if isinstance(m, Done)] == [1]
    fast.finish(2)
    assert fast.worker.step() == []
    fast.finish(3)
    assert fast.worker.step() == []
    fast.now += 1.1 * REPORT_SECONDS
    assert [m.lease.block for m in fast.worker.step() if isinstance(m, Done)] == [2, 3]
    fast.finish(4, 5, 6)
    assert [m.lease.block for m in fast.worker.step() if isinstance(m, Done)] == [4, 5, 6]
    assert len(fast.worker.unacknowledged) == 7


def test_leases_that_wait_are_given_back_when_no_block_comes_forward():
    fast = Fast()
    fast.give(100)
    fast.worker.step()
    fast.now = STALE_SECONDS + 0.1
    (given_back,) = [m for m in fast.worker.step() if isinstance(m, GiveBack)]
    assert [lease.block for lease in given_back.leases] == list(range(4, 103))
    assert fast.worker.held == set(leases(1, 2, 3))
    assert fast.submitted() == [1, 2, 3]
    assert not any(isinstance(message, Request) for message in fast.worker.step())


def test_leases_that_wait_are_given_back_when_blocks_get_slow():
    fast = Fast()
    fast.give(100)
    for block in (1, 2, 3):
        lease = leases(block)[0]
        fast.pipeline.submitted.remove(lease)
        fast.pipeline.finish(lease, seconds=9.0)
    messages = fast.worker.step()
    assert [lease.block for lease in messages[-1].leases] == list(range(7, 103))
    assert fast.submitted() == [4, 5, 6]


@pytest.mark.parametrize("reason", ["drained", "failures"])
def test_leases_that_wait_are_given_back_when_the_run_ends_early(reason):
    fast = Fast()
    fast.give(10)
    fast.worker.handle(Stop(reason=reason))
    (given_back,) = [m for m in fast.worker.step() if isinstance(m, GiveBack)]
    assert {lease.block for lease in given_back.leases} == set(range(2, 13))
    fast.finish(1)
    fast.worker.step()
    fast.worker.handle(Acknowledge(leases=leases(0, 1)))
    assert fast.worker.is_ended


def test_leases_that_wait_are_forgotten_when_all_is_done_or_ranks_are_lost():
    fast = Fast()
    fast.give(10)
    assert set(fast.worker.rejoin().leases) == set(leases(0, 1, 2, 3))
    fast = Fast()
    fast.give(10)
    fast.worker.handle(Stop(reason="finished"))
    fast.worker.handle(Acknowledge(leases=leases(0)))
    assert fast.worker.is_ended
    assert fast.submitted() == [1, 2, 3]


@pytest.mark.parametrize("end", ["given back", "failed"])
@pytest.mark.parametrize("seconds", [4.0, 6.0])
def test_what_ended_undone_after_a_standstill_asks_when_it_is_leased_again(end, seconds):
    """The rank may have been given up and welcomed back meanwhile."""
    permits = Permits(threading.Event())
    fast = Fast(permits=permits)
    worker, (lease,) = fast.worker, leases(4)
    worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
    fast.give(2)
    fast.finish(*([1] if end == "failed" else []))
    worker.step()
    assert (lease in fast.pipeline.submitted) == (end == "failed")
    fast.now = seconds
    if end == "failed":
        fast.pipeline.records.put(Failed(lease=lease, error="OSError", message=""))
    worker.step()
    assert lease not in worker.held
    worker.handle(Assign(leases=(lease,)))
    assert asked_for(worker, permits, lease) == (seconds > 5.0)


def test_nothing_is_promised_of_a_lease_that_is_given_back():
    fast = Fast(permits=Permits(threading.Event()))
    fast.give(100)
    fast.worker.step()
    fast.worker.handle(Contest(lease=leases(2)[0]))
    fast.worker.handle(Contest(lease=leases(50)[0]))
    fast.now = STALE_SECONDS + 0.1
    messages = fast.worker.step()
    (given_back,) = [m for m in messages if isinstance(m, GiveBack)]
    assert leases(50)[0] in given_back.leases
    assert [m.lease.block for m in messages if isinstance(m, PromiseToAsk)] == [2]


def test_a_lease_that_waits_ages_and_can_be_contested():
    """A rank that was stopped for long must not write what was taken from it meanwhile."""
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    fast = Fast(permits=permits)
    fast.worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
    fast.give(10)
    fast.worker.handle(Contest(lease=leases(9)[0]))
    assert PromiseToAsk(lease=leases(9)[0]) in fast.worker.step()
    fast.finish(1, 2)
    fast.worker.step()
    assert fast.submitted() == [3, 4, 5]
    assert permits.may_write(leases(4)[0])
    now[0] = 11.0
    writer = threading.Thread(target=permits.may_write, args=leases(5))
    writer.start()
    asked = []
    while not asked:
        asked = [message for message in fast.worker.step() if isinstance(message, AskToWrite)]
    assert asked == [AskToWrite(lease=leases(5)[0])]
    fast.worker.handle(WriteVerdict(lease=leases(5)[0], may_write=True))
    writer.join()
