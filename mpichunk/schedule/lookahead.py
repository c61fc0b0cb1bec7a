"""How many leases a rank asks for beyond what its pipeline holds: more where blocks are short.

Numbers in, a number out. Knows no blocks and no messages.

    blocks that take      >= 0.25 s    25 ms    <= 0.5 ms
    leases that wait          0          10       512
"""

LOOKAHEAD_SECONDS = 0.25
"""What waits is work for so long: an answer takes less, and so little work is soon done at the
end of a run, when others have none."""

MOST_WAITING = 512
"""Leases that wait at most; with so many a message costs little beside what it carries."""

STALE_SECONDS = 1.0
"""When no block has come forward for so long nothing is to wait for this rank."""

SPREAD = 4
"""Leases are given back when so many times more wait than should: block times differ."""

WEIGHT = 0.125
"""Of the newest block in the mean."""


class Lookahead:
    """Mean block time of one rank, and how many leases should wait for it."""

    def __init__(self) -> None:
        self._seconds: float | None = None
        self._moved = float("-inf")

    def note(self, seconds: float) -> None:
        """Take in what a block took: all stages, though they overlap, so rather too much."""
        before = seconds if self._seconds is None else self._seconds
        self._seconds = before + WEIGHT * (seconds - before)

    def move(self, now: float) -> None:
        """Note that a block has come forward, or that there was none."""
        self._moved = now

    def num_wanted(self, now: float) -> int:
        """Return how many leases should wait."""
        if self._seconds is None or now - self._moved > STALE_SECONDS:
            return 0
        return int(min(MOST_WAITING, LOOKAHEAD_SECONDS / max(self._seconds, 1e-9)))

    def num_excess(self, num_waiting: int, now: float) -> int:
        """Return how many of the leases that wait should be given back."""
        num_wanted = self.num_wanted(now)
        return num_waiting - num_wanted if num_waiting > SPREAD * num_wanted else 0
