"""The coordinator alone, and with many workers on a made-up network (no MPI)."""

import pickle
import random
from collections import defaultdict, deque
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.worker import Worker
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.messages import (
    Acknowledge,
    Assign,
    Contest,
    Done,
    GiveBack,
    Lease,
    PromiseToAsk,
    Request,
    State,
    Stop,
)
from mpichunk.schedule.progress import Counters
from mpichunk.schedule.scheduler import Scheduler
from mpichunk.schedule.staticrun import static_blocks
from tests.blocks import core_of, done, failed, failed_blocks
from tests.fakeworker import FakePipeline
from tests.journals import read_history, read_states
from tests.quiet import coordinator_of, patient_breaker


class FakeJournal:
    def __init__(self):
        self.lines, self.num_synced, self.seconds = [], 0, 0.0

    def append(self, record, state, *, core, rank, host):
        assert core == core_of(record.lease.block)
        self.lines.append((record.lease.block, state, rank, host))

    def sync(self):
        self.num_synced = len(self.lines)
        return self.seconds


def start(num_blocks, size=2, **kwargs):
    journal = FakeJournal()
    scheduler = Scheduler(num_blocks, ranks=range(size), **kwargs)
    hosts = {rank: f"node{rank}" for rank in range(size)}
    return coordinator_of(scheduler, journal, hosts), journal


def test_requests_are_answered_in_the_order_they_came():
    coordinator, _ = start(10)
    coordinator.handle(1, Request(num_blocks=2))
    coordinator.handle(0, Request(num_blocks=1))
    assert coordinator.assign(0.0) == [
        (1, Assign(leases=(Lease(block=0, attempt=1), Lease(block=1, attempt=1)))),
        (0, Assign(leases=(Lease(block=2, attempt=1),))),
    ]
    assert coordinator.assign(0.0) == []


def test_a_record_is_acknowledged_only_once_it_is_synced():
    coordinator, journal = start(4)
    coordinator.handle(1, Request(num_blocks=2))
    ((_, assign),) = coordinator.assign(0.0)
    for lease in assign.leases:
        coordinator.handle(1, done(lease))
    assert journal.lines == [(0, "done", 1, "node1"), (1, "done", 1, "node1")]
    assert journal.num_synced == 0
    assert coordinator.commit(0.0) == [(1, Acknowledge(leases=assign.leases))]
    assert journal.num_synced == 2
    assert coordinator.commit(0.0) == []


def test_records_that_come_quickly_share_a_sync():
    coordinator, journal = start(4)
    coordinator.handle(1, Request(num_blocks=3))
    ((_, assign),) = coordinator.assign(0.0)
    first, second = assign.leases
    coordinator.handle(1, done(first))
    assert coordinator.commit(5.0) == [(1, Acknowledge(leases=(first,)))]
    coordinator.handle(1, done(second))
    assert coordinator.commit(5.001) == []
    assert journal.num_synced == 1
    assert coordinator.commit(5.5) == [(1, Acknowledge(leases=(second,)))]


def test_a_slow_disk_takes_a_fifth_of_rank_0_at_most():
    coordinator, journal = start(100)
    journal.seconds = 0.1
    coordinator.handle(1, Request(num_blocks=50))
    ((_, assign),) = coordinator.assign(0.0)
    num_syncs = 0
    for turn, lease in enumerate(assign.leases):
        coordinator.handle(1, done(lease))
        num_syncs += bool(coordinator.commit(turn * 0.05))
    assert 0.1 * num_syncs <= 0.2 * 50 * 0.05 + 0.1
    assert num_syncs >= 4


def test_between_two_slow_syncs_there_is_time_for_others():
    coordinator, journal = start(100)
    journal.seconds = 3.0
    coordinator.handle(1, Request(num_blocks=50))
    ((_, assign),) = coordinator.assign(0.0)
    synced, now = [], 0.0
    for lease in assign.leases:
        coordinator.handle(1, done(lease))
        before = journal.num_synced
        coordinator.commit(now)
        if journal.num_synced > before:
            synced.append(now)
            now += journal.seconds
        now += 0.25
    assert [b - a for a, b in pairwise(synced)] == [4.0] * (len(synced) - 1)


def test_ranks_that_cannot_be_served_are_not_looked_at_in_every_turn(monkeypatch):
    monkeypatch.setattr("mpichunk.schedule.scheduler.MOST_LEASED", 500)
    coordinator, _ = start(1000, size=100)
    looked_at = []
    lease = coordinator._scheduler.lease
    coordinator._scheduler.lease = lambda rank, *how: looked_at.append(rank) or lease(rank, *how)
    for rank in range(100):
        coordinator.handle(rank, Request(num_blocks=500))
    first = dict(coordinator.assign(0.0))
    assert {len(assign.leases) for assign in first.values()} == {5}
    assert looked_at == list(range(100))
    looked_at.clear()
    assert coordinator.assign(0.1) == []
    assert looked_at == []
    coordinator.handle(7, done(first[7].leases[0]))
    assert [(rank, len(assign.leases)) for rank, assign in coordinator.assign(0.2)] == [(7, 1)]
    assert looked_at == [7]
    # What fails on one may be for any other.
    looked_at.clear()
    coordinator.handle(8, failed(first[8].leases[0]))
    assert [rank for rank, _ in coordinator.assign(0.3)] == [8]
    assert sorted(looked_at) == list(range(100))


def test_messages_survive_their_way():
    plain, backup = Lease(block=1, attempt=1), Lease(block=2, attempt=3, is_backup=True)
    record = replace(done(backup), batch_size=4)
    messages = [Assign(leases=(plain, backup)), record, failed(plain), Request(num_blocks=3)]
    arrived = pickle.loads(pickle.dumps(messages))
    assert arrived == messages
    assert arrived[0].leases[1].is_backup
    assert {plain, backup} == {*arrived[0].leases, arrived[1].lease}


def test_many_leases_take_few_bytes():
    leases = tuple(Lease(block=10**6 + n, attempt=1) for n in range(500))
    assert len(pickle.dumps(Assign(leases=leases), -1)) < 20 * 500
    records = [replace(done(lease), checksum=f"xxh3:{lease.block:032x}") for lease in leases]
    assert len(pickle.dumps(records, -1)) < 170 * 500


def test_a_late_duplicate_is_acknowledged_but_not_journaled():
    coordinator, journal = start(4)
    coordinator.handle(0, Request(num_blocks=1))
    ((_, assign),) = coordinator.assign(0.0)
    (lease,) = assign.leases
    coordinator.handle(0, done(lease))
    coordinator.handle(1, done(lease))
    assert len(journal.lines) == 1
    assert (1, Acknowledge(leases=(lease,))) in coordinator.commit(0.0)


def test_a_request_that_cannot_be_served_waits_for_a_block_that_fails_elsewhere():
    coordinator, journal = start(1)
    coordinator.handle(0, Request(num_blocks=1))
    ((_, assign),) = coordinator.assign(0.0)
    coordinator.handle(1, Request(num_blocks=3))
    assert coordinator.assign(0.0) == []
    coordinator.handle(0, failed(assign.leases[0]))
    assert coordinator.assign(0.0) == [(1, Assign(leases=(Lease(block=0, attempt=2),)))]
    assert journal.lines == [(0, "retry", 0, "node0")]


def test_all_ranks_are_stopped_once_when_all_is_done_or_failed(caplog):
    coordinator, journal = start(2, max_attempts=1)
    for rank in (0, 1):
        coordinator.handle(rank, Request(num_blocks=1))
    (_, first), (_, second) = coordinator.assign(0.0)
    coordinator.handle(0, done(first.leases[0]))
    assert not any(isinstance(message, Stop) for _, message in coordinator.commit(0.0))
    coordinator.handle(1, failed(second.leases[0], "no such chunk"))
    outgoing = coordinator.commit(0.0)
    assert outgoing[0] == (1, Acknowledge(leases=second.leases))
    assert outgoing[1:] == [(rank, Stop(reason="finished")) for rank in (0, 1)]
    assert coordinator.is_ended
    assert coordinator.commit(0.0) == []
    assert journal.lines[-1] == (1, "failed", 1, "node1")
    assert "block 1 failed on rank 1 (node1), attempt 1: BlockError: no such chunk" in caplog.text


@pytest.mark.parametrize("has_promised", [True, False])
def test_a_promise_ends_with_the_lease_that_was_given_back(has_promised):
    """The same lease, given to the same rank once more, is contested once more."""
    durations = BlockDurations(1.0)
    durations.note(0.01)
    coordinator = Coordinator(
        Scheduler(1, ranks=range(2)),
        FakeJournal(),
        core_of=core_of,
        hosts={0: "node0", 1: "node1"},
        breaker=patient_breaker(2),
        durations=durations,
    )
    coordinator.handle(0, Request(num_blocks=2))
    lease = Lease(block=0, attempt=1)
    assert coordinator.assign(0.0) == [(0, Assign(leases=(lease,)))]
    assert coordinator.assign(2.0) == [(0, Contest(lease=lease))]
    if has_promised:
        coordinator.handle(0, PromiseToAsk(lease=lease))
    coordinator.handle(0, GiveBack(leases=(lease,)))
    assert coordinator.assign(2.6) == [(0, Assign(leases=(lease,)))]
    coordinator.handle(1, Request(num_blocks=1))
    assert coordinator.assign(5.0) == [(0, Contest(lease=lease))]
    assert coordinator.assign(6.0) == []
    coordinator.handle(0, PromiseToAsk(lease=lease))
    assert coordinator.assign(7.0) == [(1, Assign(leases=(replace(lease, is_backup=True),)))]


def test_nothing_to_do_is_stopped_at_once():
    coordinator, _ = start(3, done=np.ones(3, bool))
    assert coordinator.commit(0.0) == [(rank, Stop(reason="finished")) for rank in (0, 1)]


class Network:
    """Ranks, workers and a coordinator in one thread; mail is delayed, in order between two ranks.

    `outcome(rank, lease)` says whether an attempt succeeds.
    """

    def __init__(self, scheduler, journal, *, size, seed, outcome, todo=None):
        self.random = random.Random(seed)
        self.size, self.outcome, self.now = size, outcome, 0.0
        self.pipelines = [FakePipeline() for _ in range(size)]
        self.counters = [Counters() for _ in range(size)]
        self.workers = [
            Worker(
                pipeline,
                pipeline.records,
                self.counters[rank],
                depth=3,
                own_blocks=() if todo is None else static_blocks(todo, size, rank),
            )
            for rank, pipeline in enumerate(self.pipelines)
        ]
        hosts = dict.fromkeys(range(size), "host")
        self.coordinator = coordinator_of(scheduler, journal, hosts)
        self.mail = defaultdict(deque)
        self.computed = defaultdict(list)

    def run(self, max_steps=100_000):
        for _ in range(max_steps):
            if all(worker.is_ended for worker in self.workers) and not any(self.mail.values()):
                return
            self.step()
        raise AssertionError("it does not end")

    def step(self):
        rank = self.random.randrange(self.size)
        for (source, dest), queue in list(self.mail.items()):
            if dest == rank and queue:
                self.deliver(source, rank, queue.popleft())
        pipeline = self.pipelines[rank]
        if pipeline.submitted and self.random.random() < 0.5:
            self.compute(rank, pipeline)
        self.post(rank, [(0, message) for message in self.workers[rank].step()])
        if rank == 0:
            self.post(0, self.coordinator.assign(0.0))
            self.now += self.random.random() * 0.02
            self.post(0, self.coordinator.commit(self.now))

    def compute(self, rank, pipeline):
        lease = pipeline.submitted.pop(0)
        self.computed[lease.block].append(rank)
        succeeds = self.outcome(rank, lease)
        pipeline.records.put(done(lease) if succeeds else failed(lease))

    def deliver(self, source, rank, message):
        if isinstance(message, Assign | Acknowledge | Stop):
            self.workers[rank].handle(message)
        else:
            self.coordinator.handle(source, message)

    def post(self, source, outgoing):
        for dest, message in outgoing:
            self.mail[source, dest].append(message)


journaled = partial(read_states, num_blocks=60)


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path, num_blocks=60, fingerprint={}, versions={}) as journal:
        yield journal


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 2, 5, 33, 100])
@pytest.mark.parametrize("seed", range(3))
def test_every_block_is_computed_once(tmp_path, journal, mode, size, seed):
    before = np.arange(60) % 7 == 0
    todo = ~before
    scheduler = Scheduler(60, ranks=range(size), done=before, mode=mode)
    network = Network(
        scheduler,
        journal,
        size=size,
        seed=seed,
        outcome=lambda *_: True,
        todo=todo if mode == "static" else None,
    )
    network.run()
    assert sorted(network.computed) == np.flatnonzero(todo).tolist()
    assert all(len(ranks) == 1 for ranks in network.computed.values())
    assert (journaled(tmp_path) == np.where(todo, State.DONE, State.PENDING)).all()
    assert sum(counters["blocks"] for counters in network.counters) == todo.sum()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 2, 5, 33])
@pytest.mark.parametrize("seed", range(5))
def test_every_block_ends_done_or_failed_whatever_fails(tmp_path, journal, mode, size, seed):
    """A third of the attempts fails; blocks 11 and 12 always do."""
    luck = random.Random(seed)
    scheduler = Scheduler(60, ranks=range(size), mode=mode)
    network = Network(
        scheduler,
        journal,
        size=size,
        seed=seed,
        outcome=lambda _, lease: lease.block not in (11, 12) and luck.random() > 0.33,
        todo=np.ones(60, bool) if mode == "static" else None,
    )
    network.run()
    states = journaled(tmp_path)
    assert scheduler.is_finished
    assert np.flatnonzero(states == State.FAILED).tolist() == failed_blocks(scheduler, 60)
    assert ((states == State.DONE) | (states == State.FAILED)).all()
    assert (states[[11, 12]] == State.FAILED).all()
    for failure in read_history(tmp_path / "journal.jsonl").failures(states):
        assert failure.attempt == len(network.computed[failure.block]) == 3
    # An attempt after a failure goes to another rank where there is one.
    for ranks in network.computed.values():
        assert len(set(ranks)) == min(len(ranks), size)


def test_a_rank_on_which_everything_fails_costs_no_block(tmp_path, journal):
    scheduler = Scheduler(60, ranks=range(4))
    network = Network(scheduler, journal, size=4, seed=0, outcome=lambda rank, _: rank != 2)
    network.run()
    assert (journaled(tmp_path) == State.DONE).all()


def test_ranks_that_ask_late_still_get_their_share_of_a_short_run(journal):
    scheduler = Scheduler(4, ranks=range(4))
    network = Network(scheduler, journal, size=4, seed=1, outcome=lambda *_: True)
    network.run()
    assert all(isinstance(counters["blocks"], float) for counters in network.counters)
    assert max(counters["blocks"] for counters in network.counters) <= 2


def test_done_carries_what_the_journal_needs():
    record = done(Lease(block=1, attempt=1))
    assert isinstance(record, Done)
    assert set(record.seconds) == {"read", "infer", "write"}
