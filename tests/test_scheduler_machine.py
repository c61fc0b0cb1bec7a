"""The scheduler against models in plain Python, in any order of events."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from mpichunk.schedule.messages import Lease, State
from mpichunk.schedule.scheduler import MOST_DEATHS, Scheduler
from mpichunk.schedule.staticrun import WINDOW, static_blocks
from tests.blocks import drain, failed_blocks


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of leases, results, failures and duplicates, against a model in plain Python."""

    leases = Bundle("leases")

    @initialize(
        done=st.lists(st.booleans(), max_size=12),
        size=st.integers(1, 4),
        mode=st.sampled_from(["dynamic", "static"]),
        max_attempts=st.integers(1, 3),
        pad=st.sampled_from([0, WINDOW - 3]),
    )
    def start(self, done, size, mode, max_attempts, pad):
        done = np.array([True] * pad + done, bool)
        self.size, self.max_attempts = size, max_attempts
        self.scheduler = Scheduler(
            len(done), ranks=range(size), done=done, mode=mode, max_attempts=max_attempts
        )
        self.done = set(np.flatnonzero(done).tolist())
        self.failed, self.held = set(), {}
        self.pending = set(np.flatnonzero(~done).tolist())
        self.tries = dict.fromkeys(self.pending, 0)
        self.own, self.culprits, self.given = {}, {}, []
        if mode == "static":
            for rank in range(size):
                for block in static_blocks(~done, size, rank):
                    self.own[block] = rank
                    self.give(rank, Lease(block=block, attempt=1))

    def give(self, rank, lease):
        assert lease.block in self.pending
        assert lease.attempt == self.tries[lease.block] + 1
        self.pending.remove(lease.block)
        self.tries[lease.block] = lease.attempt
        assert rank not in self.culprits.get(lease.block, ())
        self.held[lease.block] = (rank, lease)
        self.given.append((rank, lease))

    @rule(target=leases, rank=st.integers(0, 3), num=st.integers(1, 4))
    def lease(self, rank, num):
        rank %= self.size
        leases = self.scheduler.lease(rank, num, 0.0)
        assert len(leases) <= num
        for lease in leases:
            self.give(rank, lease)
        return rank, leases

    @rule(target=leases, block=st.integers(0, WINDOW + 12))
    def static_lease(self, block):
        if block in self.own:
            return self.own[block], (Lease(block=block, attempt=1),)
        return 0, ()

    # Any lease may be reported again and again, by its rank or by another one.
    @rule(what=leases, rank=st.none() | st.integers(0, 3), pick=st.integers(0, 3))
    def finish(self, what, rank, pick):
        rank, lease = self.pick(what, rank, pick)
        if lease is not None:
            self.finish_one(rank, lease)

    def finish_one(self, rank, lease):
        is_news = lease.block not in self.done
        assert self.scheduler.finish(rank, lease) == is_news
        if self.held.get(lease.block) == (rank, lease) or is_news:
            self.held.pop(lease.block, None)
        self.pending.discard(lease.block)
        self.failed.discard(lease.block)
        self.done.add(lease.block)

    @rule(what=leases, rank=st.none() | st.integers(0, 3), pick=st.integers(0, 3))
    def fail(self, what, rank, pick):
        rank, lease = self.pick(what, rank, pick)
        if lease is not None:
            self.fail_one(rank, lease)

    def fail_one(self, rank, lease):
        state = self.scheduler.fail(rank, lease)
        if self.held.get(lease.block) != (rank, lease):
            assert state is None
            return
        del self.held[lease.block]
        if lease.attempt == self.max_attempts:
            assert state == State.FAILED
            self.failed.add(lease.block)
        else:
            assert state == State.PENDING
            self.pending.add(lease.block)
            culprits = self.culprits.setdefault(lease.block, set())
            culprits.add(rank)
            if len(culprits) == self.size:
                culprits.clear()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_done=st.booleans())
    def report(self, data, is_done):
        """The usual case: a rank reports a lease that it holds."""
        block = data.draw(st.sampled_from(sorted(self.held)))
        rank, lease = self.held[block]
        (self.finish_one if is_done else self.fail_one)(rank, lease)

    def pick(self, what, rank, pick):
        owner, leases = what
        if not leases:
            return 0, None
        return owner if rank is None else rank % self.size, leases[pick % len(leases)]

    @invariant()
    def every_block_is_in_exactly_one_state(self):
        if not hasattr(self, "scheduler"):
            return
        counts = len(self.pending), len(self.held), len(self.done), len(self.failed)
        scheduler = self.scheduler
        assert counts == (
            scheduler.num_pending,
            scheduler.num_leased,
            scheduler.num_done,
            scheduler.num_failed,
        )
        for state, blocks in (
            (State.PENDING, self.pending),
            (State.LEASED, self.held),
            (State.FAILED, self.failed),
        ):
            assert all(scheduler.state(block) == state for block in blocks)
        assert {
            block for block in self.tries if scheduler.state(block) == State.FAILED
        } == self.failed
        assert scheduler.is_finished == (not self.pending and not self.held)

    def teardown(self):
        """Whatever has happened, the ranks can finish every block that was not given up."""
        if not hasattr(self, "scheduler"):
            return
        for rank, lease in list(self.held.values()):
            assert self.scheduler.finish(rank, lease)
        # Also what another rank was quicker with is reported in the end.
        for rank, lease in self.given:
            self.scheduler.give_back(rank, lease)
        for _ in range(2):
            for rank in range(self.size):
                drain(self.scheduler, rank)
        assert self.scheduler.is_finished
        assert self.scheduler.num_failed == len(self.failed)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class Survivors(RuleBasedStateMachine):
    """Ranks fail, die, are given up and come back; whatever happens, no block is lost."""

    NUM_BLOCKS = 7

    @initialize(size=st.integers(1, 4), mode=st.sampled_from(["dynamic", "static"]))
    def start(self, size, mode):
        self.ranks, self.away = set(range(size)), set()
        self.scheduler = Scheduler(self.NUM_BLOCKS, ranks=range(size), mode=mode, max_attempts=3)
        self.held = {rank: set() for rank in range(size)}
        todo = np.ones(self.NUM_BLOCKS, bool)
        if mode == "static":
            for rank in range(size):
                own = static_blocks(todo, size, rank)
                self.held[rank] = {Lease(block=block, attempt=1) for block in own}
        self.untold = {rank: set() for rank in range(size)}
        self.done, self.failures, self.deaths, self.now = set(), {}, {}, 0.0

    def draw(self, data, ranks):
        return data.draw(st.sampled_from(sorted(ranks)))

    @rule(data=st.data(), num=st.integers(1, 3))
    def lease(self, data, num):
        self.now += 1
        rank = self.draw(data, self.ranks - self.away)
        self.held[rank].update(self.scheduler.lease(rank, num, self.now))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), way=st.sampled_from(["done", "failed", "back"]), is_told=st.booleans())
    def report(self, data, way, is_told):
        rank = self.draw(data, [rank for rank, held in self.held.items() if held])
        lease = data.draw(
            st.sampled_from(sorted(self.held[rank], key=lambda x: (x.block, x.attempt)))
        )
        self.held[rank].discard(lease)
        if not is_told:
            self.untold[rank].add(lease)
        if way == "done":
            self.scheduler.finish(rank, lease)
            self.done.add(lease.block)
        elif way == "failed":
            if self.scheduler.fail(rank, lease) is not None:
                self.failures[lease.block] = self.failures.get(lease.block, 0) + 1
        else:
            self.scheduler.give_back(rank, lease)

    @rule(data=st.data())
    def back_up(self, data):
        late = self.scheduler.late_leases(self.now + 100.0, 1.0)
        if late:
            rank, lease = data.draw(st.sampled_from(late))
            assert self.scheduler.holds(rank, lease)
            other = self.draw(data, self.ranks - self.away)
            again = self.scheduler.back_up(other, lease.block, self.now)
            if again is not None:
                assert other != rank
                assert self.scheduler.holds(other, again)
                self.held[other].add(again)

    @precondition(lambda self: len(self.ranks - self.away) > 1)
    @rule(data=st.data())
    def give_up(self, data):
        rank = self.draw(data, self.ranks - self.away)
        self.away.add(rank)
        self.scheduler.give_up_rank(rank)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def welcome_back(self, data):
        rank = self.draw(data, self.away)
        self.away.discard(rank)
        self.scheduler.welcome_back(rank)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def reopen(self, data):
        block = self.draw(data, self.done)
        self.scheduler.reopen(block)
        self.done.discard(block)
        assert self.scheduler.state(block) == State.PENDING

    @precondition(lambda self: len(self.ranks) > 1)
    @rule(data=st.data(), is_new=st.booleans())
    def die(self, data, is_new):
        rank = self.draw(data, self.ranks)
        self.ranks.discard(rank)
        self.held.pop(rank)
        self.untold.pop(rank)
        self.away.clear()
        if is_new:
            self.take_over()
        told = {r: self.held[r] | self.untold[r] for r in self.ranks}
        lost = [] if is_new else [rank]
        for dead, lease, _ in self.scheduler.regroup(told, self.now, lost=lost):
            assert dead == rank
            self.deaths[lease.block] = self.deaths.get(lease.block, 0) + 1
        # What was told before is told again, and counts as it did.
        before = self.scheduler.num_failed
        for r in self.ranks:
            for lease in self.untold[r]:
                if lease.block in self.done:
                    self.scheduler.finish(r, lease)
                else:
                    self.scheduler.give_back(r, lease)
            self.untold[r].clear()
        assert self.scheduler.num_failed == before

    def take_over(self):
        failed = failed_blocks(self.scheduler, self.NUM_BLOCKS)
        done = np.isin(np.arange(self.NUM_BLOCKS), sorted(self.done))
        self.scheduler = Scheduler(
            self.NUM_BLOCKS, ranks=sorted(self.ranks), done=done, max_attempts=3
        )
        tries = {b: [0] * n for b, n in self.failures.items() if b not in self.done}
        died = {b: [9] * n for b, n in self.deaths.items()}
        self.scheduler.recall(tries, died, failed)

    @invariant()
    def every_block_is_in_one_state(self):
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        states = [scheduler.state(block) for block in range(self.NUM_BLOCKS)]
        counts = (scheduler.num_pending, scheduler.num_leased)
        counts += (scheduler.num_done, scheduler.num_failed)
        assert counts == tuple(states.count(state) for state in State)
        assert {b for b, state in enumerate(states) if state == State.DONE} == self.done
        for block in failed_blocks(scheduler, self.NUM_BLOCKS):
            has_failed = self.failures.get(block, 0) >= 3
            assert has_failed or self.deaths.get(block, 0) >= MOST_DEATHS

    def teardown(self):
        """Those who are left and not given up finish all that has not failed."""
        if not hasattr(self, "scheduler"):
            return
        left = sorted(self.ranks - self.away)
        for rank in left:
            for lease in self.held[rank]:
                if self.scheduler.holds(rank, lease):
                    self.scheduler.finish(rank, lease)
                else:
                    self.scheduler.give_back(rank, lease)
        for _ in range(3):
            for rank in left:
                drain(self.scheduler, rank)
        assert self.scheduler.is_finished


TestSurvivors = Survivors.TestCase
TestSurvivors.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
