"""Which rank may write a block that more than one computes, or has been given.

    coordinator                              rank that holds the block
      | -- Contest(lease) -------------------> |   slow: another rank is to compute it, too
      | <-- PromiseToAsk(lease) -------------- |   it does not write yet, and asks before
      | <-- AskToWrite(lease) ---------------- |   as does a rank that computed it too, or is late
      | -- WriteVerdict(lease, may_write) ---> |   yes to the first who asks, no to all others

A rank that is alone with a block writes without asking, so a block is leased to a second rank only
once the first has promised to ask. A promise binds one lease: it ends with it. The first who asks
keeps its right until it has written, has failed, or is given up. Pure: knows no clock and no mail.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpichunk.schedule.messages import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contested:
    """A lease whose holder was told that another rank is to compute the block, too."""

    rank: int
    lease: Lease

    has_promised: bool
    """Whether the holder asks before it writes."""


class Writers:
    """By block who writes it, of those blocks that were asked for, and whose lease is contested."""

    def __init__(self) -> None:
        self._writers: dict[int, int] = {}
        self._contested: dict[int, _Contested] = {}

    @property
    def by_block(self) -> Mapping[int, int]:
        """The rank that may write a block, or has written it, where it had to ask."""
        return self._writers

    def contest(self, rank: int, lease: Lease) -> bool:
        """Return whether the holder of a lease is to be told now that it is contested: once.

        What another rank that held the block has promised does not bind this one.
        """
        if self._contested_lease(rank, lease) is not None:
            return False
        self._contested[lease.block] = _Contested(rank=rank, lease=lease, has_promised=False)
        return True

    def promise(self, rank: int, lease: Lease) -> None:
        """Note that the holder of a lease will ask before it writes."""
        self._contested[lease.block] = _Contested(rank=rank, lease=lease, has_promised=True)

    def has_promised(self, rank: int, lease: Lease) -> bool:
        """Return whether another rank may compute the block of this lease, too."""
        known = self._contested_lease(rank, lease)
        return known is not None and known.has_promised

    def may_write(self, rank: int, block: int) -> bool:
        """Return whether a rank that holds a block may write it: the first that asks."""
        return self._writers.setdefault(block, rank) == rank

    def release(self, rank: int, lease: Lease) -> None:
        """Let another rank write a block that this one will not; what it promised ends, too."""
        if self._writers.get(lease.block) == rank:
            del self._writers[lease.block]
        if self._contested_lease(rank, lease) is not None:
            del self._contested[lease.block]

    def finish(self, block: int) -> None:
        """Forget a block that is done."""
        self._contested.pop(block, None)
        self._writers.pop(block, None)

    def give_up_rank(self, rank: int) -> None:
        """Let others write what a rank was allowed to, which is not counted on any more."""
        self._writers = {b: writer for b, writer in self._writers.items() if writer != rank}

    def regroup(self, writing: Mapping[int, Iterable[Lease]]) -> None:
        """Begin anew with those who are left: promises are void, and what they write is theirs.

        Args:
            writing: By rank, what nobody else may write.
        """
        self._writers = {lease.block: rank for rank, leases in writing.items() for lease in leases}
        self._contested.clear()

    def _contested_lease(self, rank: int, lease: Lease) -> _Contested | None:
        """Return what is known of a contest of exactly this lease of this rank."""
        known = self._contested.get(lease.block)
        if known is None or (known.rank, known.lease) != (rank, lease):
            return None
        return known
