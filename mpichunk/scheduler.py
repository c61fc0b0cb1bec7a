"""Decides which rank computes which block next.

Events in, decisions out. Knows no MPI, no clock (`now` is passed in), no files and no geometry.

    pending --lease--> leased --finish--> done
       ^                 |
       '----- fail ------+----- fail, the last attempt -----> failed
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.messages import Lease, State

WINDOW = 4096
"""Blocks of the state array that are searched at a time for pending ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """Who computes a leased block."""

    rank: int
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
        size: Number of ranks.
        done: (num_blocks,) True for blocks that need not be computed; default: none.
        mode: `dynamic` hands out blocks one by one; with `static` every rank holds from the start
            what `static_blocks` says, and only blocks that failed are handed out.
        max_attempts: How often a block is tried before it counts as failed.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        size: int,
        done: npt.NDArray[np.bool_] | None = None,
        mode: str = "dynamic",
        max_attempts: int = 3,
    ) -> None:
        self._size = size
        self._max_attempts = max_attempts
        self._states: npt.NDArray[np.uint8] = np.zeros(num_blocks, np.uint8)
        if done is not None:
            self._states[done] = State.DONE
        self._counts = [int(np.count_nonzero(self._states == state)) for state in State]

        # In flight. Static runs are held without an entry: `_run_starts` tells whose they are.
        self._holders: dict[int, _Holder] = {}
        self._num_held = [0] * size
        self._run_starts: list[int] = []

        # Blocks to lease: first those never tried, in plan order, then those that failed, by the
        # ranks that have failed on them. Trying again late gives a fault time to pass.
        self._fresh = self._pending_blocks()
        self._tries: dict[int, _Tries] = {}
        self._again: dict[frozenset[int], deque[int]] = {}

        if mode == "static":
            self._lease_runs()

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
        share = max(1, (self.num_pending + self.num_leased) // self._size)
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
        if lease.attempt >= self._max_attempts:
            self._move(lease.block, State.FAILED)
            self._tries.pop(lease.block, None)
            return State.FAILED
        self._try_again(rank, lease)
        return State.PENDING

    def _lease_runs(self) -> None:
        """Give each rank its static run."""
        todo = np.flatnonzero(self._states == State.PENDING)
        runs = [static_run(len(todo), self._size, rank) for rank in range(self._size)]
        self._run_starts = [int(todo[run.start]) for run in runs if run]
        self._states[todo] = State.LEASED
        self._counts[State.PENDING] -= len(todo)
        self._counts[State.LEASED] += len(todo)
        self._fresh = iter(())

    def _pending_blocks(self) -> Iterator[int]:
        """Yield the blocks never tried, in plan order; a block once passed does not come again."""
        for start in range(0, len(self._states), WINDOW):
            window = self._states[start : start + WINDOW]
            yield from (np.flatnonzero(window == State.PENDING) + start).tolist()

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
        self._holders[block] = _Holder(rank=rank, attempt=lease.attempt, since=now)
        self._num_held[rank] += 1
        self._move(block, State.LEASED)
        return lease

    def _release(self, rank: int, lease: Lease) -> bool:
        """End a lease; return whether `rank` held it."""
        holder = self._holders.get(lease.block)
        if holder is None:
            return lease.attempt == 1 and self._is_in_run(rank, lease.block)
        if (holder.rank, holder.attempt) != (rank, lease.attempt):
            return False
        del self._holders[lease.block]
        self._num_held[rank] -= 1
        return True

    def _is_in_run(self, rank: int, block: int) -> bool:
        """Return whether a leased block without an entry is part of the static run of `rank`."""
        is_leased = self._states[block] == State.LEASED
        return bool(is_leased) and bisect_right(self._run_starts, block) - 1 == rank

    def _try_again(self, rank: int, lease: Lease) -> None:
        """Queue a failed block for the ranks that have not failed on it, or for all if all have."""
        tries = self._tries.get(lease.block)
        ranks = (tries.ranks if tries else frozenset()) | {rank}
        if len(ranks) == self._size:
            ranks = frozenset()
        self._tries[lease.block] = _Tries(num_tries=lease.attempt, ranks=ranks)
        self._again.setdefault(ranks, deque()).append(lease.block)
        self._move(lease.block, State.PENDING)

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


def static_blocks(todo: npt.NDArray[Any], size: int, rank: int) -> npt.NDArray[np.int64]:
    """Return the blocks of the static run of `rank`; `todo` is (num_blocks,), true or non-zero."""
    run = static_run(int(np.count_nonzero(todo)), size, rank)
    return np.flatnonzero(todo)[run.start : run.stop]
