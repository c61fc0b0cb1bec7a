"""Which blocks have failed where, and in which order they are tried again.

Changes no state of a block and does not know who holds it: `scheduler` does.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from mpichunk.schedule.messages import State
from mpichunk.schedule.staticrun import WINDOW

NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tries:
    """What has become of a block that failed at least once."""

    num_tries: int
    ranks: frozenset[int]


class Retries:
    """Python objects only for blocks that have failed, or were taken back from a rank.

    Waiting blocks stand in one queue for each set of ranks that have failed on them, so that taking
    one costs no search, however many have failed.
    """

    def __init__(self) -> None:
        self._tries: dict[int, _Tries] = {}
        self._waiting: dict[frozenset[int], deque[int]] = {}
        self._num_deaths: Counter[int] = Counter()

    def __contains__(self, block: int) -> bool:
        return block in self._tries

    def never_tried(
        self, states: npt.NDArray[np.uint8], start: int = 0, stop: int | None = None
    ) -> Iterator[int]:
        """Yield the pending blocks never tried, in plan order; one that was passed stays so.

        Args:
            states: (num_blocks,) the `State` of each block, which may change meanwhile.
            start: The first block.
            stop: The one after the last.
        """
        stop = len(states) if stop is None else stop
        for first in range(start, stop, WINDOW):
            window = states[first : min(first + WINDOW, stop)]
            for block in (np.flatnonzero(window == State.PENDING) + first).tolist():
                if block not in self._tries:
                    yield block

    def num_tries(self, block: int) -> int:
        """Return how often a block has failed."""
        tries = self._tries.get(block)
        return tries.num_tries if tries else 0

    def has_failed_on(self, block: int, rank: int) -> bool:
        """Return whether a rank need not try a block while there are others."""
        tries = self._tries.get(block)
        return tries is not None and rank in tries.ranks

    def is_told_again(self, block: int, rank: int, attempt: int) -> bool:
        """Return whether the failure of this attempt is counted already."""
        tries = self._tries.get(block)
        if tries is None or tries.num_tries < attempt:
            return False
        return rank in tries.ranks or not tries.ranks

    def count(self, block: int, rank: int, attempt: int) -> int:
        """Remember that a block has failed on a rank; return how often it has failed."""
        tries = self._tries.get(block, _Tries(num_tries=0, ranks=NOBODY))
        num_tries = max(attempt, tries.num_tries + 1)
        self._tries[block] = _Tries(num_tries=num_tries, ranks=tries.ranks | {rank})
        return num_tries

    def count_death(self, block: int) -> int:
        """Remember that a rank may have died of a block; return how many have."""
        self._num_deaths[block] += 1
        return self._num_deaths[block]

    def recall(
        self, failed_on: Mapping[int, Collection[int]], died_on: Mapping[int, Collection[int]]
    ) -> None:
        """Remember what others have seen: by block the ranks, one entry a try or a death."""
        for block, ranks in failed_on.items():
            self._tries[block] = _Tries(num_tries=len(ranks), ranks=frozenset(ranks))
        self._num_deaths.update({block: len(ranks) for block, ranks in died_on.items()})

    def forget(self, block: int) -> None:
        """Forget a block that is done or given up."""
        self._tries.pop(block, None)

    def queue(self, block: int, others: Collection[int]) -> None:
        """Let a block wait for those of `others` on which it has not failed; for all if it has."""
        tries = self._tries.get(block)
        ranks = NOBODY
        if tries is not None:
            ranks = tries.ranks.intersection(others)
            if len(ranks) == len(others):
                ranks = NOBODY
            self._tries[block] = _Tries(num_tries=tries.num_tries, ranks=ranks)
        self._waiting.setdefault(ranks, deque()).append(block)

    def take(self, rank: int) -> int | None:
        """Take the next block that may be tried on `rank` off its queue."""
        for ranks, waiting in self._waiting.items():
            if rank not in ranks:
                block = waiting.popleft()
                if not waiting:
                    del self._waiting[ranks]
                return block
        return None

    def sort(self, others: Collection[int], is_pending: Callable[[int], bool]) -> None:
        """Queue anew what waits: who is there to try it has changed."""
        waiting = chain(*self._waiting.values(), self._tries)
        self._waiting = {}
        self._queue_all(dict.fromkeys(filter(is_pending, waiting)), others)

    def sort_failed(self, others: Collection[int], is_pending: Callable[[int], bool]) -> None:
        """Queue anew what has failed, and nothing else."""
        self._waiting = {}
        self._queue_all(list(filter(is_pending, self._tries)), others)

    def _queue_all(self, blocks: Iterable[int], others: Collection[int]) -> None:
        for block in blocks:
            self.queue(block, others)
