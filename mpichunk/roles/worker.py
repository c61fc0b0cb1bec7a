"""Every rank's role: keep the pipeline filled, and report what it has finished.

Messages in, messages out, so that it can be tested without ranks. Knows no MPI, no policy and
nothing of how a block is computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mpichunk.roles.permits import Permits
from mpichunk.schedule.lookahead import Lookahead
from mpichunk.schedule.messages import (
    FINISHED,
    Acknowledge,
    AskToWrite,
    Assign,
    Contest,
    CoordinatorHeartbeat,
    Done,
    Dropped,
    GiveBack,
    Lease,
    PromiseToAsk,
    Record,
    Records,
    Request,
    Stop,
    ToCoordinator,
    ToWorker,
    WriteVerdict,
)
from mpichunk.schedule.ownrun import OwnRun, Standstill
from mpichunk.schedule.progress import Counters

REPORT_SECONDS = 0.01
"""Least time between two reports of blocks while there are others to compute."""


class Pipeline(Protocol):
    """What a worker asks of the pipeline."""

    @property
    def num_steps(self) -> int:
        """Changes whenever a block comes forward."""

    def submit(self, lease: Lease) -> None:
        """Begin to compute a block; never waits. Its record comes through the queue."""

    def drop_waiting(self) -> list[Lease]:
        """Forget the blocks that are not yet computed; no record of them will come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a rank brings along when the survivors of a lost rank begin again."""

    leases: tuple[Lease, ...]
    """What it computes, or has computed without knowing whether it counts."""

    writing: tuple[Lease, ...]
    """Those of them that it writes or has written: nobody else may."""

    stop: Stop | None
    """What it was told last, if it was ever told to stop."""

    is_idle: bool = False
    """Whether it computes nothing: it would compute wrongly, or was told that all is done."""


class Worker:
    """One rank's blocks, from lease to acknowledgement.

        waiting (their number grows as blocks get shorter) -> pipeline (`depth`) -> unacknowledged

    Args:
        pipeline: Computes blocks in other threads.
        records: Where the pipeline puts a record of each block.
        counters: What the rank has done, kept up to date here.
        depth: Blocks that the pipeline holds at the same time. More than it computes at once, so
            that the next one is there before it is needed. 0 for a rank that must not compute.
        own_blocks: With static scheduling, the blocks that are this rank's without asking.
        permits: Lets the pipeline write what is not late; default: everything.
        clock: Monotonic seconds.
        since: When the ranks had not yet agreed on what is whose; default: now.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        records: Records,
        counters: Counters,
        *,
        depth: int,
        own_blocks: Iterable[int] = (),
        permits: Permits | None = None,
        clock: Callable[[], float] = time.monotonic,
        since: float | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._records = records
        self._counters = counters
        self._depth = depth
        self._own = OwnRun(own_blocks)
        self._standstill = Standstill(clock() if since is None else since)
        self._doubtful: set[int] = set()
        self._permits = permits or Permits(threading.Event())
        self._clock = clock
        self._lookahead = Lookahead()
        # Leases only: what a block takes in memory begins when the pipeline is given it.
        self._waiting: deque[Lease] = deque()
        self._num_asked = 0
        self._stop: Stop | None = None
        self._last_stop: Stop | None = None
        self._given_back: list[Lease] = []
        self._contested: list[Lease] = []
        self._unsent: list[Record] = []
        self._next_report = float("-inf")

        self.held: set[Lease] = set()
        """Leases without a record yet, those that wait included."""

        self.is_abandoning = False
        """Whether the pipeline computes blocks that nobody waits for any more."""

        self.unacknowledged: dict[Lease, Record] = {}
        """Records that are perhaps not in the journal yet."""

    @property
    def is_ended(self) -> bool:
        """Whether the rank has nothing more to compute, to report or to expect."""
        return self.is_stopped and not self.held and not self.unacknowledged

    @property
    def is_stopped(self) -> bool:
        """Whether the rank has been told that no more blocks will come."""
        return self._stop is not None

    def handle(self, message: ToWorker) -> None:
        """Take in a message of the coordinator."""
        match message:
            case Assign(leases=leases):
                self._num_asked -= len(leases)
                for lease in leases:
                    self._take(lease)
                self._fill()
            case Acknowledge(leases=leases):
                for lease in leases:
                    self.unacknowledged.pop(lease, None)
            case Stop():
                self._stop = message
                self._own.drop()
                if message.reason != FINISHED:
                    self._give_back()
                else:
                    self._leave_to_others()
            case Contest() | WriteVerdict() | CoordinatorHeartbeat():
                self._handle_permits(message)

    def _handle_permits(self, message: Contest | WriteVerdict | CoordinatorHeartbeat) -> None:
        """Take in what decides whether blocks may be written."""
        match message:
            case Contest(lease=lease):
                if self._permits.contest(lease):
                    self._contested.append(lease)
            case WriteVerdict(lease=lease, may_write=may_write):
                self._permits.answer(lease, may_write)
                if not may_write:
                    # A block of the own run is refused only to a rank that was given up.
                    self._own.drop()
                    self._doubtful.add(lease.block)
            case CoordinatorHeartbeat(lease_seconds=seconds):
                self._permits.lease_seconds = seconds

    def rejoin(self) -> "Holding":
        """Begin again with other ranks and perhaps another coordinator; return what is at hand.

        The pipeline goes on. What the coordinator of before has promised or was asked for is void;
        blocks that were not begun are handed out like any others.
        """
        self._own.drop()
        self._standstill.forget(self._clock())
        self._doubtful.clear()
        self._num_asked = 0
        self._take_waiting(len(self._waiting))
        self._given_back.clear()
        self._contested.clear()
        self._unsent = list(self.unacknowledged.values())
        self._next_report = float("-inf")
        self._permits.ask_again()
        # Told again and again: whoever was to learn it by now may be lost as well.
        self._last_stop, self._stop = self._stop or self._last_stop, None
        stop = self._last_stop
        if stop is not None and stop.reason == FINISHED:
            # Nothing more may be written here: all was done, or this rank is left out.
            self._depth = 0
        leases = *self.held, *self.unacknowledged
        written = {
            lease for lease, record in self.unacknowledged.items() if isinstance(record, Done)
        }
        writing = tuple(self._permits.writing().intersection(self.held) | written)
        return Holding(leases=leases, writing=writing, stop=stop, is_idle=self._depth == 0)

    def step(self) -> list[ToCoordinator]:
        """Refill the pipeline and return what the coordinator must know.

        Raises:
            BaseException: what has crashed a thread of the pipeline.
        """
        now = self._clock()
        self._take_in(now)
        self._given_back += self._take_waiting(self._lookahead.num_excess(len(self._waiting), now))
        requests = self._request(now)
        messages: list[ToCoordinator] = [*self._report(now)]
        # A promise ends with the lease: what is given back may be leased to this rank again.
        messages += [PromiseToAsk(lease=lease) for lease in self._contested if lease in self.held]
        self._contested.clear()
        messages += [AskToWrite(lease=lease) for lease in self._permits.questions()]
        if self._given_back:
            self._doubt(self._given_back)
            messages.append(GiveBack(leases=tuple(self._given_back)))
            self._given_back.clear()
        messages += requests
        self._counters["steps"] = self._pipeline.num_steps
        self._counters["busy"] = bool(self.held)
        self._counters["held"] = self._num_submitted
        return messages

    @property
    def _num_submitted(self) -> int:
        """Blocks that the pipeline holds."""
        return len(self.held) - len(self._waiting)

    def _request(self, now: float) -> list[Request]:
        """Ask for more leases once enough are missing to be worth a message."""
        num_wanted = self._lookahead.num_wanted(now) if self._depth else 0
        num_missing = self._depth + num_wanted - len(self.held) - self._num_asked
        if num_missing <= num_wanted // 2 or self.is_stopped or not self._own.is_over:
            return []
        self._num_asked += num_missing
        # What was finished goes along.
        self._next_report = now
        return [Request(num_blocks=num_missing)]

    def _report(self, now: float) -> list[Record]:
        """Return what is to be reported: at once if there is nothing else to do, or in batches."""
        if now < self._next_report and self.held and not self.is_stopped:
            return []
        records, self._unsent = self._unsent, []
        if records:
            self._next_report = now + (REPORT_SECONDS if self._waiting else 0.0)
        return records

    def _take_in(self, now: float) -> None:
        """Take in what the pipeline has finished since the last step, and give it what waits."""
        if not self._num_submitted:
            self._lookahead.move(now)
        self._fill()
        while not self._records.empty():
            self._lookahead.move(now)
            while not self._records.empty():
                self._note(self._records.get())
            self._fill()

    def _note(self, record: Record | Dropped | BaseException) -> None:
        """Take in what has become of a block."""
        if isinstance(record, BaseException):
            raise record
        lease = record.lease
        self._permits.end(lease)
        if lease not in self.held:
            return  # left to others: nobody waits for it
        self.held.discard(lease)
        if not isinstance(record, Done):
            self._doubt([lease])
        if isinstance(record, Dropped):
            self._given_back.append(lease)
            return
        if isinstance(record, Done):
            self._lookahead.note(sum(record.seconds.values()))
        self.unacknowledged[lease] = record
        self._unsent.append(record)
        self._counters.count(record)

    def _fill(self) -> None:
        """Submit what waits, and blocks of the static run, as far as there is room."""
        now = self._clock()
        self._look_for_standstill(now)
        # Bounded also while nobody acknowledges: what is lost with the job is what is in flight.
        most = self._depth + self._lookahead.num_wanted(now)
        while True:
            while self._waiting and self._num_submitted < self._depth:
                self._pipeline.submit(self._waiting.popleft())
            if len(self.held) >= self._depth or len(self.unacknowledged) > most:
                return
            block = self._own.take()
            if block is None:
                return
            lease = Lease(block=block, attempt=1)
            self._take(lease)
            if self._standstill.may_have_been:
                self._permits.contest(lease)

    def _look_for_standstill(self, now: float) -> None:
        """Let all that is held ask before it is written, if this rank may have been given up."""
        steps, seconds = self._pipeline.num_steps, self._permits.lease_seconds
        if self._standstill.look(steps, now, seconds, is_idle=not self.held):
            for lease in self.held:
                self._permits.contest(lease)

    def _give_back(self) -> None:
        """Drop what has only been read: soon done again, and time may be short."""
        self._given_back += self._take_waiting(len(self._waiting))
        dropped = self._pipeline.drop_waiting()
        self._forget(dropped)
        self._given_back += dropped

    def _leave_to_others(self) -> None:
        """Forget what other ranks have finished meanwhile, except what is being written."""
        self._take_waiting(len(self._waiting))
        writing = self._permits.close(self.held)
        if writing != self.held:
            self.is_abandoning = True
        self.held.intersection_update(writing)

    def _take(self, lease: Lease) -> None:
        """Let a lease wait for the pipeline, unless it is held: this rank was given up, is back."""
        if lease in self.held:
            return
        self.held.add(lease)
        # From now on: a rank that is stopped for long must ask also for what it has not begun.
        self._permits.begin(lease)
        if lease.block in self._doubtful:
            # That it ended here may reach the coordinator only after it was leased here again; then
            # it takes that for the end of this lease.
            self._permits.contest(lease)
        self._waiting.append(lease)

    def _doubt(self, leases: Iterable[Lease]) -> None:
        """Remember what has ended here undone, if it may have been taken from this rank before."""
        if self._standstill.may_have_been:
            self._doubtful.update(lease.block for lease in leases)

    def _take_waiting(self, num_leases: int) -> list[Lease]:
        """Take back leases that wait, those that came last; return them."""
        leases = [self._waiting.pop() for _ in range(num_leases)]
        self._forget(leases)
        leases.reverse()
        return leases

    def _forget(self, leases: list[Lease]) -> None:
        """Hold leases no more of which there will be no record."""
        self.held.difference_update(leases)
        for lease in leases:
            self._permits.end(lease)
