"""Decides which rank computes which block next.

Events in, decisions out. Knows no MPI, no clock (`now` is passed in), no files and no geometry.

    pending --lease--> leased --finish--> done
       ^                 |
       '----- fail ------+----- fail, the last attempt -----> failed

A block that takes long may be leased to a second rank as well: the first result wins.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from mpichunk.messages import Lease, State

WINDOW = 4096
"""Blocks of the state array that are searched at a time for pending ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """How a rank holds a block."""

    attempt: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tries:
    """What has become of a block that failed at least once."""

    num_tries: int
    ranks: frozenset[int]


class Scheduler:
    """The state of every block: one byte each, and Python objects only for those in flight.

    Args:
        num_blocks: Length of the plan.
        size: Number of ranks, 0 to size - 1.
        ranks: Their numbers, in order, when some have been lost.
        done: (num_blocks,) True for blocks that need not be computed; default: none.
        mode: `dynamic` hands out blocks one by one; with `static` every rank holds from the start
            what `static_blocks` says, and only blocks that failed are handed out.
        max_attempts: How often a block is tried before it counts as failed.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        size: int = 1,
        ranks: Iterable[int] | None = None,
        done: npt.NDArray[np.bool_] | None = None,
        mode: str = "dynamic",
        max_attempts: int = 3,
    ) -> None:
        self._ranks = tuple(range(size) if ranks is None else ranks)
        self._max_attempts = max_attempts
        self._states: npt.NDArray[np.uint8] = np.zeros(num_blocks, np.uint8)
        if done is not None:
            self._states[done] = State.DONE
        self._counts = [int(np.count_nonzero(self._states == state)) for state in State]

        # In flight. Static runs are held without an entry: `_run_starts` tells whose they are.
        self._holders: dict[int, dict[int, _Holder]] = {}
        self._num_held: Counter[int] = Counter()
        self._given_up: set[int] = set()
        self._run_starts: list[int] = []

        # Blocks to lease: first those never tried, in plan order, then those that failed, by the
        # ranks that have failed on them. Trying again late gives a fault time to pass.
        self._fresh = self._pending_blocks()
        self._tries: dict[int, _Tries] = {}
        self._again: dict[frozenset[int], deque[int]] = {}

        if mode == "static":
            self._lease_runs()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that compute, in order."""
        return self._ranks

    @property
    def is_finished(self) -> bool:
        """Whether every block is done or failed."""
        return self.num_done + self.num_failed == len(self._states)

    @property
    def num_pending(self) -> int:
        """Blocks that can be leased."""
        return self._counts[State.PENDING]

    @property
    def num_leased(self) -> int:
        """Blocks that ranks hold."""
        return self._counts[State.LEASED]

    @property
    def num_done(self) -> int:
        """Blocks that are done, those of earlier runs included."""
        return self._counts[State.DONE]

    @property
    def num_failed(self) -> int:
        """Blocks that have been tried as often as allowed."""
        return self._counts[State.FAILED]

    def state(self, block: int) -> State:
        """Return the state of one block."""
        return State(int(self._states[block]))

    def failed_blocks(self) -> npt.NDArray[np.int64]:
        """Return the failed blocks in plan order."""
        return np.flatnonzero(self._states == State.FAILED)

    def lease(self, rank: int, num_blocks: int, now: float) -> tuple[Lease, ...]:
        """Lease at most `num_blocks` blocks to `rank`, none if there is nothing for it now.

        A rank that holds a block is given no more than its equal share of what is unfinished, so
        that the ranks that happen to ask first do not take all of a short run, or of a run's end.
        """
        share = max(1, (self.num_pending + self.num_leased) // len(self._ranks))
        leases: list[Lease] = []
        while len(leases) < num_blocks and self._num_held[rank] < share:
            block = self._next_block(rank)
            if block is None:
                break
            leases.append(self._hold(rank, block, now))
        return tuple(leases)

    def finish(self, rank: int, lease: Lease) -> bool:
        """Count a block as done; return False for a late duplicate, which changes nothing.

        The first result wins, whoever brings it: the bytes of a block do not depend on the rank.
        """
        self._release(rank, lease)
        if self._states[lease.block] == State.DONE:
            return False
        self._move(lease.block, State.DONE)
        self._tries.pop(lease.block, None)
        return True

    def fail(self, rank: int, lease: Lease) -> State | None:
        """Take a failed block back; return its new state, or None for a lease that was not held.

        The block is pending again, for another rank where there is one that has not failed on it,
        until it has been tried `max_attempts` times.
        """
        if not self._release(rank, lease) or self._states[lease.block] != State.LEASED:
            return None
        num_tries = self._count_try(rank, lease)
        if lease.block in self._holders:
            return State.LEASED
        if num_tries >= self._max_attempts:
            self._move(lease.block, State.FAILED)
            self._tries.pop(lease.block, None)
            return State.FAILED
        self._queue_again(lease.block)
        return State.PENDING

    def late_blocks(self, now: float, seconds: float) -> list[int]:
        """Return the blocks that one rank alone has held for long, those held longest first.

        Args:
            now: Seconds.
            seconds: What is long for one block; a rank works on all that it holds.
        """
        found: list[tuple[float, int]] = []
        for block, holders in self._holders.items():
            ((rank, holder), *others) = holders.items()
            is_late = now - holder.since > seconds * max(1, self._num_held[rank])
            if is_late and not others and self._states[block] == State.LEASED:
                found.append((holder.since, block))
        return [block for _, block in sorted(found)]

    def back_up(self, rank: int, block: int, now: float) -> Lease | None:
        """Lease a block that another rank holds to a rank without one; None if it must not."""
        tries = self._tries.get(block)
        has_failed = tries is not None and rank in tries.ranks
        if self._num_held[rank] or has_failed or rank in self._holders[block]:
            return None
        return self._hold(rank, block, now)

    def give_up_rank(self, rank: int) -> None:
        """Make pending what a rank alone holds; it may yet finish it."""
        self._given_up.add(rank)
        held = [block for block, holders in self._holders.items() if rank in holders]
        for block in held:
            del self._holders[block][rank]
            if not self._holders[block]:
                del self._holders[block]
        self._num_held[rank] = 0
        for block in held:
            if self._states[block] == State.LEASED and block not in self._holders:
                self._make_pending(block)
        self._give_up_run(rank)

    def welcome_back(self, rank: int) -> None:
        """Count on a rank that was given up."""
        self._given_up.discard(rank)

    def regroup(self, held: Mapping[int, Iterable[Lease]], now: float) -> None:
        """Go on with other ranks: they hold what they say and no more; the rest is pending.

        Args:
            held: By rank, what it computes, or has finished without knowing whether it counts.
            now: Seconds.
        """
        self._ranks = tuple(rank for rank in self._ranks if rank in held)
        before = self._states == State.LEASED
        self._states[before] = State.PENDING
        self._holders.clear()
        self._num_held.clear()
        self._run_starts.clear()
        for rank, leases in held.items():
            for lease in leases:
                if self._states[lease.block] in (State.PENDING, State.LEASED):
                    self._states[lease.block] = State.LEASED
                    holder = _Holder(attempt=lease.attempt, since=now)
                    self._holders.setdefault(lease.block, {})[rank] = holder
                    self._num_held[rank] += 1
        self._counts = [int(n) for n in np.bincount(self._states, minlength=len(State))]
        self._fresh = self._pending_blocks()
        self._again.clear()
        self._given_up.clear()
        for block in self._tries:
            if self._states[block] == State.PENDING:
                self._queue_again(block)

    def recall(self, tries: Mapping[int, Sequence[int]], given_up: Iterable[int]) -> None:
        """Remember what an earlier scheduler of this run has seen fail; to be called first.

        Args:
            tries: By block the ranks that it has failed on, one entry a try.
            given_up: Blocks tried as often as allowed.
        """
        for block, ranks in tries.items():
            if self._states[block] == State.PENDING:
                self._tries[block] = _Tries(num_tries=len(ranks), ranks=frozenset(ranks))
                self._queue_again(block)
        for block in given_up:
            if self._states[block] == State.PENDING:
                self._move(block, State.FAILED)
                self._tries.pop(block, None)

    def give_back(self, rank: int, lease: Lease) -> None:
        """Take back a lease that was not begun, when no more will be leased: the run ends early."""
        is_leased = self._release(rank, lease) and self._states[lease.block] == State.LEASED
        if is_leased and lease.block not in self._holders:
            self._move(lease.block, State.PENDING)

    def _lease_runs(self) -> None:
        """Give each rank its static run."""
        todo = self._states == State.PENDING
        num_todo, size = self.num_pending, len(self._ranks)
        runs = [static_run(num_todo, size, place) for place in range(size)]
        find = _place_finder(todo)
        self._run_starts = [find(run.start) for run in runs if run]
        self._states[todo] = State.LEASED
        self._counts[State.PENDING] -= num_todo
        self._counts[State.LEASED] += num_todo
        self._fresh = iter(())

    def _pending_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Yield the blocks never tried, in plan order; a block once passed does not come again."""
        stop = len(self._states) if stop is None else stop
        for first in range(start, stop, WINDOW):
            window = self._states[first : min(first + WINDOW, stop)]
            for block in (np.flatnonzero(window == State.PENDING) + first).tolist():
                if block not in self._tries:
                    yield block

    def _next_block(self, rank: int) -> int | None:
        """Take the next block for `rank` off its queue."""
        while (block := self._take(rank)) is not None:
            # A late result may have come while the block was waiting to be tried again.
            if self._states[block] == State.PENDING:
                return block
        return None

    def _take(self, rank: int) -> int | None:
        """Take a block off the fresh ones, else off those that failed on other ranks only."""
        block = next(self._fresh, None)
        if block is not None:
            return block
        # There are at most as many queues as sets of ranks, however many blocks have failed.
        for ranks, queue in self._again.items():
            if rank not in ranks:
                block = queue.popleft()
                if not queue:
                    del self._again[ranks]
                return block
        return None

    def _hold(self, rank: int, block: int, now: float) -> Lease:
        """Make `rank` the holder of a pending block."""
        tries = self._tries.get(block)
        lease = Lease(block=block, attempt=tries.num_tries + 1 if tries else 1)
        self._holders.setdefault(block, {})[rank] = _Holder(attempt=lease.attempt, since=now)
        self._num_held[rank] += 1
        self._move(block, State.LEASED)
        return lease

    def _release(self, rank: int, lease: Lease) -> bool:
        """End a lease; return whether `rank` held it."""
        holders = self._holders.get(lease.block)
        if holders is None:
            return lease.attempt == 1 and self._is_in_run(rank, lease.block)
        if rank not in holders or holders[rank].attempt != lease.attempt:
            return False
        del holders[rank]
        if not holders:
            del self._holders[lease.block]
        self._num_held[rank] -= 1
        return True

    def _is_in_run(self, rank: int, block: int) -> bool:
        """Return whether a leased block without an entry is part of the static run of `rank`."""
        if self._states[block] != State.LEASED or rank not in self._ranks:
            return False
        return bisect_right(self._run_starts, block) - 1 == self._ranks.index(rank)

    def _count_try(self, rank: int, lease: Lease) -> int:
        """Remember that a block has failed on a rank; return how often it has failed."""
        tries = self._tries.get(lease.block)
        num_tries = max(lease.attempt, tries.num_tries + 1 if tries else 1)
        ranks = (tries.ranks if tries else frozenset()) | {rank}
        self._tries[lease.block] = _Tries(num_tries=num_tries, ranks=ranks)
        return num_tries

    def _give_up_run(self, rank: int) -> None:
        """Make pending what has not been heard of in the static run of a rank."""
        if not self._run_starts or rank not in self._ranks:
            return
        place = self._ranks.index(rank)
        ends = [*self._run_starts[1:], len(self._states)]
        if place >= len(ends):
            return
        start, stop = self._run_starts[place], ends[place]
        is_rest = self._states[start:stop] == State.LEASED
        is_rest[[block - start for block in self._holders if start <= block < stop]] = False
        self._states[start:stop][is_rest] = State.PENDING
        num_rest = int(np.count_nonzero(is_rest))
        self._counts[State.LEASED] -= num_rest
        self._counts[State.PENDING] += num_rest
        self._fresh = chain(self._fresh, self._pending_blocks(start, stop))

    def _make_pending(self, block: int) -> None:
        """Take a block back that has not failed, or not now."""
        if block in self._tries:
            self._queue_again(block)
        else:
            self._again.setdefault(frozenset(), deque()).append(block)
            self._move(block, State.PENDING)

    def _queue_again(self, block: int) -> None:
        """Make a block pending for the ranks that have not failed on it, or for all if all have."""
        tries = self._tries[block]
        others = set(self._ranks) - self._given_up
        ranks = tries.ranks & others
        if len(ranks) == len(others):
            ranks = frozenset()
        self._tries[block] = _Tries(num_tries=tries.num_tries, ranks=ranks)
        self._again.setdefault(ranks, deque()).append(block)
        self._move(block, State.PENDING)

    def _move(self, block: int, state: State) -> None:
        """Change the state of a block."""
        self._counts[self._states[block]] -= 1
        self._counts[state] += 1
        self._states[block] = state


def static_run(num_todo: int, size: int, rank: int) -> range:
    """Return the places, among the blocks still to do, of the run of `rank`.

    The runs of all ranks are contiguous, in order, and their lengths differ by at most one.
    """
    length, num_longer = divmod(num_todo, size)
    start = rank * length + min(rank, num_longer)
    return range(start, start + length + (rank < num_longer))


def static_blocks(todo: npt.NDArray[np.bool_], size: int, rank: int) -> Iterator[int]:
    """Yield the blocks of the static run of `rank`; `todo` is (num_blocks,)."""
    run = static_run(int(np.count_nonzero(todo)), size, rank)
    if not run:
        return
    find = _place_finder(todo)
    start, stop = find(run[0]), find(run[-1]) + 1
    for first in range(start, stop, WINDOW):
        yield from (np.flatnonzero(todo[first : min(first + WINDOW, stop)]) + first).tolist()


def _place_finder(todo: npt.NDArray[np.bool_]) -> Callable[[int], int]:
    """Return what finds the block of a place among those to do, without a list of them all."""
    starts = np.arange(0, len(todo), WINDOW)
    num_before = np.cumsum(np.add.reduceat(todo, starts, dtype=np.int64))

    def find(place: int) -> int:
        window = int(np.searchsorted(num_before, place, side="right"))
        in_window = place - (int(num_before[window - 1]) if window else 0)
        start = window * WINDOW
        return start + int(np.flatnonzero(todo[start : start + WINDOW])[in_window])

    return find
