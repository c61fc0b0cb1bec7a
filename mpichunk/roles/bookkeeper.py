"""What the coordinator notes in the journal, when that is made durable, and who is told so.

Knows no MPI, no clock, and nothing of which rank computes what.
"""

from collections.abc import Callable, Mapping

from mpichunk.geometry.box import Box
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.messages import Acknowledge, Lease, Record

SYNC_SECONDS = 0.02
"""Least time between two syncs of the journal: with small blocks the disk would set the pace."""

SYNC_SHARE = 0.2
"""Of rank 0's main thread, at most, for a slow disk; a second lies between syncs of over 0.25 s."""


class Bookkeeper:
    """Appends lines, syncs them together, and then acknowledges their records.

    Args:
        journal: Where finished and failed blocks are noted.
        core_of: What a block writes.
        hosts: Name of the machine of each rank, by its number.
    """

    def __init__(
        self, journal: Journal, *, core_of: Callable[[int], Box], hosts: Mapping[int, str]
    ) -> None:
        self._journal = journal
        self._core_of = core_of
        self._hosts = hosts
        self._unacknowledged: dict[int, list[Lease]] = {}
        self._next_sync = float("-inf")

        self.disk_seconds = 0.0
        """What the journal has taken so far."""

    def note(self, rank: int, record: Record, state: str) -> None:
        """Append a line about a block."""
        core = self._core_of(record.lease.block)
        self._journal.append(record, state, core=core, rank=rank, host=self._hosts[rank])

    def owe(self, rank: int, lease: Lease) -> None:
        """Acknowledge a record of a rank once what is noted of it is durable."""
        self._unacknowledged.setdefault(rank, []).append(lease)

    def is_due(self, now: float) -> bool:
        """Return whether it is time for the next sync; `now` in seconds."""
        return now >= self._next_sync

    def sync(self, now: float | None = None) -> str:
        """Make all lines durable; return why that cannot be done, or "".

        Args:
            now: Seconds; the next one is due a while later, a longer one where the disk is slow.
                None for one out of turn.
        """
        took, why = 0.0, ""
        try:
            took = self._journal.sync()
        except OSError as error:
            self._journal.give_up()
            why = f"{self._journal.path}: the journal cannot be written: {error.strerror or error}"
        self.disk_seconds += took
        if now is not None:
            least = min(took / SYNC_SHARE, took + 50 * SYNC_SECONDS)
            self._next_sync = now + max(SYNC_SECONDS, least)
        return why

    def acknowledge(self) -> list[tuple[int, Acknowledge]]:
        """Return, once, what each rank need not keep any longer."""
        outgoing = [
            (rank, Acknowledge(leases=tuple(leases)))
            for rank, leases in self._unacknowledged.items()
        ]
        self._unacknowledged.clear()
        return outgoing

    def regroup(self) -> None:
        """Begin anew with the ranks that are left: they send again what was not acknowledged."""
        self._unacknowledged.clear()
        self._next_sync = float("-inf")

    def begin_to_doubt(self) -> None:
        """Remember from now on where the line of each block that is done stands."""
        self._journal.offsets.begin()

    def checksum(self, block: int) -> str | None:
        """Return what was noted of a block since there is doubt; None: nothing."""
        return self._journal.offsets.checksum(block)
