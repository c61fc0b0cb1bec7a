"""Rank 0's second role: lease blocks to ranks, and journal what they report.

Messages in, messages out. Knows no MPI, no clock and nothing of how a block is computed.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from mpichunk.geometry.box import Box
from mpichunk.roles.bookkeeper import Bookkeeper
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.demand import Demand
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.messages import (
    DRAINED,
    FAILURES,
    FINISHED,
    RANK_LOST,
    Assign,
    Contest,
    Done,
    Drain,
    Failed,
    GiveBack,
    Lease,
    PromiseToAsk,
    Request,
    State,
    Stop,
    ToCoordinator,
    ToWorker,
)
from mpichunk.schedule.scheduler import Scheduler
from mpichunk.schedule.writers import Writers

Outgoing = tuple[int, ToWorker]
"""A message and the rank that it is for."""

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
        breaker: Says when failures end the run early.
        durations: Learns what a block takes, and says when one is slow.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        journal: Journal,
        *,
        core_of: Callable[[int], Box],
        hosts: Mapping[int, str],
        breaker: Breaker,
        durations: BlockDurations,
    ) -> None:
        self._scheduler = scheduler
        self._book = Bookkeeper(journal, core_of=core_of, hosts=hosts)
        self._hosts = hosts
        self._ranks = tuple(sorted(hosts))
        self._demand = Demand()
        self._now = float("-inf")
        self._breaker = breaker
        self._durations = durations
        self._next_back_up = float("-inf")
        self._writers = Writers()
        self._is_in_doubt = False
        self._excluded: set[int] = set()
        self._newly_excluded: list[int] = []
        self._retries: dict[int, tuple[int, Failed]] = {}

        self.ending: Stop | None = None
        """Why no more blocks are leased, once that is so."""

        self.is_ended = False
        """Whether every rank has been told to stop."""

    @property
    def disk_seconds(self) -> float:
        """What the journal has taken so far."""
        return self._book.disk_seconds

    def handle(self, rank: int, message: ToCoordinator) -> None:
        """Take in a message of a rank."""
        match message:
            case Request(num_blocks=num_blocks):
                if rank not in self._excluded and num_blocks:
                    self._demand.add(rank, num_blocks)
            case Done():
                self._finish(rank, message)
                self._demand.look_at(rank)
                self._book.owe(rank, message.lease)
            case Failed():
                self._writers.release(rank, message.lease)
                self._fail(rank, message)
                self._demand.look_at_all()
                self._book.owe(rank, message.lease)
            case PromiseToAsk(lease=lease):
                if self._scheduler.holds(rank, lease):
                    self._writers.promise(rank, lease)
                    self._next_back_up = float("-inf")
            case Drain(reason=reason):
                self._end(DRAINED, f"{reason} on rank {rank} ({self._hosts[rank]})")
            case GiveBack(leases=leases):
                for lease in leases:
                    self._writers.release(rank, lease)
                    self._scheduler.give_back(rank, lease)
                self._demand.look_at_all()

    def regroup(
        self,
        held: Mapping[int, Iterable[Lease]],
        now: float,
        *,
        writing: Mapping[int, Iterable[Lease]],
        ending: Stop | None = None,
        idle: Collection[int] = (),
    ) -> None:
        """Go on with those who are left; what was on its way to or from them is lost.

        They ask again, and send again what was not acknowledged.

        Args:
            held: By rank, what it computes, or has finished without knowing whether it counts.
            now: Seconds.
            writing: By rank, what of it nobody else may write.
            ending: That the run ends early, if one of them has been told so.
            idle: Those of them that compute nothing.
        """
        self.ending = self.ending or ending
        lost = set(self._ranks).difference(held)
        self._ranks = tuple(sorted(held))
        self._excluded.update(idle)
        self._newly_excluded.clear()
        self._writers.regroup(writing)
        working = {rank: leases for rank, leases in held.items() if rank not in self._excluded}
        if not working and not self._scheduler.is_finished:
            self._end(FAILURES, "no rank is left that computes right")
        # A rank that is left out may still write what it has begun to write.
        busy = {rank: writing.get(rank, ()) for rank in self._excluded.intersection(held)}
        writers = self._writers.by_block
        fates = self._scheduler.regroup(busy | working, now, lost=lost, writers=writers)
        for rank in busy:
            self._scheduler.retire(rank)
        self._breaker.num_ranks = len(working)
        self._demand.clear()
        self._book.regroup()
        self.is_ended = False
        for rank, lease, state in fates:
            self._note_death(rank, lease, state)

    def assign(self, now: float) -> list[Outgoing]:
        """Lease blocks to the ranks that have asked; who gets none now waits for a later turn."""
        self._now = now
        if self.ending is not None:
            return []
        outgoing: list[Outgoing] = [(rank, Stop(reason=FINISHED)) for rank in self._newly_excluded]
        self._newly_excluded.clear()
        if self._scheduler.num_pending == 0:
            return outgoing + self._back_up(now)
        for rank in self._demand.take_ready():
            leases = self._scheduler.lease(rank, self._demand.of(rank), now)
            if leases:
                outgoing.append((rank, Assign(leases=leases)))
                self._demand.serve(rank, len(leases))
        return outgoing

    def may_write(self, rank: int, lease: Lease) -> bool:
        """Return whether a rank may write a block: of several that hold it the first that asks."""
        if not self._scheduler.holds(rank, lease):
            return False
        return self._writers.may_write(rank, lease.block)

    def give_up_rank(self, rank: int) -> None:
        """Lease what a rank holds to others: of what is done from now on, two may write a block."""
        self._is_in_doubt = True
        self._book.begin_to_doubt()
        self._demand.park(rank)
        self._take_back(rank)

    def welcome_back(self, rank: int) -> None:
        """Count on a rank that was given up."""
        num_wanted = self._demand.unpark(rank)
        if rank not in self._excluded:
            self._scheduler.welcome_back(rank)
            self.handle(rank, Request(num_blocks=num_wanted))

    def note_end(self, rank: int) -> None:
        """Lease to others what a rank has not done that was left out and writes no more."""
        if rank in self._excluded:
            self._take_back(rank)

    def _take_back(self, rank: int) -> None:
        """Lease what a rank holds to others."""
        self._scheduler.give_up_rank(rank)
        self._demand.drop(rank)
        self._demand.look_at_all()
        self._writers.give_up_rank(rank)

    def _back_up(self, now: float) -> list[Outgoing]:
        """Lease slow blocks once more, to idle ranks, when there are no others.

        First the rank that has it promises to ask before it writes: two never write one block.
        """
        if now < self._next_back_up or not self._demand:
            return []
        self._next_back_up = now + BACK_UP_SECONDS
        outgoing: list[Outgoing] = []
        late_leases = self._scheduler.late_leases(now, self._durations.slow_seconds)
        idle = list(filter(self._scheduler.is_idle, self._demand.ranks)) if late_leases else []
        for holder, late in late_leases:
            if self._writers.contest(holder, late):
                outgoing.append((holder, Contest(lease=late)))
            elif self._writers.has_promised(holder, late):
                outgoing += self._lease_again(late.block, idle, now)
        return outgoing

    def _lease_again(self, block: int, idle: list[int], now: float) -> list[Outgoing]:
        """Lease a block that is held already to one of the idle ranks, if one may have it."""
        for rank in idle:
            lease = self._scheduler.back_up(rank, block, now)
            if lease is not None:
                log.info("block %d is slow; rank %d computes it as well", block, rank)
                self._demand.serve(rank, 1)
                idle.remove(rank)
                return [(rank, Assign(leases=(lease,)))]
        return []

    def commit(self, now: float) -> list[Outgoing]:
        """Sync the journal, acknowledge what is in it, and stop the ranks when all is done."""
        if self._scheduler.is_finished:
            self._end(FINISHED, "")
        is_stop_due = self.ending is not None and not self.is_ended
        if not self._book.is_due(now) and not is_stop_due:
            return []
        self._sync(now)
        outgoing: list[Outgoing] = [*self._book.acknowledge()]
        if self.ending is not None and not self.is_ended:
            self.is_ended = True
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

    def _sync(self, now: float | None = None) -> None:
        """Make the journal durable; end the run when that cannot be done.

        What is not in the journal is acknowledged all the same, else no rank would ever end: its
        blocks count as not done, and are computed again by the next start.
        """
        why = self._book.sync(now)
        if why:
            self._end(FAILURES, why)

    def _finish(self, rank: int, done: Done) -> None:
        """Note a block that is done; of one that was done already, only whether it is the same."""
        block = done.lease.block
        if not self._scheduler.finish(rank, done.lease, self._now):
            self._compare(rank, done)
            return
        self._book.note(rank, done, "done")
        self._durations.note(sum(done.seconds.values()))
        self._retries.pop(block, None)
        self._writers.finish(block)
        self._breaker.succeed(rank)

    def _compare(self, rank: int, done: Done) -> None:
        """Compute a block again of which two ranks have written different values.

        Happens only when a rank was stopped while it wrote, given up, and came back.
        """
        if not self._is_in_doubt:
            return
        self._sync()
        block = done.lease.block
        if self._book.checksum(block) in (done.checksum, None):
            return
        why = f"rank {rank} has written other values over it; it is computed again"
        log.warning("block %d: %s", block, why)
        different = Failed(lease=done.lease, error="DifferentValues", message=why)
        self._book.note(rank, different, "undone")
        self._scheduler.reopen(block)
        self._demand.look_at_all()

    def _note_death(self, rank: int, lease: Lease, state: State) -> None:
        """Note what a rank was computing, or near, when it died."""
        why = f"rank {rank} died while it computed this block, or the one before"
        failed = Failed(lease=lease, error=RANK_LOST, message=why)
        self._book.note(rank, failed, "failed" if state == State.FAILED else "retry")
        if state == State.FAILED:
            log.error("block %d: %s, as others did; given up", lease.block, why)

    def _fail(self, rank: int, failed: Failed) -> None:
        """Note a failed attempt, which says on which rank it was and why."""
        state = self._scheduler.fail(rank, failed.lease)
        if state is None:
            return
        self._break_if_hopeless(rank, failed)
        if self.ending is not None and self.ending.reason == FAILURES:
            state = State.FAILED
        self._book.note(rank, failed, "failed" if state == State.FAILED else "retry")
        if state == State.FAILED:
            self._retries.pop(failed.lease.block, None)
        else:
            self._retries[failed.lease.block] = rank, failed
        lease, where = failed.lease, f"rank {rank} ({self._hosts[rank]})"
        outcome = "given up" if state == State.FAILED else "it will be tried again"
        why = f"{failed.error}: {failed.message}; {outcome}"
        log.warning("block %d failed on %s, attempt %d: %s", lease.block, where, lease.attempt, why)

    def _break_if_hopeless(self, rank: int, failed: Failed) -> None:
        """End the run when the breaker says so; what was to be tried again is listed as failed."""
        if rank in self._excluded:
            return
        left = self._scheduler.num_pending + self._scheduler.num_leased
        why = self._breaker.fail(rank, failed, num_left=left)
        if not why:
            if self._breaker.is_broken(rank) and rank not in self._excluded:
                self._exclude(rank, failed)
            return
        self._end(FAILURES, why)
        for earlier_rank, earlier in self._retries.values():
            self._book.note(earlier_rank, earlier, "failed")
        self._retries.clear()

    def _exclude(self, rank: int, failed: Failed) -> None:
        """Lease no more blocks to a rank on which everything fails, while others do well."""
        log.error(
            "rank %d (%s) gets no more blocks: one after another fails there, and not on others; "
            "the last one: %s",
            rank,
            self._hosts[rank],
            f"{failed.error}: {failed.message}",
        )
        self._excluded.add(rank)
        self._newly_excluded.append(rank)
        self._demand.drop(rank)
        # It keeps what it may be writing until it has ended: two never write one block.
        self._scheduler.retire(rank)
        self._breaker.num_ranks -= 1
