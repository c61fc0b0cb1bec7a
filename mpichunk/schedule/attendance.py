"""Who is there and what each rank has done, from the signs of life that they send.

The coordinator's. Knows no MPI and no clock.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from mpichunk.schedule.messages import Heartbeat
from mpichunk.schedule.progress import COUNTERS, Display, totals


class Attendance:
    """The newest counters of every rank, and whether all have ended.

    Args:
        ranks: Who takes part.
        display: Shows the sums.
        num_done: Returns the blocks done since the run started: lost ranks can no longer tell.
    """

    def __init__(
        self, ranks: Iterable[int], display: Display, *, num_done: Callable[[], int]
    ) -> None:
        self._ranks = tuple(ranks)
        self._display = display
        self._get_num_done = num_done
        self._vectors: dict[int, npt.NDArray[np.float64]] = {}
        self._ended: set[int] = set()

        self.excused: set[int] = set()
        """Ranks that nobody waits for."""

    @property
    def vectors(self) -> npt.NDArray[np.float64]:
        """(ranks, counters) of every rank that has ever sent a sign of life, in order."""
        return np.array([self._vectors[rank] for rank in sorted(self._vectors)])

    @property
    def num_done(self) -> int:
        """Blocks done since the run started."""
        return self._get_num_done()

    @property
    def is_over(self) -> bool:
        """Whether every rank that is waited for has ended."""
        # Asked in every turn: sizes only, and the sets are small or compared once, at the end.
        if len(self._ended) + len(self.excused) < len(self._ranks):
            return False
        return self._ended.union(self.excused).issuperset(self._ranks)

    def excuse(self, rank: int) -> None:
        """Wait no more for a rank."""
        self.excused.add(rank)

    def readmit(self, rank: int) -> None:
        """Wait for a rank again."""
        self.excused.discard(rank)

    def note(self, rank: int, beat: Heartbeat, now: float) -> None:
        """Take in a sign of life; those of the first rank set the pace of the display."""
        self._vectors[rank] = np.array(beat.counters)
        if beat.counters[COUNTERS.index("ended")]:
            self._ended.add(rank)
        if rank == self._ranks[0] or self.is_over:
            self._display.update(self._summed(), now)

    def regroup(self, ranks: Iterable[int]) -> None:
        """Go on with those who are left; what the others have done still counts."""
        self._ranks = tuple(ranks)
        self.excused.clear()
        self._ended.clear()
        for vector in self._vectors.values():
            for name in ("busy", "held", "ended"):
                vector[COUNTERS.index(name)] = 0.0

    def close(self) -> None:
        """Leave the terminal in order."""
        self._display.close()

    def _summed(self) -> dict[str, float]:
        """Return the sums over all ranks."""
        summed = totals(self.vectors.sum(axis=0))
        return summed | {"blocks": float(self.num_done)}
