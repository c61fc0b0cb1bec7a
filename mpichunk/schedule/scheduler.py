"""Decides which rank computes which block next.

Events in, decisions out. Knows no MPI, no clock (`now` is passed in), no files and no geometry.

    pending --lease--> leased --finish--> done
       ^                 |
       '----- fail ------+----- fail, the last attempt -----> failed

A block that takes long may be leased to a second rank as well: the first result wins.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mpichunk.schedule.messages import Lease, State
from mpichunk.schedule.retries import Retries
from mpichunk.schedule.staticrun import static_starts

MOST_DEATHS = 3
"""Ranks that may die over a block before it is given up: it may be what kills them."""

IN_PLAY = (State.PENDING, State.LEASED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """How a rank holds a block."""

    attempt: int
    since: float
    is_backup: bool = False


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

        # Blocks to lease: first those never tried, in plan order, then those that failed. Trying
        # again late gives a fault time to pass.
        self._retries = Retries()
        self._fresh = self._retries.never_tried(self._states)

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
        self._retries.forget(lease.block)
        return True

    def fail(self, rank: int, lease: Lease) -> State | None:
        """Take a failed block back; return its new state, or None for a lease that was not held.

        The block is pending again, for another rank where there is one that has not failed on it,
        until it has been tried `max_attempts` times.
        """
        if not self._release(rank, lease) or self._states[lease.block] != State.LEASED:
            return None
        num_tries = self._retries.count(lease.block, rank, lease.attempt)
        if lease.block in self._holders:
            return State.LEASED
        if num_tries >= self._max_attempts:
            self._retries.forget(lease.block)
            self._move(lease.block, State.FAILED)
            return State.FAILED
        self._make_pending(lease.block)
        return State.PENDING

    def holds(self, rank: int, lease: Lease) -> bool:
        """Return whether a rank holds a block that is still to be done."""
        if self._states[lease.block] != State.LEASED:
            return False
        holders = self._holders.get(lease.block)
        if holders is None:
            return lease.attempt == 1 and self._is_in_run(rank, lease.block)
        return rank in holders and holders[rank].attempt == lease.attempt

    def late_leases(self, now: float, seconds: float) -> list[tuple[int, Lease]]:
        """Return what one rank alone has held for long, each with its rank, the oldest first.

        Args:
            now: Seconds.
            seconds: What is long for one block; a rank works on all that it holds.
        """
        found: list[tuple[float, int, Lease]] = []
        for block, holders in self._holders.items():
            ((rank, holder), *others) = holders.items()
            is_late = now - holder.since > seconds * max(1, self._num_held[rank])
            if is_late and not others and self._states[block] == State.LEASED:
                lease = Lease(block=block, attempt=holder.attempt, is_backup=holder.is_backup)
                found.append((holder.since, rank, lease))
        found.sort(key=lambda item: (item[0], item[2].block))
        return [(rank, lease) for _, rank, lease in found]

    def back_up(self, rank: int, block: int, now: float) -> Lease | None:
        """Lease a block that another rank holds to a rank without one; None if it must not."""
        has_failed = self._retries.has_failed_on(block, rank)
        if self._num_held[rank] or has_failed or rank in self._holders[block]:
            return None
        lease = replace(self._hold(rank, block, now), is_backup=True)
        self._holders[block][rank] = _Holder(attempt=lease.attempt, since=now, is_backup=True)
        return lease

    def retire(self, rank: int) -> None:
        """Let no block wait for a rank any more; what it holds it may finish."""
        self._given_up.add(rank)
        self._retries.sort(self._others, self._is_pending)

    def give_up_rank(self, rank: int) -> None:
        """Make pending what a rank alone holds, and count on it no more; it may yet finish it."""
        self.retire(rank)
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
        self._retries.sort(self._others, self._is_pending)

    def reopen(self, block: int) -> None:
        """Make a block that was done pending: what is stored of it is in doubt."""
        if self._states[block] == State.DONE:
            self._make_pending(block)

    def regroup(
        self,
        held: Mapping[int, Iterable[Lease]],
        now: float,
        *,
        lost: Iterable[int] = (),
        writers: Mapping[int, int] = MappingProxyType({}),
    ) -> list[tuple[int, Lease, State]]:
        """Go on with other ranks: they hold what they say and no more; the rest is pending.

        Args:
            held: By rank, what it computes, or has finished without knowing whether it counts.
            now: Seconds.
            lost: Ranks that have died since.
            writers: By block the rank that writes it, so that it has not failed there.

        Returns:
            What each lost rank may have died of, as far as it is known, and what becomes of it.
        """
        suspects = [(rank, lease) for rank in lost if (lease := self._oldest(rank)) is not None]
        self._ranks = tuple(rank for rank in self._ranks if rank in held)
        before = self._states == State.LEASED
        self._states[before] = State.PENDING
        self._holders.clear()
        self._num_held.clear()
        self._run_starts.clear()
        for rank, leases in held.items():
            for lease in leases:
                block, is_writing = lease.block, writers.get(lease.block) == rank
                is_told = self._retries.is_told_again(block, rank, lease.attempt)
                if self._states[block] in IN_PLAY and (is_writing or not is_told):
                    self._states[block] = State.LEASED
                    holder = _Holder(attempt=lease.attempt, since=now, is_backup=lease.is_backup)
                    self._holders.setdefault(block, {})[rank] = holder
                    self._num_held[rank] += 1
        self._counts = [int(n) for n in np.bincount(self._states, minlength=len(State))]
        self._fresh = self._retries.never_tried(self._states)
        self._given_up.clear()
        fates = [(rank, lease, self._suspect(lease.block)) for rank, lease in suspects]
        self._retries.sort_failed(self._others, self._is_pending)
        return [fate for fate in fates if fate[2] != State.DONE]

    def recall(
        self,
        failed_on: Mapping[int, Sequence[int]],
        died_on: Mapping[int, Sequence[int]],
        given_up: Iterable[int],
    ) -> None:
        """Remember what an earlier scheduler of this run has seen fail; to be called first.

        Args:
            failed_on: By block the ranks that it has failed on, one entry a try.
            died_on: By block the ranks that may have died of it, one entry a death.
            given_up: Blocks tried as often as allowed.
        """
        pending = {b: ranks for b, ranks in failed_on.items() if self._is_pending(b)}
        self._retries.recall(pending, died_on)
        for block in given_up:
            if self._states[block] == State.PENDING:
                self._retries.forget(block)
                self._move(block, State.FAILED)
        self._retries.sort_failed(self._others, self._is_pending)

    def give_back(self, rank: int, lease: Lease) -> None:
        """Take back a lease that was not begun, or whose block was not to be written."""
        is_held = self._release(rank, lease) and self._states[lease.block] == State.LEASED
        if is_held and lease.block not in self._holders:
            self._make_pending(lease.block)

    def _oldest(self, rank: int) -> Lease | None:
        """Return what a rank was most likely computing: of what it holds, what it has held longest.

        Blocks are computed in the order in which they were leased.
        """
        mine = [(h[rank].since, block) for block, h in self._holders.items() if rank in h]
        if mine:
            block = min(mine)[1]
            return Lease(block=block, attempt=self._holders[block][rank].attempt)
        start, _, is_rest = self._rest_of_run(rank)
        return Lease(block=start + int(np.argmax(is_rest)), attempt=1) if is_rest.any() else None

    def _suspect(self, block: int) -> State:
        """Note that a rank has died on a block; return its state."""
        num_deaths = self._retries.count_death(block)
        if num_deaths >= MOST_DEATHS and self._states[block] == State.PENDING:
            self._retries.forget(block)
            self._move(block, State.FAILED)
        return self.state(block)

    def _rest_of_run(self, rank: int) -> tuple[int, int, npt.NDArray[np.bool_]]:
        """Return the bounds of a static run, and which of its blocks have not been heard of."""
        starts, num_runs = self._run_starts, len(self._run_starts)
        place = min(self._ranks.index(rank), num_runs) if rank in self._ranks else num_runs
        start, stop = [*starts, len(self._states), 0][place:][:2]
        is_rest = self._states[start:stop] == State.LEASED
        is_rest[[block - start for block in self._holders if start <= block < stop]] = False
        return start, stop, is_rest

    def _lease_runs(self) -> None:
        """Give each rank its static run."""
        todo = self._states == State.PENDING
        self._run_starts = static_starts(todo, len(self._ranks))
        self._states[todo] = State.LEASED
        self._counts[State.LEASED] += self._counts[State.PENDING]
        self._counts[State.PENDING] = 0
        self._fresh = iter(())

    def _next_block(self, rank: int) -> int | None:
        """Take the next block for `rank` off its queue."""
        while True:
            block = next(self._fresh, None)
            block = self._retries.take(rank) if block is None else block
            # A late result may have come while the block was waiting to be tried again.
            if block is None or self._is_pending(block):
                return block

    def _hold(self, rank: int, block: int, now: float) -> Lease:
        """Make `rank` the holder of a pending block."""
        lease = Lease(block=block, attempt=self._retries.num_tries(block) + 1)
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

    def _give_up_run(self, rank: int) -> None:
        """Make pending what has not been heard of in the static run of a rank."""
        start, stop, is_rest = self._rest_of_run(rank)
        self._states[start:stop][is_rest] = State.PENDING
        self._counts[State.LEASED] -= (num_rest := int(np.count_nonzero(is_rest)))
        self._counts[State.PENDING] += num_rest
        self._fresh = chain(self._fresh, self._retries.never_tried(self._states, start, stop))

    def _make_pending(self, block: int) -> None:
        """Take a block back."""
        self._retries.queue(block, self._others)
        self._move(block, State.PENDING)

    @property
    def _others(self) -> set[int]:
        """The ranks that blocks may wait for."""
        return set(self._ranks) - self._given_up

    def _is_pending(self, block: int) -> bool:
        return bool(self._states[block] == State.PENDING)

    def _move(self, block: int, state: State) -> None:
        """Change the state of a block."""
        self._counts[self._states[block]] -= 1
        self._counts[state] += 1
        self._states[block] = state
