"""Decides which rank computes which block next.

Events in, decisions out. Knows no MPI, no clock (`now` is passed in), no files and no geometry.

    pending --lease--> leased --finish--> done
       ^                 |
       '----- fail ------+----- fail, the last attempt -----> failed

A block that takes long may be leased to a second rank as well: the first result wins.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mpichunk.schedule.holders import Holders
from mpichunk.schedule.messages import Lease, State
from mpichunk.schedule.retries import Retries
from mpichunk.schedule.staticrun import static_starts

MOST_DEATHS = 3
"""Ranks that may die over a block before it is given up: it may be what kills them."""

MOST_LEASED = 2**18
"""Leases that may be out at a time, all ranks together: each is a Python object of about 400 B."""

# Plain numbers: an access to a member of an enum takes longer than what is done with it here.
PENDING, LEASED, DONE, FAILED = map(int, State)
IN_PLAY = (PENDING, LEASED)


class Scheduler:
    """The state of every block: one byte each, and Python objects only for those in flight.

    Args:
        num_blocks: Length of the plan.
        ranks: Numbers of the ranks that compute, in order.
        done: (num_blocks,) True for blocks that need not be computed; default: none.
        mode: `dynamic` hands out blocks one by one; with `static` every rank holds from the start
            what `static_blocks` says, and only blocks that failed are handed out.
        max_attempts: How often a block is tried before it counts as failed.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        ranks: Iterable[int],
        done: npt.NDArray[np.bool_] | None = None,
        mode: str = "dynamic",
        max_attempts: int = 3,
    ) -> None:
        self._ranks = tuple(ranks)
        self._max_attempts = max_attempts
        # One memory, seen as an array where many blocks are meant, as bytes where it is one.
        self._bytes = bytearray(num_blocks)
        self._states: npt.NDArray[np.uint8] = np.frombuffer(self._bytes, np.uint8)
        if done is not None:
            self._states[done] = DONE
        self._counts = [int(np.count_nonzero(self._states == state)) for state in State]

        # In flight. Static runs are held without an entry: `_run_starts` tells whose they are.
        self._holders = Holders()
        self._given_up: set[int] = set()
        self._run_starts: list[int] = []
        self._count_ranks()

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
        return self._counts[PENDING]

    @property
    def num_leased(self) -> int:
        """Blocks that ranks hold."""
        return self._counts[LEASED]

    @property
    def num_done(self) -> int:
        """Blocks that are done, those of earlier runs included."""
        return self._counts[DONE]

    @property
    def num_failed(self) -> int:
        """Blocks that have been tried as often as allowed."""
        return self._counts[FAILED]

    def state(self, block: int) -> State:
        """Return the state of one block."""
        return State(self._bytes[block])

    def lease(self, rank: int, num_blocks: int, now: float) -> tuple[Lease, ...]:
        """Lease at most `num_blocks` blocks to `rank`, none if there is nothing for it now.

        A rank that holds a block is given no more than its equal share of what is unfinished, so
        that the ranks that happen to ask first do not take all of a short run, or of a run's end.
        """
        num_blocks = min(num_blocks, self._share - self._holders.num_held(rank))
        leases: list[Lease] = []
        while len(leases) < num_blocks:
            block = self._next_block(rank)
            if block is None:
                break
            leases.append(self._hold(rank, block, now))
        return tuple(leases)

    def is_idle(self, rank: int) -> bool:
        """Return whether a rank holds no block that was leased to it."""
        return not self._holders.num_held(rank)

    def finish(self, rank: int, lease: Lease, now: float = float("-inf")) -> bool:
        """Count a block as done; return False for a late duplicate, which changes nothing.

        The first result wins, whoever brings it: the bytes of a block do not depend on the rank.
        """
        self._release(rank, lease)
        self._holders.move(rank, now)
        if self._bytes[lease.block] == DONE:
            return False
        self._move(lease.block, DONE)
        self._retries.forget(lease.block)
        return True

    def fail(self, rank: int, lease: Lease) -> State | None:
        """Take a failed block back; return its new state, or None for a lease that was not held.

        The block is pending again, for another rank where there is one that has not failed on it,
        until it has been tried `max_attempts` times.
        """
        if not self._release(rank, lease) or self._bytes[lease.block] != LEASED:
            return None
        num_tries = self._retries.count(lease.block, rank, lease.attempt)
        if lease.block in self._holders:
            return State.LEASED
        if num_tries >= self._max_attempts:
            self._retries.forget(lease.block)
            self._move(lease.block, FAILED)
            return State.FAILED
        self._make_pending(lease.block)
        return State.PENDING

    def holds(self, rank: int, lease: Lease) -> bool:
        """Return whether a rank holds a block that is still to be done."""
        if self._bytes[lease.block] != LEASED:
            return False
        if lease.block not in self._holders:
            return lease.attempt == 1 and self._is_in_run(rank, lease.block)
        holder = self._holders.of(lease.block).get(rank)
        return holder is not None and holder.attempt == lease.attempt

    def late_leases(self, now: float, seconds: float) -> list[tuple[int, Lease]]:
        """Return what one rank alone has held for long, each with its rank, the oldest first.

        Args:
            now: Seconds.
            seconds: What is long for one block; a rank works on all that it holds.
        """
        late = self._holders.late(now, seconds)
        return [(rank, lease) for rank, lease in late if self._bytes[lease.block] == LEASED]

    def back_up(self, rank: int, block: int, now: float) -> Lease | None:
        """Lease a block that another rank holds to a rank without one; None if it must not."""
        has_failed = self._retries.has_failed_on(block, rank)
        if self._holders.num_held(rank) or has_failed or rank in self._holders.of(block):
            return None
        return self._hold(rank, block, now, is_backup=True)

    def retire(self, rank: int) -> None:
        """Let no block wait for a rank any more; what it holds it may finish."""
        self._given_up.add(rank)
        self._count_ranks()
        self._retries.sort(self._others, self._is_pending)

    def give_up_rank(self, rank: int) -> None:
        """Make pending what a rank alone holds, and count on it no more; it may yet finish it."""
        self.retire(rank)
        for block in self._holders.release_all(rank):
            if self._bytes[block] == LEASED and block not in self._holders:
                self._make_pending(block)
        self._give_up_run(rank)

    def welcome_back(self, rank: int) -> None:
        """Count on a rank that was given up."""
        self._given_up.discard(rank)
        self._count_ranks()
        self._retries.sort(self._others, self._is_pending)

    def reopen(self, block: int) -> None:
        """Make a block that was done pending: what is stored of it is in doubt."""
        if self._bytes[block] == DONE:
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
        before = self._states == LEASED
        self._states[before] = PENDING
        self._holders.clear()
        self._run_starts.clear()
        for rank, leases in held.items():
            for lease in leases:
                block, is_writing = lease.block, writers.get(lease.block) == rank
                is_told = self._retries.is_told_again(block, rank, lease.attempt)
                if self._bytes[block] in IN_PLAY and (is_writing or not is_told):
                    self._bytes[block] = LEASED
                    self._holders.hold(rank, lease, now)
        self._counts = [int(n) for n in np.bincount(self._states, minlength=len(State))]
        self._fresh = self._retries.never_tried(self._states)
        self._given_up.clear()
        self._count_ranks()
        fates = [(rank, lease, self._suspect(lease.block)) for rank, lease in suspects]
        self._retries.sort_failed(self._others, self._is_pending)
        return [fate for fate in fates if fate[2] != DONE]

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
            if self._bytes[block] == PENDING:
                self._retries.forget(block)
                self._move(block, FAILED)
        self._retries.sort_failed(self._others, self._is_pending)

    def give_back(self, rank: int, lease: Lease) -> None:
        """Take back a lease that was not begun, or whose block was not to be written."""
        is_held = self._release(rank, lease) and self._bytes[lease.block] == LEASED
        if is_held and lease.block not in self._holders:
            self._make_pending(lease.block)

    def _oldest(self, rank: int) -> Lease | None:
        """Return what a rank was most likely computing."""
        oldest = self._holders.oldest(rank)
        if oldest is not None:
            return oldest
        start, _, is_rest = self._rest_of_run(rank)
        return Lease(block=start + int(np.argmax(is_rest)), attempt=1) if is_rest.any() else None

    def _suspect(self, block: int) -> State:
        """Note that a rank has died on a block; return its state."""
        num_deaths = self._retries.count_death(block)
        if num_deaths >= MOST_DEATHS and self._bytes[block] == PENDING:
            self._retries.forget(block)
            self._move(block, FAILED)
        return self.state(block)

    def _rest_of_run(self, rank: int) -> tuple[int, int, npt.NDArray[np.bool_]]:
        """Return the bounds of a static run, and which of its blocks have not been heard of."""
        starts, num_runs = self._run_starts, len(self._run_starts)
        place = min(self._places.get(rank, num_runs), num_runs)
        start, stop = [*starts, len(self._states), 0][place:][:2]
        is_rest = self._states[start:stop] == LEASED
        is_rest[[block - start for block in self._holders.between(start, stop)]] = False
        return start, stop, is_rest

    def _lease_runs(self) -> None:
        """Give each rank its static run."""
        todo = self._states == PENDING
        self._run_starts = static_starts(todo, len(self._ranks))
        self._states[todo] = LEASED
        self._counts[LEASED] += self._counts[PENDING]
        self._counts[PENDING] = 0
        self._fresh = iter(())

    def _next_block(self, rank: int) -> int | None:
        """Take the next block for `rank` off its queue."""
        while True:
            block = next(self._fresh, None)
            block = self._retries.take(rank) if block is None else block
            # A late result may have come while the block was waiting to be tried again.
            if block is None or self._is_pending(block):
                return block

    def _hold(self, rank: int, block: int, now: float, *, is_backup: bool = False) -> Lease:
        """Make `rank` a holder of a block."""
        attempt = self._retries.num_tries(block) + 1
        lease = Lease(block=block, attempt=attempt, is_backup=is_backup)
        self._holders.hold(rank, lease, now)
        self._move(block, LEASED)
        return lease

    def _release(self, rank: int, lease: Lease) -> bool:
        """End a lease; return whether `rank` held it."""
        if lease.block not in self._holders:
            return lease.attempt == 1 and self._is_in_run(rank, lease.block)
        return self._holders.release(rank, lease)

    def _is_in_run(self, rank: int, block: int) -> bool:
        """Return whether a leased block without an entry is part of the static run of `rank`."""
        if self._bytes[block] != LEASED:
            return False
        return bisect_right(self._run_starts, block) - 1 == self._places.get(rank)

    def _give_up_run(self, rank: int) -> None:
        """Make pending what has not been heard of in the static run of a rank."""
        start, stop, is_rest = self._rest_of_run(rank)
        self._states[start:stop][is_rest] = PENDING
        self._counts[LEASED] -= (num_rest := int(np.count_nonzero(is_rest)))
        self._counts[PENDING] += num_rest
        self._fresh = chain(self._fresh, self._retries.never_tried(self._states, start, stop))

    def _make_pending(self, block: int) -> None:
        """Take a block back."""
        self._retries.queue(block, self._others)
        self._move(block, PENDING)

    @property
    def _share(self) -> int:
        """How many blocks a rank may hold."""
        share = (self._counts[PENDING] + self._counts[LEASED]) // len(self._ranks)
        return max(1, min(share, MOST_LEASED // len(self._ranks)))

    def _count_ranks(self) -> None:
        """Note who is there for blocks to wait for."""
        self._places = {rank: place for place, rank in enumerate(self._ranks)}
        self._others = set(self._ranks) - self._given_up

    def _is_pending(self, block: int) -> bool:
        return self._bytes[block] == PENDING

    def _move(self, block: int, state: int) -> None:
        """Change the state of a block."""
        self._counts[self._bytes[block]] -= 1
        self._counts[state] += 1
        self._bytes[block] = state
