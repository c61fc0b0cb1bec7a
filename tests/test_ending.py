"""How a run ends early, in the roles alone: drained, stopped by failures, a full disk."""

import errno
import itertools
import os
import threading

import pytest

from mpichunk.errors import ExitCode, JournalError
from mpichunk.job.exit_status import conclude, note_end
from mpichunk.roles.permits import Permits
from mpichunk.rundir.journal import Journal, scan
from mpichunk.rundir.lock import RunLock
from mpichunk.rundir.runstatus import StatusReader, read_status
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.messages import (
    DRAINED,
    FAILURES,
    FINISHED,
    Acknowledge,
    Drain,
    GiveBack,
    Lease,
    Request,
    State,
    Stop,
)
from mpichunk.schedule.scheduler import Scheduler
from tests.blocks import core_of, done, failed, leases
from tests.fakeworker import start_worker
from tests.journals import read_history, read_states
from tests.quiet import coordinator_of

NUM_BLOCKS = 40


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path, num_blocks=NUM_BLOCKS, fingerprint={}, versions={}) as journal:
        journal.append_start({"num_ranks": 2})
        yield journal


def start(journal, **kwargs):
    scheduler = Scheduler(NUM_BLOCKS, ranks=range(2), **kwargs)
    breaker = Breaker(num_ranks=2, max_consecutive_failures=4)
    hosts = {0: "node0", 1: "node1"}
    coordinator = coordinator_of(scheduler, journal, hosts, breaker=breaker)
    return coordinator, scheduler


def lease_to(coordinator, rank, num_blocks):
    coordinator.handle(rank, Request(num_blocks=num_blocks))
    ((_, assign),) = coordinator.assign(0.0)
    return assign.leases


def end(journal, ending, *, num_blocks):
    """End as `run` does: note why, then prove."""
    if ending is not None:
        note_end(journal, ending)
    return conclude(journal.path.parent, ending, num_blocks=num_blocks)


# ---- Drained ----------------------------------------------------------------------------------


def test_a_drained_run_leases_nothing_more_but_takes_what_is_in_flight(journal, caplog):
    coordinator, scheduler = start(journal)
    first, second, third = lease_to(coordinator, 1, 3)
    coordinator.handle(1, Request(num_blocks=2))
    coordinator.handle(1, Drain(reason="SIGUSR2"))
    coordinator.handle(0, Drain(reason="SIGUSR2"))
    assert coordinator.assign(0.0) == []
    stop = Stop(reason=DRAINED, why="SIGUSR2 on rank 1 (node1)")
    assert coordinator.commit(0.0) == [(0, stop), (1, stop)]
    assert caplog.text.count("ending early: SIGUSR2 on rank 1") == 1

    coordinator.handle(1, done(first))
    coordinator.handle(1, failed(second))
    coordinator.handle(1, GiveBack(leases=(third,)))
    assert coordinator.commit(1.0) == [(1, Acknowledge(leases=(first, second)))]
    assert coordinator.assign(2.0) == []
    assert read_states(journal.path.parent, NUM_BLOCKS)[:3].tolist() == [
        State.DONE,
        State.PENDING,
        State.PENDING,
    ]
    assert (scheduler.num_leased, scheduler.num_done) == (0, 1)

    assert end(journal, coordinator.ending, num_blocks=NUM_BLOCKS) == ExitCode.DRAINED
    found = read_status(journal.path.parent)
    assert (found.end_reason, found.exit_code) == (DRAINED, ExitCode.DRAINED)
    assert not found.is_alive


def test_what_a_static_rank_gives_back_is_pending(journal):
    coordinator, scheduler = start(journal, mode="static")
    coordinator.handle(1, GiveBack(leases=leases(20, 21)))
    assert [scheduler.state(block) for block in (20, 21)] == [State.PENDING, State.PENDING]
    assert scheduler.num_leased == NUM_BLOCKS - 2


def test_a_worker_that_is_drained_gives_back_what_it_has_not_begun():
    permits = Permits(threading.Event())
    worker, pipeline, _ = start_worker(own_blocks=[3, 4, 5, 6], permits=permits)
    worker.step()
    assert pipeline.submitted == list(leases(3, 4, 5))
    worker.handle(Stop(reason=DRAINED, why="SIGTERM"))
    assert worker.step() == [GiveBack(leases=leases(4, 5))]
    assert [permits.contest(lease) for lease in leases(3, 4, 5)] == [True, False, False]
    assert pipeline.submitted == list(leases(3))
    record = pipeline.finish(*leases(3))
    assert worker.step() == [record]
    assert not worker.is_ended
    worker.handle(Acknowledge(leases=leases(3)))
    assert worker.is_ended


def test_a_worker_that_has_finished_keeps_what_it_computes():
    worker, pipeline, _ = start_worker(own_blocks=[3, 4])
    worker.step()
    worker.handle(Stop(reason=FINISHED))
    assert worker.step() == []
    assert pipeline.submitted == list(leases(3, 4))


# ---- Stopped by failures ----------------------------------------------------------------------


def test_the_breaker_stops_the_run_and_lists_what_failed(journal, caplog):
    coordinator, _ = start(journal)
    ours, theirs = lease_to(coordinator, 0, 3), lease_to(coordinator, 1, 3)
    coordinator.handle(0, failed(ours[0]))
    coordinator.handle(1, failed(theirs[0]))
    assert coordinator.ending is not None
    assert coordinator.ending.reason == FAILURES
    assert "first blocks of 2 ranks failed alike" in coordinator.ending.why
    outgoing = coordinator.commit(0.0)
    assert [message for _, message in outgoing[-2:]] == [coordinator.ending] * 2

    # What comes after counts as always: done, or failed for this start.
    coordinator.handle(0, done(ours[1]))
    coordinator.handle(1, failed(theirs[1]))
    coordinator.commit(1.0)
    code = end(journal, coordinator.ending, num_blocks=NUM_BLOCKS)
    assert code == ExitCode.BLOCKS_FAILED
    states = read_states(journal.path.parent, NUM_BLOCKS)
    failures = read_history(journal.path).failures(states)
    assert [(f.block, f.message) for f in failures] == [
        (ours[0].block, "no such chunk"),
        (theirs[0].block, "no such chunk"),
        (theirs[1].block, "no such chunk"),
    ]
    found = read_status(journal.path.parent)
    assert (found.end_reason, found.exit_code) == (FAILURES, ExitCode.BLOCKS_FAILED)
    assert "first blocks of 2 ranks" in found.end_why
    assert caplog.text.count("ending early") == 1


def test_a_new_start_forgets_how_the_last_one_ended(journal):
    end(journal, Stop(reason=FAILURES, why="a bug"), num_blocks=NUM_BLOCKS)
    assert read_history(journal.path).end["why"] == "a bug"
    journal.append_start({"num_ranks": 1})
    journal.append_beat({"num_held": 1})
    journal.sync()
    assert read_history(journal.path).end == {}
    with RunLock.acquire(journal.path.parent):
        found = read_status(journal.path.parent)
    assert found.is_alive
    assert found.exit_code == ExitCode.DRAINED


def test_a_job_that_has_noted_no_start_yet_is_starting(journal):
    run_dir = journal.path.parent
    with RunLock.acquire(run_dir) as lock:
        end(journal, Stop(reason=DRAINED, why="as asked"), num_blocks=NUM_BLOCKS)
        ended = read_history(journal.path).end["time"]
        # The job that has just ended holds the lock a moment longer.
        for seconds, is_starting in ((-1, False), (1, True)):
            os.utime(lock.path, (ended + seconds, ended + seconds))
            found = read_status(run_dir)
            assert bool(found.starting) == is_starting
            assert not found.is_alive
            assert found.exit_code == ExitCode.DRAINED
    assert read_status(run_dir).starting is None


def test_what_failed_before_counts_no_more_while_it_is_tried_again(tmp_path):
    now = itertools.count(1)  # seconds
    names = {"num_blocks": NUM_BLOCKS, "fingerprint": {}, "versions": {}}
    with Journal.open(tmp_path, clock=lambda: next(now), **names) as journal:
        journal.append_start({"num_ranks": 1})
        lease = Lease(block=3, attempt=3)
        journal.append(failed(lease), "failed", core=core_of(3), rank=0, host="node0")
        journal.append_start({"num_ranks": 1})
    with RunLock.acquire(tmp_path):
        assert read_status(tmp_path).num_failed == 0
    # It was lost: listed is what is known of the block.
    assert read_status(tmp_path).num_failed == 1


@pytest.mark.parametrize(
    ("second_end", "code"),
    [
        (None, ExitCode.DRAINED),
        (Stop(reason=DRAINED, why="SIGTERM"), ExitCode.DRAINED),
        (Stop(reason=FAILURES, why="a full disk"), ExitCode.BLOCKS_FAILED),
    ],
)
def test_what_failed_before_counts_no_more_when_the_next_start_is_interrupted(
    journal, second_end, code
):
    def note(block, record, state):
        journal.append(record, state, core=core_of(block), rank=0, host="node0")

    for block in range(NUM_BLOCKS):
        lease = Lease(block=block, attempt=3)
        if block in (3, 7):
            note(block, failed(lease), "failed")
        else:
            note(block, done(lease), "done")
    code_before = end(journal, Stop(reason=FINISHED), num_blocks=NUM_BLOCKS)
    assert code_before == ExitCode.BLOCKS_FAILED
    journal.append_start({"num_ranks": 2})
    note(3, failed(Lease(block=3, attempt=3)), "failed")
    journal.sync()
    assert end(journal, second_end, num_blocks=NUM_BLOCKS) == code
    found = read_status(journal.path.parent)
    assert (found.exit_code, found.num_failed, found.num_failed_lately) == (code, 2, 1)


def test_a_start_that_is_lost_when_all_that_was_left_has_failed_is_over(journal):
    for block in range(NUM_BLOCKS):
        record = failed(Lease(block=block, attempt=3))
        journal.append(record, "failed", core=core_of(block), rank=0, host="node0")
    journal.sync()
    assert read_status(journal.path.parent).exit_code == ExitCode.BLOCKS_FAILED


def test_a_journal_that_is_set_aside_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    names = {"num_blocks": NUM_BLOCKS, "fingerprint": {}, "versions": {}}
    with Journal.open(tmp_path, **names) as journal:
        journal.append_start({"num_ranks": 2})
        record = done(Lease(block=3, attempt=1))
        journal.append(record, "done", core=core_of(3), rank=0, host="node0")
        journal.sync()
        reader = StatusReader(tmp_path)
        assert reader.read().num_done == 1
    scans = []

    def scan_once_too_late(*arguments):
        scans.append(arguments)
        if len(scans) == 1:
            Journal.open(tmp_path, fresh=True, **names).close()
            raise FileNotFoundError
        return scan(*arguments)

    monkeypatch.setattr("mpichunk.rundir.journal.scan", scan_once_too_late)
    assert reader.read().num_done == 0


def test_a_reader_that_follows_sees_what_a_new_one_sees(tmp_path):
    names = {"fingerprint": {}, "versions": {}}
    reader = StatusReader(tmp_path)

    def check(journal, *, num_done, num_failed):
        journal.sync()
        found = reader.read()
        assert found == read_status(tmp_path)
        assert (found.num_done, found.num_failed) == (num_done, num_failed)

    def note(journal, record, state):
        journal.append(record, state, core=core_of(3), rank=0, host="node0")

    with Journal.open(tmp_path, num_blocks=NUM_BLOCKS, **names) as journal:
        journal.append_start({"num_ranks": 2})
        note(journal, failed(Lease(block=3, attempt=3)), "failed")
        check(journal, num_done=0, num_failed=1)
        kept = journal.path.stat().st_size
        note(journal, done(Lease(block=3, attempt=4)), "done")
        check(journal, num_done=1, num_failed=0)
        # Lines that could not be made durable are taken back, and others come instead.
        os.truncate(journal.path, kept)
        for block in (5, 6):
            note(journal, done(Lease(block=block, attempt=1)), "done")
        check(journal, num_done=2, num_failed=1)
        journal.append_end({"reason": DRAINED, "why": "SIGTERM"})
        check(journal, num_done=2, num_failed=1)
    with Journal.open(tmp_path, num_blocks=NUM_BLOCKS - 1, fresh=True, **names) as journal:
        check(journal, num_done=0, num_failed=0)


def test_what_failed_alike_is_told_once(journal, caplog):
    full = "the disk of /out is full (No space left on device): make room, then run it again"
    for block in range(3, 8):
        record = failed(Lease(block=block, attempt=1), "no such chunk" if block == 5 else full)
        journal.append(record, "failed", core=core_of(block), rank=0, host="node0")
    end(journal, Stop(reason=FAILURES, why=full), num_blocks=NUM_BLOCKS)
    assert f"4 blocks failed alike: {full}; the first is block 3, [3, 0, 0)" in caplog.text
    assert "block 5, [5, 0, 0) to [6, 4, 4), failed: no such chunk" in caplog.text
    assert caplog.text.count("No space left") == 1
    assert caplog.text.count("no such chunk") == 1


# ---- A journal that cannot be written -----------------------------------------------------------


class FullDisk:
    """A file that takes a few bytes more, then none."""

    def __init__(self, file, num_free):
        self._file, self._num_free = file, num_free

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, text):
        text = bytes(text)[: self._num_free]
        if not text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._num_free -= len(text)
        return self._file.write(text)


def test_a_full_disk_under_the_journal_ends_the_run_in_good_order(journal, caplog):
    journal.sync()
    before = journal.path.read_bytes()
    coordinator, _ = start(journal)
    first, second = lease_to(coordinator, 0, 2)
    journal._file = FullDisk(journal._file, 100)
    coordinator.handle(0, done(first))
    outgoing = coordinator.commit(0.0)
    assert outgoing[0] == (0, Acknowledge(leases=(first,)))
    assert coordinator.ending is not None
    assert coordinator.ending.reason == FAILURES
    assert str(journal.path) in coordinator.ending.why
    assert "No space left on device" in coordinator.ending.why
    # What does not fit is not there in part either.
    assert journal.path.read_bytes() == before
    coordinator.handle(0, done(second))
    assert coordinator.commit(1.0) == [(0, Acknowledge(leases=(second,)))]
    code = end(journal, coordinator.ending, num_blocks=NUM_BLOCKS)
    assert code == ExitCode.BLOCKS_FAILED
    assert journal.path.read_bytes() == before
    assert caplog.text.count("ending early") == 1


def test_a_journal_that_was_lost_to_another_job_is_not_written(tmp_path):
    lost = []

    def guard():
        if lost:
            raise JournalError("another job")

    with Journal.open(
        tmp_path, num_blocks=NUM_BLOCKS, fingerprint={}, versions={}, guard=guard
    ) as journal:
        journal.append_start({})
        journal.sync()
        before = journal.path.read_bytes()
        lost.append(True)
        journal.append_beat({})
        with pytest.raises(JournalError, match="another job"):
            journal.sync()
        lost.clear()
        journal._lines.clear()
    assert journal.path.read_bytes() == before


def test_the_journal_of_another_plan_proves_nothing(journal):
    with pytest.raises(JournalError, match="has 40 blocks, but this run has 41"):
        end(journal, None, num_blocks=NUM_BLOCKS + 1)


# ---- The proof --------------------------------------------------------------------------------


def test_lines_that_are_there_twice_do_not_make_up_for_one_that_is_missing(journal):
    for block in [*range(NUM_BLOCKS - 1), 0, 1, 1]:
        record = done(Lease(block=block, attempt=1))
        journal.append(record, "done", core=core_of(block), rank=0, host="node0")
    code = end(journal, Stop(reason=FINISHED), num_blocks=NUM_BLOCKS)
    assert code == ExitCode.DRAINED
    record = done(Lease(block=NUM_BLOCKS - 1, attempt=1))
    journal.append(record, "done", core=core_of(NUM_BLOCKS - 1), rank=0, host="node0")
    assert end(journal, None, num_blocks=NUM_BLOCKS) == ExitCode.DRAINED
    journal.sync()
    assert end(journal, None, num_blocks=NUM_BLOCKS) == ExitCode.ALL_DONE


def test_a_done_block_that_later_failed_is_not_done(journal):
    for block in range(NUM_BLOCKS):
        record = done(Lease(block=block, attempt=1))
        journal.append(record, "done", core=core_of(block), rank=0, host="node0")
    lease = Lease(block=7, attempt=1)
    journal.append(failed(lease), "undone", core=core_of(7), rank=0, host="node0")
    code = end(journal, Stop(reason=FINISHED), num_blocks=NUM_BLOCKS)
    assert code == ExitCode.DRAINED
