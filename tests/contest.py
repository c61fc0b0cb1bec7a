"""Ranks that compute and write blocks on a made-up network and a made-up disk, in one thread.

Coordinator, scheduler, workers and permits are real; what they wait for happens when a random
number says so: a block is computed, a letter arrives, a thread wakes, a rank dies.
"""

import random
import sys
from collections import defaultdict, deque

import numpy as np

from mpichunk.geometry.box import Box
from mpichunk.roles.coordinator import Coordinator
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.messages import (
    FINISHED,
    RANK_LOST,
    AskToWrite,
    Assign,
    Done,
    Drain,
    State,
    ToWorker,
    WriteVerdict,
)
from mpichunk.schedule.scheduler import Scheduler
from mpichunk.schedule.staticrun import static_blocks
from tests.contestrank import LEASE_SECONDS, Rank


class Disk:
    """What is stored of each block, and who writes it."""

    def __init__(self):
        self.writers, self.values, self.may_overlap = defaultdict(list), {}, set()

    def begin(self, rank, block):
        others = self.writers[block]
        assert not others or block in self.may_overlap, f"{others} and {rank} write {block}"
        self.writers[block].append(rank)

    def end(self, rank, block, value):
        self.writers[block].remove(rank)
        if value is not None:
            self.values[block] = value


class Book:
    """A journal, also of what is lost with a coordinator that dies."""

    offsets = property(lambda self: self)

    def __init__(self):
        self.lines, self.num_synced, self.num_before = [], 0, None

    def append(self, record, state, *, core, rank, host):
        checksum = record.checksum if isinstance(record, Done) else None
        error = getattr(record, "error", None)
        self.lines.append((record.lease.block, state, rank, checksum, error))

    def sync(self):
        self.num_synced = len(self.lines)
        return 0.0

    def last(self):
        """Return the last line of each block."""
        return {line[0]: line for line in self.lines}

    def begin(self):
        """As `JournalOffsets.begin`."""
        self.num_before = self.num_synced if self.num_before is None else self.num_before

    def checksum(self, block):
        """As `JournalOffsets.checksum`, but that what is asked for must be there."""
        found = [line[3] for line in self.lines[self.num_before :] if line[:2] == (block, "done")]
        assert found, f"block {block} was done before anything was in doubt"
        return found[-1]


class World:
    """All ranks; `run` lets things happen until every rank has ended."""

    def __init__(
        self,
        seed,
        *,
        size,
        num_blocks,
        mode="dynamic",
        depth=2,
        fails=lambda rank, lease: False,
        value=lambda rank: "xxh3:0",
        write_failures=0.0,
        deaths=0,
        give_ups=0,
        standstills=0,
        limit=None,
        max_attempts=3,
        slow=lambda rank: False,
        seconds=(0.01,),
        drains=0,
    ):
        self.random, self.now, self.depth = random.Random(seed), 0.0, depth
        self.fails, self.value, self.write_failures = fails, value, write_failures
        self.deaths, self.give_ups, self.limit, self.slow = deaths, give_ups, limit, slow
        self.max_attempts, self.drains, self.standstills = max_attempts, drains, standstills
        self.still = {}
        self.seconds = lambda: self.random.choice(seconds)
        self.most_waiting = 0
        self.num_blocks, self.computed = num_blocks, defaultdict(int)
        self.disk, self.book, self.mail = Disk(), Book(), defaultdict(deque)
        self.given_up, self.ended, self.was_given_up = set(), set(), set()
        todo = np.ones(num_blocks, bool)
        self.ranks = {
            rank: Rank(self, rank, static_blocks(todo, size, rank) if mode == "static" else ())
            for rank in range(size)
        }
        self.hosts = dict.fromkeys(range(size), "host")
        self.lead(Scheduler(num_blocks, ranks=range(size), mode=mode, max_attempts=max_attempts))

    @property
    def head(self):
        return min(self.ranks)

    def lead(self, scheduler):
        """Make the coordinator."""
        durations = BlockDurations(1.0)
        durations.note(0.01)
        limit = sys.maxsize if self.limit is None else self.limit
        breaker = Breaker(num_ranks=len(self.ranks), max_consecutive_failures=limit)
        self.scheduler = scheduler
        self.coordinator = Coordinator(
            scheduler,
            self.book,
            core_of=lambda block: Box.from_shape((block, 0, 0), (1, 1, 1)),
            hosts={rank: self.hosts[rank] for rank in self.ranks},
            breaker=breaker,
            durations=durations,
        )

    def run(self, max_steps=20_000):
        for _ in range(max_steps):
            if self.is_over():
                return
            self.step()
        raise AssertionError("it does not end")

    def is_over(self):
        ended = all(
            rank.worker.is_ended for n, rank in self.ranks.items() if n not in self.given_up
        )
        return ended and not any(self.mail.values())

    def step(self):
        draw = self.random
        self.now += draw.choice([0.0, 0.01, 0.1, 0.6])
        if self.deaths and len(self.ranks) > 1 and draw.random() < 0.02:
            self.deaths -= 1
            return self.lose(draw.choice(list(self.ranks)))
        if self.give_ups and len(self.ranks) > 1 and draw.random() < 0.05:
            self.give_ups -= 1
            return self.give_up(draw.choice([r for r in self.ranks if r != self.head]))
        if self.standstills and len(self.still) + 1 < len(self.ranks) and draw.random() < 0.05:
            self.standstills -= 1
            return self.stand_still(draw.choice([r for r in self.ranks if r not in self.still]))
        if self.still and draw.random() < 0.1:
            return self.look_after(draw.choice(list(self.still)))
        if self.drains and draw.random() < 0.01:
            self.drains -= 1
            return self.coordinator.handle(self.head, Drain(reason="SIGTERM"))
        away = sorted(self.given_up.difference(self.still))
        if away and draw.random() < 0.03:
            return self.welcome_back(draw.choice(away))
        number = draw.choice([rank for rank in self.ranks if self.takes_turns(rank)])
        rank = self.ranks[number]
        actions = rank.actions() if number not in self.still else []
        if actions and draw.random() < (0.05 if self.slow(number) else 0.6):
            return draw.choice(actions)()
        self.turn(number, rank)
        return None

    def takes_turns(self, number):
        if number in self.still:
            return self.still[number][1]
        return number not in self.given_up

    def stand_still(self, number):
        """Let nothing come forward on a rank; its main thread goes on, or not even that.

        That of the coordinator does: when it does not, it gives up nobody for a while.
        """
        goes_on = number == self.head or self.random.random() < 0.5
        self.still[number] = self.now, goes_on

    def look_after(self, number):
        """Let a rank go on, after a while, and perhaps after it was given up."""
        since, _ = self.still[number]
        # Of its last step the coordinator has heard, though late; by then its leases are late.
        if self.now - since > 1.1 * LEASE_SECONDS and self.random.random() < 0.5:
            self.give_up(number, is_still=True)
        if number not in self.given_up or self.random.random() < 0.3:
            del self.still[number]
            if number in self.given_up:
                self.turn(number, self.ranks[number])
                self.welcome_back(number)

    def turn(self, number, rank):
        """Take a turn of the main thread."""
        for (source, dest), letters in list(self.mail.items()):
            if dest == number:
                for _ in range(self.random.randint(0, len(letters))):
                    self.deliver(source, number, letters.popleft())
        self.post(number, [(self.head, message) for message in rank.worker.step()])
        num_submitted = len(rank.waiting) + len(rank.writes) + rank.records.qsize()
        self.most_waiting = max(self.most_waiting, len(rank.worker.held) - num_submitted)
        if number == self.head:
            self.post(number, self.coordinator.assign(self.now))
            self.post(number, self.coordinator.commit(self.now))
        self.tell_end(number, rank)

    def tell_end(self, number, rank):
        """Send the last sign of life."""
        if rank.worker.is_ended and number not in self.ended:
            self.ended.add(number)
            self.mail[number, self.head].append("ended")

    def deliver(self, source, dest, message):
        if message == "ended":
            self.coordinator.note_end(source)
        elif isinstance(message, AskToWrite):
            verdict = self.coordinator.may_write(source, message.lease)
            self.mail[dest, source].append(WriteVerdict(lease=message.lease, may_write=verdict))
        elif isinstance(message, ToWorker):
            self.ranks[dest].worker.handle(message)
        else:
            self.coordinator.handle(source, message)

    def post(self, source, outgoing):
        for dest, message in outgoing:
            self.mail[source, dest].append(message)

    def lose(self, number):
        """Let a rank die, and the others begin again."""
        head = self.head
        self.ranks.pop(number).die()
        self.given_up.discard(number)
        if number == head:
            self.take_over()
        self.mail.clear()
        self.ended.clear()
        self.given_up.clear()
        holdings = {n: rank.worker.rejoin() for n, rank in self.ranks.items()}
        stops = [h.stop for h in holdings.values() if h.stop is not None]
        self.coordinator.regroup(
            {n: holding.leases for n, holding in holdings.items()},
            self.now,
            writing={n: holding.writing for n, holding in holdings.items()},
            ending=next((stop for stop in stops if stop.reason != FINISHED), None),
            idle={n for n, holding in holdings.items() if holding.is_idle},
        )

    def take_over(self):
        """Make a coordinator that knows what is in the journal and no more."""
        del self.book.lines[self.book.num_synced :]
        done = np.zeros(self.num_blocks, bool)
        for block, line in self.book.last().items():
            done[block] = line[1] == "done"
        scheduler = Scheduler(
            self.num_blocks, ranks=sorted(self.ranks), done=done, max_attempts=self.max_attempts
        )
        failed_on, died_on = defaultdict(list), defaultdict(list)
        for block, state, rank, _, error in self.book.lines:
            if state == "retry":
                (died_on if error == RANK_LOST else failed_on)[block].append(rank)
        given_up = [line[0] for line in self.book.lines if line[1] == "failed"]
        scheduler.recall(failed_on, died_on, given_up)
        self.lead(scheduler)

    def give_up(self, number, *, is_still=False):
        """Take a rank for hung, whatever it is doing."""
        if number in self.given_up:
            return
        self.given_up.add(number)
        self.was_given_up.add(number)
        rank = self.ranks[number]
        # What such a rank writes cannot be prevented, only found out.
        if is_still:
            # Only what it had been allowed to write: it knows that it stood still.
            letters = self.mail[self.head, number]
            allowed = {m.lease for m in letters if isinstance(m, WriteVerdict) and m.may_write}
            allowed |= rank.permits.writing()
            self.disk.may_overlap.update(lease.block for lease in allowed)
            self.coordinator.give_up_rank(number)
            return
        self.disk.may_overlap.update(lease.block for lease in rank.worker.held)
        for message in self.mail[self.head, number]:
            if isinstance(message, Assign):
                self.disk.may_overlap.update(lease.block for lease in message.leases)
        self.coordinator.give_up_rank(number)

    def welcome_back(self, number):
        self.given_up.discard(number)
        self.coordinator.welcome_back(number)

    def check(self):
        """Compare the journal with the disk."""
        assert self.scheduler.is_finished
        self.check_done()
        states = [self.scheduler.state(block) for block in range(self.num_blocks)]
        told = self.book.last()
        for block, state in enumerate(states):
            assert told[block][1] == {State.DONE: "done", State.FAILED: "failed"}[state]

    def check_done(self):
        """Compare what the journal calls done with the disk."""
        for block, line in self.book.last().items():
            if line[1] == "done":
                assert self.disk.values[block] == line[3], f"block {block}: other bytes"
