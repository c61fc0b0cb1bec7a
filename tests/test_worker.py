import queue
import threading

import pytest

from mpichunk.roles.worker import REPORT_SECONDS, Worker
from mpichunk.schedule.lookahead import MOST_WAITING, STALE_SECONDS
from mpichunk.schedule.messages import (
    Acknowledge,
    Ask,
    Assign,
    Contest,
    Contested,
    Done,
    Dropped,
    Failed,
    GiveBack,
    Heard,
    Lease,
    Request,
    Stop,
    Verdict,
)
from mpichunk.schedule.permits import Permits
from mpichunk.schedule.progress import Counters


class FakePipeline:
    """Remembers what was submitted; blocks finish when the test says so."""

    num_steps = 0

    def __init__(self):
        self.submitted = []
        self.records = queue.SimpleQueue()

    def submit(self, lease):
        self.submitted.append(lease)

    def drop_waiting(self):
        dropped = self.submitted[1:]
        del self.submitted[1:]
        return dropped

    def finish(self, lease, seconds=2.0):
        record = done(lease, seconds)
        self.records.put(record)
        return record


def done(lease, seconds=2.0):
    return Done(
        lease=lease,
        num_patches=2,
        num_voxels=1000,
        nbytes_read=3000,
        nbytes_written=4000,
        seconds={"read": seconds / 4, "infer": seconds, "write": seconds / 8},
        checksum="xxh3:0",
    )


def leases(*blocks):
    return tuple(Lease(block=block, attempt=1) for block in blocks)


def start(*, depth=3, **kwargs):
    pipeline = FakePipeline()
    counters = Counters()
    worker = Worker(pipeline, pipeline.records, counters, depth=depth, **kwargs)
    return worker, pipeline, counters


def test_it_asks_for_as_many_blocks_as_the_pipeline_holds_and_no_more():
    worker, pipeline, _ = start(depth=3)
    assert worker.step() == [Request(num_blocks=3)]
    assert worker.step() == []
    worker.handle(Assign(leases=leases(4)))
    assert pipeline.submitted == list(leases(4))
    assert worker.step() == []


def test_it_asks_for_the_next_block_before_the_others_are_computed():
    worker, pipeline, _ = start(depth=3)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1, 2)))
    record = pipeline.finish(pipeline.submitted[0])
    assert worker.step() == [record, Request(num_blocks=1)]
    assert len(worker.held) == 2


def test_records_are_kept_until_they_are_acknowledged():
    worker, pipeline, _ = start()
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    first, second = pipeline.submitted
    record = pipeline.finish(first)
    failed = Failed(lease=second, error="BlockError", message="unreadable")
    pipeline.records.put(failed)
    worker.step()
    assert worker.unacknowledged == {first: record, second: failed}
    worker.handle(Acknowledge(leases=(first,)))
    assert worker.unacknowledged == {second: failed}


def test_an_acknowledgement_of_an_earlier_attempt_leaves_the_later_record():
    worker, pipeline, _ = start()
    worker.step()
    first, second = Lease(block=5, attempt=1), Lease(block=5, attempt=2)
    worker.handle(Assign(leases=(first,)))
    pipeline.records.put(Failed(lease=first, error="BlockError", message=""))
    worker.step()
    worker.handle(Assign(leases=(second,)))
    record = pipeline.finish(second)
    worker.step()
    worker.handle(Acknowledge(leases=(first,)))
    assert worker.unacknowledged == {second: record}


def test_it_ends_when_stopped_with_nothing_held_and_all_acknowledged():
    worker, pipeline, _ = start()
    worker.step()
    worker.handle(Assign(leases=leases(0)))
    record = pipeline.finish(pipeline.submitted[0])
    assert worker.step()[0] == record
    worker.handle(Stop(reason="finished"))
    assert not worker.is_ended
    worker.handle(Acknowledge(leases=leases(0)))
    assert worker.is_ended
    assert not worker.is_abandoning


def test_it_does_not_wait_for_a_block_that_another_rank_has_finished():
    permits = Permits(threading.Event())
    worker, pipeline, _ = start(permits=permits)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    assert permits.may_write(leases(1)[0])
    worker.handle(Stop(reason="finished"))
    assert not worker.is_ended, "block 1 is being written"
    assert worker.is_abandoning
    assert not permits.may_write(leases(0)[0])
    pipeline.finish(leases(1)[0])
    worker.step()
    worker.handle(Acknowledge(leases=leases(1)))
    assert worker.is_ended


def test_a_late_block_is_written_only_when_the_coordinator_allows_it():
    now, answers = [0.0], {}
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, pipeline, _ = start(permits=permits)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    worker.handle(Heard(lease_seconds=10.0))
    now[0] = 9.0
    assert permits.may_write(leases(1)[0])
    now[0] = 11.0
    writers = [
        threading.Thread(target=lambda n=n: answers.update({n: permits.may_write(leases(n)[0])}))
        for n in (0, 1)
    ]
    for writer in writers:
        writer.start()
    asked = []
    while len(asked) < 2:
        asked += [message.lease for message in worker.step() if isinstance(message, Ask)]
    assert set(asked) == set(leases(0, 1))
    # Whoever was asked is lost: the same is asked again.
    worker.rejoin()
    assert {m.lease for m in worker.step() if isinstance(m, Ask)} == set(leases(0, 1))
    worker.handle(Verdict(lease=leases(0)[0], may_write=False))
    worker.handle(Verdict(lease=leases(1)[0], may_write=True))
    for writer in writers:
        writer.join()
    assert answers == {0: False, 1: True}
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert GiveBack(leases=leases(0)) in worker.step()


def test_what_is_at_hand_goes_on_with_another_coordinator():
    worker, pipeline, _ = start(depth=3, own_blocks=[7, 8, 9, 10])
    worker.step()
    record = pipeline.finish(leases(7)[0])
    assert worker.step() == [record]
    assert set(worker.rejoin().leases) == set(leases(7, 8, 9, 10))
    # Blocks that were not begun are asked for like any others.
    assert worker.step() == [record]
    pipeline.finish(leases(8)[0])
    assert Request(num_blocks=1) in worker.step()
    assert pipeline.submitted == list(leases(7, 8, 9, 10))


def test_its_own_static_blocks_come_first_and_without_a_message():
    worker, pipeline, _ = start(depth=2, own_blocks=[7, 8, 9])
    assert worker.step() == []
    assert pipeline.submitted == list(leases(7, 8))
    record = pipeline.finish(leases(7)[0])
    assert worker.step() == [record]
    assert pipeline.submitted == list(leases(7, 8, 9))
    pipeline.finish(leases(8)[0])
    assert Request(num_blocks=1) in worker.step()


def test_own_blocks_that_it_holds_already_are_not_begun_again():
    """As they are when it was given up, came back and was leased some of its own run."""
    worker, pipeline, _ = start(depth=3, own_blocks=range(3, 11))
    worker.step()
    worker.handle(Assign(leases=leases(7, 8)))
    for block in (3, 4, 5, 6):
        pipeline.finish(leases(block)[0], seconds=0.001)
        worker.step()
    assert pipeline.submitted == list(leases(3, 4, 5, 7, 8, 6, 9))


def test_it_asks_for_nothing_while_it_has_own_blocks():
    worker, pipeline, _ = start(depth=2, own_blocks=range(6))
    said = worker.step()
    for block in range(4):
        pipeline.finish(leases(block)[0], seconds=0.001)
        said += worker.step()
    assert not any(isinstance(message, Request) for message in said[:-1])
    assert pipeline.submitted == list(leases(*range(6)))
    assert said[-1].num_blocks > 100


def test_its_own_blocks_are_forgotten_when_one_is_refused():
    """That happens only when it was given up: others have them."""
    worker, pipeline, _ = start(depth=2, own_blocks=range(6))
    worker.step()
    worker.handle(Verdict(lease=leases(0)[0], may_write=False))
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert worker.step() == [GiveBack(leases=leases(0)), Request(num_blocks=1)]
    assert pipeline.submitted == list(leases(0, 1))


def asked_for(worker, permits, lease):
    """Return whether a writer thread of this lease asks; its block may be written."""
    writer = threading.Thread(target=permits.may_write, args=[lease], daemon=True)
    writer.start()
    said = []
    while writer.is_alive():
        said += worker.step()
        if Ask(lease=lease) in said:
            worker.handle(Verdict(lease=lease, may_write=True))
            writer.join()
    return Ask(lease=lease) in said


@pytest.mark.parametrize("seconds", [4.0, 6.0, 11.0])
def test_a_rank_that_has_stood_still_asks_for_all_its_own_blocks(seconds):
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, pipeline, _ = start(depth=2, own_blocks=range(6), permits=permits, clock=lambda: now[0])
    worker.handle(Heard(lease_seconds=10.0))
    worker.step()
    now[0] = seconds
    worker.step()
    asks = {}
    for block in range(4):
        (lease,) = leases(block)
        asks[block] = asked_for(worker, permits, lease)
        pipeline.num_steps += 1
        pipeline.finish(lease)
        worker.step()
    assert asks == dict.fromkeys(range(4), seconds > 5.0)


def test_what_was_refused_once_asks_when_it_is_leased_again():
    """That it was given back may cross the new lease on its way."""
    permits = Permits(threading.Event())
    worker, pipeline, _ = start(permits=permits)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    worker.handle(Verdict(lease=leases(0)[0], may_write=False))
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert GiveBack(leases=leases(0)) in worker.step()
    worker.handle(Assign(leases=leases(0)))
    assert asked_for(worker, permits, leases(0)[0])
    assert not asked_for(worker, permits, leases(1)[0])


@pytest.mark.parametrize("end", ["given back", "failed"])
@pytest.mark.parametrize("seconds", [4.0, 6.0])
def test_what_ended_undone_after_a_standstill_asks_when_it_is_leased_again(end, seconds):
    """The rank may have been given up and welcomed back meanwhile."""
    permits = Permits(threading.Event())
    fast = Fast(permits=permits)
    worker, (lease,) = fast.worker, leases(4)
    worker.handle(Heard(lease_seconds=10.0))
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
    assert [m.lease.block for m in messages if isinstance(m, Contested)] == [2]


def test_its_own_blocks_are_dropped_when_it_is_stopped():
    worker, pipeline, _ = start(depth=1, own_blocks=[7, 8])
    worker.step()
    worker.handle(Stop(reason="finished"))
    pipeline.finish(leases(7)[0])
    worker.step()
    assert pipeline.submitted == list(leases(7))


def test_a_crash_of_a_thread_is_raised_in_the_main_thread():
    worker, pipeline, _ = start()
    pipeline.records.put(ZeroDivisionError("in a thread"))
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        worker.step()


def test_it_counts_what_it_does():
    worker, pipeline, counters = start()
    worker.step()
    assert counters["busy"] == 0
    worker.handle(Assign(leases=leases(0, 1)))
    worker.step()
    assert counters["busy"] == 1
    pipeline.finish(leases(0)[0])
    pipeline.records.put(Failed(lease=leases(1)[0], error="OSError", message=""))
    worker.step()
    assert counters["busy"] == 0
    assert (counters["blocks"], counters["failures"], counters["patches"]) == (1, 1, 2)
    assert (counters["voxels"], counters["bytes_read"], counters["bytes_written"]) == (
        1000,
        3000,
        4000,
    )
    assert (counters["read"], counters["infer"], counters["write"]) == (0.5, 2.0, 0.25)


class Fast:
    """A worker whose blocks take a millisecond, and a clock that the test sets."""

    def __init__(self, **kwargs):
        self.now = 0.0
        self.worker, self.pipeline, self.counters = start(clock=lambda: self.now, **kwargs)
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


def test_a_lease_that_waits_ages_and_can_be_contested():
    """A rank that was stopped for long must not write what was taken from it meanwhile."""
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    fast = Fast(permits=permits)
    fast.worker.handle(Heard(lease_seconds=10.0))
    fast.give(10)
    fast.worker.handle(Contest(lease=leases(9)[0]))
    assert Contested(lease=leases(9)[0]) in fast.worker.step()
    fast.finish(1, 2)
    fast.worker.step()
    assert fast.submitted() == [3, 4, 5]
    assert permits.may_write(leases(4)[0])
    now[0] = 11.0
    writer = threading.Thread(target=permits.may_write, args=leases(5))
    writer.start()
    asked = []
    while not asked:
        asked = [message for message in fast.worker.step() if isinstance(message, Ask)]
    assert asked == [Ask(lease=leases(5)[0])]
    fast.worker.handle(Verdict(lease=leases(5)[0], may_write=True))
    writer.join()
