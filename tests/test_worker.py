"""What a worker asks for, holds and reports; no MPI, and no blocks."""

import threading

import pytest

from mpichunk.roles.permits import Permits
from mpichunk.schedule.messages import (
    Acknowledge,
    AskToWrite,
    Assign,
    CoordinatorHeartbeat,
    Dropped,
    Failed,
    GiveBack,
    Lease,
    Request,
    Stop,
    WriteVerdict,
)
from tests.blocks import leases
from tests.fakeworker import asked_for, start_worker


def test_it_asks_for_as_many_blocks_as_the_pipeline_holds_and_no_more():
    worker, pipeline, _ = start_worker(depth=3)
    assert worker.step() == [Request(num_blocks=3)]
    assert worker.step() == []
    worker.handle(Assign(leases=leases(4)))
    assert pipeline.submitted == list(leases(4))
    assert worker.step() == []


def test_it_asks_for_the_next_block_before_the_others_are_computed():
    worker, pipeline, _ = start_worker(depth=3)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1, 2)))
    record = pipeline.finish(pipeline.submitted[0])
    assert worker.step() == [record, Request(num_blocks=1)]
    assert len(worker.held) == 2


def test_records_are_kept_until_they_are_acknowledged():
    worker, pipeline, _ = start_worker()
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
    worker, pipeline, _ = start_worker()
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
    worker, pipeline, _ = start_worker()
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
    worker, pipeline, _ = start_worker(permits=permits)
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
    worker, pipeline, _ = start_worker(permits=permits)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
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
        asked += [message.lease for message in worker.step() if isinstance(message, AskToWrite)]
    assert set(asked) == set(leases(0, 1))
    # Whoever was asked is lost: the same is asked again.
    worker.rejoin()
    assert {m.lease for m in worker.step() if isinstance(m, AskToWrite)} == set(leases(0, 1))
    worker.handle(WriteVerdict(lease=leases(0)[0], may_write=False))
    worker.handle(WriteVerdict(lease=leases(1)[0], may_write=True))
    for writer in writers:
        writer.join()
    assert answers == {0: False, 1: True}
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert GiveBack(leases=leases(0)) in worker.step()


def test_how_the_run_ends_is_told_again_when_those_who_were_told_are_lost_as_well():
    worker, _, _ = start_worker()
    worker.handle(Stop(reason="failures", why="all blocks fail"))
    for _ in range(3):
        holding = worker.rejoin()
        assert holding.stop == Stop(reason="failures", why="all blocks fail")
        assert not holding.is_idle and not worker.is_stopped
    worker.handle(Stop(reason="finished"))
    assert worker.rejoin().stop == Stop(reason="finished")
    assert worker.rejoin().is_idle


def test_what_is_at_hand_goes_on_with_another_coordinator():
    worker, pipeline, _ = start_worker(depth=3, own_blocks=[7, 8, 9, 10])
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
    worker, pipeline, _ = start_worker(depth=2, own_blocks=[7, 8, 9])
    assert worker.step() == []
    assert pipeline.submitted == list(leases(7, 8))
    record = pipeline.finish(leases(7)[0])
    assert worker.step() == [record]
    assert pipeline.submitted == list(leases(7, 8, 9))
    pipeline.finish(leases(8)[0])
    assert Request(num_blocks=1) in worker.step()


def test_own_blocks_that_it_holds_already_are_not_begun_again():
    """As they are when it was given up, came back and was leased some of its own run."""
    worker, pipeline, _ = start_worker(depth=3, own_blocks=range(3, 11))
    worker.step()
    worker.handle(Assign(leases=leases(7, 8)))
    for block in (3, 4, 5, 6):
        pipeline.finish(leases(block)[0], seconds=0.001)
        worker.step()
    assert pipeline.submitted == list(leases(3, 4, 5, 7, 8, 6, 9))


def test_it_asks_for_nothing_while_it_has_own_blocks():
    worker, pipeline, _ = start_worker(depth=2, own_blocks=range(6))
    said = worker.step()
    for block in range(4):
        pipeline.finish(leases(block)[0], seconds=0.001)
        said += worker.step()
    assert not any(isinstance(message, Request) for message in said[:-1])
    assert pipeline.submitted == list(leases(*range(6)))
    assert said[-1].num_blocks > 100


def test_its_own_blocks_are_forgotten_when_one_is_refused():
    """That happens only when it was given up: others have them."""
    worker, pipeline, _ = start_worker(depth=2, own_blocks=range(6))
    worker.step()
    worker.handle(WriteVerdict(lease=leases(0)[0], may_write=False))
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert worker.step() == [GiveBack(leases=leases(0)), Request(num_blocks=1)]
    assert pipeline.submitted == list(leases(0, 1))


@pytest.mark.parametrize("seconds", [4.0, 6.0, 11.0])
def test_a_rank_that_has_stood_still_asks_for_all_its_own_blocks(seconds):
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, pipeline, _ = start_worker(
        depth=2, own_blocks=range(6), permits=permits, clock=lambda: now[0]
    )
    worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
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


@pytest.mark.parametrize("seconds", [4.0, 6.0])
@pytest.mark.parametrize("is_made_late", [False, True])
def test_a_rank_that_stood_still_before_its_first_turn_asks_for_its_own_blocks(
    seconds, is_made_late
):
    """It is watched from the start, not from its first turn on."""
    now = [seconds if is_made_late else 0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, _, _ = start_worker(
        depth=1, own_blocks=range(2), permits=permits, clock=lambda: now[0], since=0.0
    )
    now[0] = seconds
    worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
    worker.step()
    assert asked_for(worker, permits, leases(0)[0]) == (seconds > 5.0)


@pytest.mark.parametrize("seconds", [4.0, 6.0])
def test_a_rank_that_has_not_heard_of_the_coordinator_asks_for_its_own_blocks(seconds):
    """What is long it learns by that: the first word may be late."""
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, pipeline, _ = start_worker(
        depth=1, own_blocks=range(2), permits=permits, clock=lambda: now[0]
    )
    now[0] = seconds
    asks = []
    for block in range(2):
        worker.step()
        (lease,) = leases(block)
        asks.append(asked_for(worker, permits, lease))
        worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
        pipeline.finish(lease)
    # The second one it took only after it had heard.
    assert asks == [True, seconds > 5.0]


def test_a_rank_that_stood_still_since_ranks_were_lost_asks_for_what_it_gave_back():
    """Also when it has taken no turn since: what it says then may cross a new lease."""
    now = [0.0]
    permits = Permits(threading.Event(), clock=lambda: now[0])
    worker, pipeline, _ = start_worker(depth=1, permits=permits, clock=lambda: now[0])
    worker.handle(CoordinatorHeartbeat(lease_seconds=10.0))
    worker.step()
    (lease,) = leases(0)
    worker.handle(Assign(leases=(lease,)))
    worker.rejoin()
    now[0] = 6.0
    pipeline.records.put(Failed(lease=lease, error="OSError", message=""))
    worker.step()
    worker.handle(Assign(leases=(lease,)))
    assert asked_for(worker, permits, lease)


def test_what_was_refused_once_asks_when_it_is_leased_again():
    """That it was given back may cross the new lease on its way."""
    permits = Permits(threading.Event())
    worker, pipeline, _ = start_worker(permits=permits)
    worker.step()
    worker.handle(Assign(leases=leases(0, 1)))
    worker.handle(WriteVerdict(lease=leases(0)[0], may_write=False))
    pipeline.records.put(Dropped(lease=leases(0)[0]))
    assert GiveBack(leases=leases(0)) in worker.step()
    worker.handle(Assign(leases=leases(0)))
    assert asked_for(worker, permits, leases(0)[0])
    assert not asked_for(worker, permits, leases(1)[0])


def test_its_own_blocks_are_dropped_when_it_is_stopped():
    worker, pipeline, _ = start_worker(depth=1, own_blocks=[7, 8])
    worker.step()
    worker.handle(Stop(reason="finished"))
    pipeline.finish(leases(7)[0])
    worker.step()
    assert pipeline.submitted == list(leases(7))


def test_a_crash_of_a_thread_is_raised_in_the_main_thread():
    worker, pipeline, _ = start_worker()
    pipeline.records.put(ZeroDivisionError("in a thread"))
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        worker.step()


def test_it_counts_what_it_does():
    worker, pipeline, counters = start_worker()
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
