"""Rank 0's second role: lease blocks to ranks, and journal what they report.

Messages in, messages out. Knows no MPI, no clock and nothing of how a block is computed.
"""

import logging
from collections.abc import Callable, Sequence

from mpichunk.geometry import Box
from mpichunk.journal import Journal
from mpichunk.messages import (
    Acknowledge,
    Assign,
    Done,
    Failed,
    Lease,
    Record,
    Request,
    State,
    Stop,
    ToCoordinator,
    ToWorker,
)
from mpichunk.scheduler import Scheduler

Outgoing = tuple[int, ToWorker]
"""A message and the rank that it is for."""

SYNC_SECONDS = 0.02
"""Least time between two syncs of the journal: with small blocks the disk would set the pace."""

log = logging.getLogger(__name__)


class Coordinator:
    """Feeds the scheduler and keeps the journal.

    One turn: `handle` every message that has come, send what `assign` returns, then what `commit`
    returns. Leases go out before the journal is synced, so that no rank waits for the disk; and one
    sync serves all records of a turn, or of several when they come quickly.

    Args:
        scheduler: Which rank computes what.
        journal: Where finished and failed blocks are noted.
        core_of: What a block writes.
        hosts: Name of the machine of each rank.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        journal: Journal,
        *,
        core_of: Callable[[int], Box],
        hosts: Sequence[str],
    ) -> None:
        self._scheduler = scheduler
        self._journal = journal
        self._core_of = core_of
        self._hosts = hosts
        self._wanted: dict[int, int] = {}
        self._unacknowledged: dict[int, list[Lease]] = {}
        self._next_sync = float("-inf")
        self._is_stopped = False

    @property
    def is_ended(self) -> bool:
        """Whether every rank has been told to stop."""
        return self._is_stopped

    def handle(self, rank: int, message: ToCoordinator) -> None:
        """Take in a message of a rank."""
        match message:
            case Request(num_blocks=num_blocks):
                # Asked last, served last: what it still wants moves to the end of the queue.
                self._wanted[rank] = self._wanted.pop(rank, 0) + num_blocks
            case Done():
                if self._scheduler.finish(rank, message.lease):
                    self._note(rank, message, "done")
                self._unacknowledged.setdefault(rank, []).append(message.lease)
            case Failed():
                self._fail(rank, message)
                self._unacknowledged.setdefault(rank, []).append(message.lease)

    def assign(self, now: float) -> list[Outgoing]:
        """Lease blocks to the ranks that have asked; who gets none now waits for a later turn."""
        if self._scheduler.num_pending == 0:
            return []
        outgoing: list[Outgoing] = []
        for rank, num_blocks in list(self._wanted.items()):
            leases = self._scheduler.lease(rank, num_blocks, now)
            if not leases:
                continue
            outgoing.append((rank, Assign(leases=leases)))
            self._wanted[rank] -= len(leases)
            if self._wanted[rank] == 0:
                del self._wanted[rank]
        return outgoing

    def commit(self, now: float) -> list[Outgoing]:
        """Sync the journal, acknowledge what is in it, and stop the ranks when all is done."""
        if now < self._next_sync and not self._scheduler.is_finished:
            return []
        self._next_sync = now + SYNC_SECONDS
        self._journal.sync()
        outgoing: list[Outgoing] = [
            (rank, Acknowledge(leases=tuple(leases)))
            for rank, leases in self._unacknowledged.items()
        ]
        self._unacknowledged.clear()
        if self._scheduler.is_finished and not self._is_stopped:
            self._is_stopped = True
            stop = Stop(reason="finished")
            outgoing += [(rank, stop) for rank in range(len(self._hosts))]
        return outgoing

    def _fail(self, rank: int, failed: Failed) -> None:
        """Note a failed attempt, which says on which rank it was and why."""
        state = self._scheduler.fail(rank, failed.lease)
        if state is None:
            return
        self._note(rank, failed, "failed" if state == State.FAILED else "retry")
        log.warning(
            "block %d failed on rank %d (%s), attempt %d: %s: %s; %s",
            failed.lease.block,
            rank,
            self._hosts[rank],
            failed.lease.attempt,
            failed.error,
            failed.message,
            "given up" if state == State.FAILED else "it will be tried again",
        )

    def _note(self, rank: int, record: Record, state: str) -> None:
        """Append a line about a block to the journal."""
        core = self._core_of(record.lease.block)
        self._journal.append(record, state, core=core, rank=rank, host=self._hosts[rank])
