"""Decides when failures mean that going on is of no use: the circuit breaker.

Outcomes in, a sentence or None out. Knows no ranks but their numbers, no clock and no files.

    a full disk                                      at once
    the same error on the first block of 3 ranks     before any block is done
    `max_consecutive_failures` blocks in a row       without one that is done between them
    as many in a row on one rank                     that rank alone, if others do well meanwhile
"""

import re
from collections import Counter

from mpichunk.errors import DiskFullError
from mpichunk.schedule.messages import Failed
from mpichunk.words import count

NUM_ALIKE = 3
"""Ranks whose first blocks fail alike before that is no accident; fewer when there are fewer."""

_NUMBERS = re.compile(r"\d+")


class Breaker:
    """Watches the outcomes of blocks, in the order in which they are reported.

    Only a block's first try counts against the run: at the end of a run nothing is left but blocks
    that have failed before, and those are to be tried as often as allowed, then listed.

    Args:
        num_ranks: How many compute.
        max_consecutive_failures: As the config says. A run of which no more blocks are left than
            this is not stopped either: there is nothing to save.
    """

    def __init__(self, *, num_ranks: int, max_consecutive_failures: int) -> None:
        self.num_ranks = num_ranks
        """How many compute: fewer when some were lost."""

        self._limit = max_consecutive_failures
        self._is_any_done = False
        self._first_errors: dict[int, str] = {}
        self._num_in_a_row = 0
        self._ranks_in_a_row: set[int] = set()
        self._num_on: Counter[int] = Counter()
        self._failing_alone: set[int] = set()

    def succeed(self, rank: int) -> None:
        """Take note of a block that a rank has done."""
        self._is_any_done = True
        self._num_in_a_row = 0
        self._ranks_in_a_row.clear()
        self._num_on.pop(rank, None)
        self._failing_alone.discard(rank)
        # Only ranks on which something has failed since they did well: few.
        self._failing_alone.update(self._num_on)

    def is_broken(self, rank: int) -> bool:
        """Return whether blocks fail one after another on a rank, while others do well."""
        is_alone = rank in self._failing_alone and self.num_ranks > 1
        return is_alone and self._num_on[rank] >= self._limit

    def fail(self, rank: int, failed: Failed, *, num_left: int) -> str | None:
        """Take note of a failed try; return why the run must stop, None if it must not.

        Args:
            rank: Where it failed.
            failed: What failed.
            num_left: Blocks still to be computed, with those that ranks hold.
        """
        self._num_on[rank] += 1
        if failed.error == DiskFullError.__name__:
            return failed.message
        if failed.lease.attempt > 1:
            return None
        self._num_in_a_row += 1
        self._ranks_in_a_row.add(rank)
        if not self._is_any_done:
            self._first_errors.setdefault(rank, _kind(failed))
        if num_left <= self._limit:
            return None
        return self._alike(failed) or self._in_a_row(failed)

    def _alike(self, failed: Failed) -> str | None:
        """Return a sentence when the first blocks of several ranks have failed alike."""
        num_needed = min(NUM_ALIKE, self.num_ranks)
        num_alike = list(self._first_errors.values()).count(_kind(failed))
        if self._is_any_done or self.num_ranks == 1 or num_alike < num_needed:
            return None
        return f"the first blocks of {num_alike} ranks failed alike: {_told(failed)}"

    def _in_a_row(self, failed: Failed) -> str | None:
        """Return a sentence when too many blocks have failed in a row, on more than one rank.

        A single rank on which everything fails at once would else outrun those that do well.
        """
        is_one_of_several = self.num_ranks > 1 and len(self._ranks_in_a_row) == 1
        if self._num_in_a_row < self._limit or is_one_of_several:
            return None
        return (
            f"{count(self._num_in_a_row, 'block')} in a row failed, the last one: {_told(failed)}"
        )


def _kind(failed: Failed) -> str:
    """Return what two failures have in common that differ in boxes and files only."""
    return f"{failed.error}: {failed.kind or _NUMBERS.sub('#', failed.message)}"


def _told(failed: Failed) -> str:
    return f"block {failed.lease.block}: {failed.error}: {failed.message}"
