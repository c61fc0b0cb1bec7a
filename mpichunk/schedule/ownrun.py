"""The blocks that are a rank's own without asking, and whether it can still be sure of them.

The rank's view: with static scheduling, its run. Knows no messages and no clock.
"""

from collections.abc import Iterable, Iterator
from math import isinf

DOUBT_SHARE = 0.5
"""Of what a lease may take: the coordinator knows by signs of life, hence late, what moved last."""


class OwnRun:
    """Own blocks in order, until they are taken, or until the rank learns that others have them.

    Args:
        blocks: In the order in which they are to be computed.
    """

    def __init__(self, blocks: Iterable[int] = ()) -> None:
        self._blocks: Iterator[int] = iter(blocks)
        self._next = next(self._blocks, None)

    @property
    def is_over(self) -> bool:
        """Whether no own block is left to take."""
        return self._next is None

    def take(self) -> int | None:
        """Return the next block, None if there is none."""
        # Plain numbers only: what comes out of an array could not go into the journal.
        block = None if self._next is None else int(self._next)
        self._next = next(self._blocks, None)
        return block

    def drop(self) -> None:
        """Forget all: they are no longer this rank's."""
        self._blocks, self._next = iter(()), None


class Standstill:
    """Whether a rank has stood still for so long that it may have been given up.

    Args:
        since: As `forget`.
    """

    def __init__(self, since: float) -> None:
        self._num_steps = -1
        self._moved = since

        self.may_have_been = True
        """Whether it ever has, or cannot know yet: what it was not given since may be others'."""

    def look(self, num_steps: int, now: float, lease_seconds: float, *, is_idle: bool) -> bool:
        """Return whether it stands still, or has until now.

        Args:
            num_steps: Changes whenever a block comes forward.
            now: Seconds.
            lease_seconds: How long a single step may take; infinite: not known yet.
            is_idle: Whether it computes nothing, so that it need not move.
        """
        if isinf(lease_seconds):
            # Not a move, either: until the first word comes it may have stood still all along.
            return False
        is_first = self._num_steps < 0
        stands = now - self._moved > DOUBT_SHARE * lease_seconds
        self.may_have_been = stands or (self.may_have_been and not is_first)
        if is_idle or is_first or num_steps != self._num_steps:
            self._num_steps, self._moved = num_steps, now
        return stands

    def forget(self, since: float) -> None:
        """Begin anew, with what the ranks have agreed upon.

        Args:
            since: Seconds, before they had. Counted from then, not from the first look: the
                coordinator gives up, and leases the own run of, also a rank that never took a turn.
        """
        self.may_have_been = True
        self._moved = since
        self._num_steps = -1
