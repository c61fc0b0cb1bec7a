"""Which ranks hold which blocks, and since when: Python objects only for what is in flight.

Knows no states of blocks and no order among them: `scheduler` does.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mpichunk.schedule.messages import Lease


@dataclass(frozen=True, slots=True)
class Holder:
    """How a rank holds a block."""

    attempt: int
    """Which try it is."""

    since: float
    """Seconds."""

    is_backup: bool = False
    """Whether another rank held it already."""


class Holders:
    """By block the ranks that hold it, in the order in which they were given it."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[int, Holder]] = {}
        self._num_held: Counter[int] = Counter()
        self._moved: dict[int, float] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._holders

    def __iter__(self) -> Iterator[int]:
        return iter(self._holders)

    def num_held(self, rank: int) -> int:
        """Return how many blocks a rank holds."""
        return self._num_held[rank]

    def of(self, block: int) -> dict[int, Holder]:
        """Return the holders of a block, by rank."""
        return self._holders.get(block, {})

    def hold(self, rank: int, lease: Lease, since: float) -> None:
        """Note that a rank holds a block; of several tries of one rank the last one counts."""
        holders = self._holders.setdefault(lease.block, {})
        before = holders.get(rank)
        if before is None:
            self._num_held[rank] += 1
        elif before.attempt > lease.attempt:
            return
        holders[rank] = Holder(lease.attempt, since, lease.is_backup)

    def move(self, rank: int, now: float) -> None:
        """Note that a rank has finished a block."""
        self._moved[rank] = now

    def release(self, rank: int, lease: Lease) -> bool:
        """Note that a rank holds a block no longer; return whether it did, by this lease."""
        holders = self._holders.get(lease.block)
        if holders is None or rank not in holders or holders[rank].attempt != lease.attempt:
            return False
        del holders[rank]
        if not holders:
            del self._holders[lease.block]
        self._num_held[rank] -= 1
        return True

    def release_all(self, rank: int) -> list[int]:
        """Take all blocks from a rank; return them."""
        blocks = [block for block, holders in self._holders.items() if rank in holders]
        for block in blocks:
            del self._holders[block][rank]
            if not self._holders[block]:
                del self._holders[block]
        self._num_held[rank] = 0
        return blocks

    def clear(self) -> None:
        """Forget all."""
        self._holders.clear()
        self._num_held.clear()
        self._moved.clear()

    def late(self, now: float, seconds: float) -> list[tuple[int, Lease]]:
        """Return what one rank alone has held for long, each with its rank, the oldest first.

        A rank works on all that it holds, so a block may take as many times longer; but one that
        has finished nothing for long is late with all of it.

        Args:
            now: Seconds.
            seconds: What is long for one block.
        """
        found: list[tuple[float, int, Lease]] = []
        for block, holders in self._holders.items():
            if len(holders) > 1:
                continue
            ((rank, holder),) = holders.items()
            age = now - holder.since
            if age <= seconds:
                continue
            is_stuck = now - self._moved.get(rank, holder.since) > seconds
            if is_stuck or age > seconds * self._num_held[rank]:
                found.append((holder.since, rank, _lease(block, holder)))
        found.sort(key=lambda item: (item[0], item[2].block))
        return [(rank, lease) for _, rank, lease in found]

    def oldest(self, rank: int) -> Lease | None:
        """Return what a rank was most likely computing: of what it holds, what it was given first.

        Blocks are computed in the order in which they were leased.
        """
        mine = [(h[rank].since, block) for block, h in self._holders.items() if rank in h]
        if not mine:
            return None
        # Of several that were given together the first, whatever its number.
        _, block = min(mine, key=lambda item: item[0])
        return Lease(block=block, attempt=self._holders[block][rank].attempt)

    def between(self, start: int, stop: int) -> Iterable[int]:
        """Return the blocks of an interval that are held."""
        return [block for block in self._holders if start <= block < stop]


def _lease(block: int, holder: Holder) -> Lease:
    return Lease(block=block, attempt=holder.attempt, is_backup=holder.is_backup)
