"""How long a block may take, and which ranks do not move any more.

Numbers in, decisions out. Knows no clock (`now` is passed in), no MPI and no processes.

    moves --- no step for `lease_seconds` ---> hung --- killed, as MPI says ---> left behind
      ^                                         |
      '------- a step after all ---- given up <-'  cannot be killed, or MPI has no survivors
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

NUM_RECENT = 200
"""Blocks that are taken for typical."""

FIRST_FACTOR = 10.0
"""Before any block is done, a rank may take so many times the floor: nothing is measured yet."""

LATE_FACTOR = 10.0
"""A rank that takes so many times a typical block's time for a single step may hang."""

SLOW_FACTOR = 4.0
"""A lease so many times slower than a typical one is backed up by an idle rank at the end."""

LEAST_SLOW_SECONDS = 10.0
"""No lease is backed up before."""

KILL_SECONDS = 10.0
"""How long a rank that was sent SIGKILL may take to die."""


class BlockDurations:
    """What is typical of a block, measured.

    Args:
        min_lease_seconds: Floor of the deadline.
    """

    def __init__(self, min_lease_seconds: float) -> None:
        self._floor = min_lease_seconds
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._median: float | None = None

    def note(self, seconds: float) -> None:
        """Take in what a block took, all stages together."""
        self._recent.append(seconds)
        self._median = None

    @property
    def lease_seconds(self) -> float:
        """How long a lease, or a rank for a single step, may take."""
        if not self._recent:
            return FIRST_FACTOR * self._floor
        return max(self._floor, LATE_FACTOR * self._typical, 2 * max(self._recent))

    @property
    def slow_seconds(self) -> float:
        """When a block is much slower than others."""
        if not self._recent:
            return float("inf")
        return max(min(LEAST_SLOW_SECONDS, self._floor), SLOW_FACTOR * self._typical)

    @property
    def _typical(self) -> float:
        if self._median is None:
            self._median = median(self._recent)
        return self._median


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sign:
    """The last time a rank moved."""

    num_steps: float
    since: float


class HangDetector:
    """When each rank has moved last, by the steps that its signs of life tell.

    Args:
        ranks: Who takes part.
        durations: How long a step may take.
        now: Seconds.
    """

    def __init__(self, ranks: Iterable[int], durations: BlockDurations, now: float) -> None:
        self.durations = durations
        """What blocks take."""

        self.given_up: set[int] = set()
        """Ranks that nobody waits for any more; they may come back."""

        self._hung: dict[int, float] = {}
        self._signs: dict[int, _Sign] = {}
        self.regroup(ranks, now)

    @property
    def hung(self) -> set[int]:
        """Ranks that do not move, given up or not."""
        return self.given_up.union(self._hung)

    def excuse(self, rank: int) -> None:
        """Take no more notice of a rank that has ended."""
        self._signs.pop(rank, None)
        self._hung.pop(rank, None)

    def regroup(self, ranks: Iterable[int], now: float) -> None:
        """Begin anew with those who are left."""
        self._signs = {rank: _Sign(num_steps=-1.0, since=now) for rank in ranks}
        self._hung.clear()
        self.given_up.clear()

    def forgive(self, now: float) -> None:
        """Count from now on: it was this process that did not move. Who is given up stays so."""
        self._signs = {rank: replace(sign, since=now) for rank, sign in self._signs.items()}
        self._hung.clear()

    def note(self, rank: int, num_steps: float, now: float, *, is_idle: bool) -> bool:
        """Take in a sign of life; return whether a rank that was given up has come back.

        Args:
            rank: Who.
            num_steps: Changes whenever a block of the rank comes forward.
            now: Seconds.
            is_idle: Whether it holds no block, so that it need not move.
        """
        last = self._signs.get(rank)
        if last is not None and not is_idle and last.num_steps == num_steps:
            return False
        self._signs[rank] = _Sign(num_steps=num_steps, since=now)
        self._hung.pop(rank, None)
        is_back = rank in self.given_up
        self.given_up.discard(rank)
        return is_back

    def standstill_seconds(self, now: float) -> float:
        """Return for how long no rank at all has moved: then it is no fault of a single one."""
        return min((now - sign.since for sign in self._signs.values()), default=0.0)

    def new_hung(self, now: float, *, is_ending: bool = False) -> list[int]:
        """Return, once, each rank that has not moved for too long while another one has.

        Args:
            now: Seconds.
            is_ending: Whether ranks only finish what they hold: then those that move have ended.
        """
        limit = self.durations.lease_seconds
        if self.standstill_seconds(now) > limit / 2 and not is_ending:
            return []
        found = [
            rank
            for rank, sign in self._signs.items()
            if now - sign.since > limit and rank not in self._hung and rank not in self.given_up
        ]
        self._hung |= dict.fromkeys(found, now)
        return found

    def condemn(self, rank: int) -> None:
        """Take a rank for hung, whatever its signs: its process is gone."""
        if rank not in self.given_up:
            self._hung[rank] = float("-inf")

    def new_given_up(self, now: float, *, can_die: bool) -> list[int]:
        """Return, once, each hung rank that has not died in time, or could not be left behind.

        Args:
            now: Seconds.
            can_die: Whether the others can go on when a rank is killed.
        """
        patience = KILL_SECONDS if can_die else 0.0
        found = [rank for rank, since in self._hung.items() if now - since >= patience]
        for rank in found:
            del self._hung[rank]
        self.given_up.update(found)
        return found
