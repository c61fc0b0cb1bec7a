"""Rank 0's second role: lease blocks to ranks, and journal what they report.

Messages in, messages out. Knows no MPI, no clock and nothing of how a block is computed.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from mpichunk.breaker import Breaker
from mpichunk.geometry import Box
from mpichunk.journal import Journal
from mpichunk.messages import (
    DRAINED,
    FAILURES,
    FINISHED,
    Acknowledge,
    Assign,
    Done,
    Drain,
    Failed,
    GiveBack,
    Lease,
    Record,
    Request,
    State,
    Stop,
    ToCoordinator,
    ToWorker,
)
from mpichunk.scheduler import Scheduler
from mpichunk.vigil import Tempo

Outgoing = tuple[int, ToWorker]
"""A message and the rank that it is for."""

SYNC_SECONDS = 0.02
"""Least time between two syncs of the journal: with small blocks the disk would set the pace."""

BACK_UP_SECONDS = 0.5
"""How often slow blocks are looked for at the end of a run."""

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
        hosts: Name of the machine of each rank, by its number.
        breaker: Says when failures end the run early; default: never.
        tempo: Learns what a block takes, and says when one is slow.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        journal: Journal,
        *,
        core_of: Callable[[int], Box],
        hosts: Mapping[int, str],
        breaker: Breaker | None = None,
        tempo: Tempo | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._journal = journal
        self._core_of = core_of
        self._hosts = hosts
        self._ranks = tuple(sorted(hosts))
        self._wanted: dict[int, int] = {}
        self._unacknowledged: dict[int, list[Lease]] = {}
        self._next_sync = float("-inf")
        self._breaker = breaker
        self._tempo = tempo or Tempo(float("inf"))
        self._next_back_up = float("-inf")
        self._retries: dict[int, tuple[int, Failed]] = {}
        self._is_stopped = False

        self.ending: Stop | None = None
        """Why no more blocks are leased, once that is so."""

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
                    self._tempo.note(sum(message.seconds.values()))
                    self._retries.pop(message.lease.block, None)
                    if self._breaker is not None:
                        self._breaker.succeed()
                self._unacknowledged.setdefault(rank, []).append(message.lease)
            case Failed():
                self._fail(rank, message)
                self._unacknowledged.setdefault(rank, []).append(message.lease)
            case Drain(reason=reason):
                self._end(DRAINED, f"{reason} on rank {rank} ({self._hosts[rank]})")
            case GiveBack(leases=leases):
                for lease in leases:
                    self._scheduler.give_back(rank, lease)

    def regroup(
        self,
        held: Mapping[int, Iterable[Lease]],
        now: float,
        *,
        ending: Stop | None = None,
        idle: Collection[int] = (),
    ) -> None:
        """Go on with those who are left; what was on its way to or from them is lost.

        They ask again, and send again what was not acknowledged.

        Args:
            held: By rank, what it computes, or has finished without knowing whether it counts.
            now: Seconds.
            ending: That the run ends early, if one of them has been told so.
            idle: Those of them that compute nothing.
        """
        self.ending = self.ending or ending
        self._ranks = tuple(sorted(held))
        working = {rank: leases for rank, leases in held.items() if rank not in idle}
        if not working and not self._scheduler.is_finished:
            self._end(FAILURES, "no rank is left that computes right")
        self._scheduler.regroup(working, now)
        if self._breaker is not None:
            self._breaker.num_ranks = len(working)
        self._wanted.clear()
        self._unacknowledged.clear()
        self._next_sync = float("-inf")
        self._is_stopped = False

    def assign(self, now: float) -> list[Outgoing]:
        """Lease blocks to the ranks that have asked; who gets none now waits for a later turn."""
        if self.ending is not None:
            return []
        if self._scheduler.num_pending == 0:
            return self._back_up(now)
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

    def may_write(self, lease: Lease) -> bool:
        """Return whether a late block is still wanted."""
        return self._scheduler.state(lease.block) != State.DONE

    def give_up_rank(self, rank: int) -> None:
        """Lease what a hung rank holds to others."""
        self._scheduler.give_up_rank(rank)
        self._wanted.pop(rank, None)

    def welcome_back(self, rank: int) -> None:
        """Count on a rank that was given up."""
        self._scheduler.welcome_back(rank)

    def _back_up(self, now: float) -> list[Outgoing]:
        """Lease slow blocks once more, to idle ranks, when there are no others."""
        if now < self._next_back_up or not self._wanted:
            return []
        self._next_back_up = now + BACK_UP_SECONDS
        outgoing: list[Outgoing] = []
        idle = list(self._wanted)
        for block in self._scheduler.late_blocks(now, self._tempo.slow_seconds):
            for rank in idle:
                lease = self._scheduler.back_up(rank, block, now)
                if lease is not None:
                    log.info("block %d is slow; rank %d computes it as well", block, rank)
                    outgoing.append((rank, Assign(leases=(lease,))))
                    self._wanted[rank] -= 1
                    if self._wanted[rank] == 0:
                        del self._wanted[rank]
                    idle.remove(rank)
                    break
        return outgoing

    def commit(self, now: float) -> list[Outgoing]:
        """Sync the journal, acknowledge what is in it, and stop the ranks when all is done."""
        if self._scheduler.is_finished:
            self._end(FINISHED, "")
        is_stop_due = self.ending is not None and not self._is_stopped
        if now < self._next_sync and not is_stop_due:
            return []
        self._next_sync = now + SYNC_SECONDS
        self._sync()
        outgoing: list[Outgoing] = [
            (rank, Acknowledge(leases=tuple(leases)))
            for rank, leases in self._unacknowledged.items()
        ]
        self._unacknowledged.clear()
        if self.ending is not None and not self._is_stopped:
            self._is_stopped = True
            outgoing += [(rank, self.ending) for rank in self._ranks]
        return outgoing

    def _end(self, reason: str, why: str) -> None:
        """Lease no more blocks and tell every rank to stop. Failures outweigh other reasons."""
        if self.ending is not None and (reason != FAILURES or self.ending.reason == FAILURES):
            return
        self.ending = Stop(reason=reason, why=why)
        if reason == DRAINED:
            log.warning("ending early: %s; blocks that are being computed are finished", why)
        elif reason == FAILURES:
            log.error("ending early: %s", why)

    def _sync(self) -> None:
        """Make the journal durable; end the run when that cannot be done.

        What is not in the journal is acknowledged all the same, else no rank would ever end: its
        blocks count as not done, and are computed again by the next start.
        """
        try:
            self._journal.sync()
        except OSError as error:
            self._journal.give_up()
            why = f"{self._journal.path}: the journal cannot be written: {error.strerror or error}"
            self._end(FAILURES, why)

    def _fail(self, rank: int, failed: Failed) -> None:
        """Note a failed attempt, which says on which rank it was and why."""
        state = self._scheduler.fail(rank, failed.lease)
        if state is None:
            return
        self._break_if_hopeless(rank, failed)
        if self.ending is not None and self.ending.reason == FAILURES:
            state = State.FAILED
        self._note(rank, failed, "failed" if state == State.FAILED else "retry")
        if state == State.FAILED:
            self._retries.pop(failed.lease.block, None)
        else:
            self._retries[failed.lease.block] = rank, failed
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

    def _break_if_hopeless(self, rank: int, failed: Failed) -> None:
        """End the run when the breaker says so; what was to be tried again is listed as failed."""
        left = self._scheduler.num_pending + self._scheduler.num_leased
        why = self._breaker and self._breaker.fail(rank, failed, num_left=left)
        if not why:
            return
        self._end(FAILURES, why)
        for earlier_rank, earlier in self._retries.values():
            self._note(earlier_rank, earlier, "failed")
        self._retries.clear()

    def _note(self, rank: int, record: Record, state: str) -> None:
        """Append a line about a block to the journal."""
        core = self._core_of(record.lease.block)
        self._journal.append(record, state, core=core, rank=rank, host=self._hosts[rank])
