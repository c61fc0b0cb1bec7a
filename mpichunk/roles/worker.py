"""Every rank's role: keep the pipeline filled, and report what it has finished.

Messages in, messages out, so that it can be tested without ranks. Knows no MPI, no policy and
nothing of how a block is computed.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mpichunk.schedule.messages import (
    FINISHED,
    Acknowledge,
    Ask,
    Assign,
    Contest,
    Contested,
    Done,
    Dropped,
    GiveBack,
    Heard,
    Lease,
    Record,
    Records,
    Request,
    Stop,
    ToCoordinator,
    ToWorker,
    Verdict,
)
from mpichunk.schedule.permits import Permits
from mpichunk.schedule.progress import Counters


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
    """What it was told, if it was told to stop."""

    is_idle: bool = False
    """Whether it computes nothing: it would compute wrongly, or was told that all is done."""


class Worker:
    """One rank's blocks, from lease to acknowledgement.

    Args:
        pipeline: Computes blocks in other threads.
        records: Where the pipeline puts a record of each block.
        counters: What the rank has done, kept up to date here.
        depth: Blocks that the pipeline holds at the same time. More than it computes at once, so
            that the next one is there before it is needed. 0 for a rank that must not compute.
        own_blocks: With static scheduling, the blocks that are this rank's without asking.
        permits: Lets the pipeline write what is not late; default: everything.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        records: Records,
        counters: Counters,
        *,
        depth: int = 3,
        own_blocks: Iterable[int] = (),
        permits: Permits | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._records = records
        self._counters = counters
        self._depth = depth
        self._own: Iterator[int] = iter(own_blocks)
        self._permits = permits or Permits(threading.Event())
        self._num_asked = 0
        self._stop: Stop | None = None
        self._given_back: list[Lease] = []
        self._contested: list[Lease] = []
        self._to_send_again: list[Record] = []

        self.held: set[Lease] = set()
        """Leases without a record yet."""

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
                    self._submit(lease)
            case Acknowledge(leases=leases):
                for lease in leases:
                    self.unacknowledged.pop(lease, None)
            case Stop():
                self._stop = message
                self._own = iter(())
                if message.reason != FINISHED:
                    self._give_back()
                else:
                    self._leave_to_others()
            case Contest() | Verdict() | Heard():
                self._handle_permits(message)

    def _handle_permits(self, message: Contest | Verdict | Heard) -> None:
        """Take in what decides whether blocks may be written."""
        match message:
            case Contest(lease=lease):
                if self._permits.contest(lease):
                    self._contested.append(lease)
            case Verdict(lease=lease, may_write=may_write):
                self._permits.answer(lease, may_write)
            case Heard(lease_seconds=seconds):
                self._permits.lease_seconds = seconds

    def rejoin(self) -> "Holding":
        """Begin again with other ranks and perhaps another coordinator; return what is at hand.

        The pipeline goes on. What the coordinator of before has promised or was asked for is void;
        blocks of the static run that were not begun are handed out like any others.
        """
        self._own = iter(())
        self._num_asked = 0
        self._given_back.clear()
        self._contested.clear()
        self._to_send_again = list(self.unacknowledged.values())
        self._permits.ask_again()
        stop, self._stop = self._stop, None
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
        messages: list[ToCoordinator] = [*self._to_send_again, *self._finished()]
        self._to_send_again.clear()
        messages += [Contested(lease=lease) for lease in self._contested]
        self._contested.clear()
        messages += [Ask(lease=lease) for lease in self._permits.questions()]
        if self._given_back:
            messages.append(GiveBack(leases=tuple(self._given_back)))
            self._given_back.clear()
        self._submit_own()
        num_missing = self._depth - len(self.held) - self._num_asked
        if num_missing > 0 and not self.is_stopped:
            self._num_asked += num_missing
            messages.append(Request(num_blocks=num_missing))
        self._counters["steps"] = self._pipeline.num_steps
        self._counters["busy"] = bool(self.held)
        self._counters["held"] = len(self.held)
        return messages

    def _finished(self) -> Iterator[Record]:
        """Yield the records that the pipeline has put in the queue since the last step."""
        while not self._records.empty():
            record = self._records.get()
            if isinstance(record, BaseException):
                raise record
            self._permits.end(record.lease)
            if record.lease not in self.held:
                continue  # left to others: nobody waits for it
            self.held.discard(record.lease)
            if isinstance(record, Dropped):
                self._given_back.append(record.lease)
                continue
            self.unacknowledged[record.lease] = record
            self._counters.count(record)
            yield record

    def _submit_own(self) -> None:
        """Submit blocks of the static run, as far as there is room."""
        # Bounded also while nobody acknowledges: what is lost with the job is what is in flight.
        while len(self.held) < self._depth and len(self.unacknowledged) <= self._depth:
            block = next(self._own, None)
            if block is None:
                return
            # Plain numbers only: what comes out of an array could not go into the journal.
            self._submit(Lease(block=int(block), attempt=1))

    def _give_back(self) -> None:
        """Drop what has only been read: soon done again, and time may be short."""
        dropped = self._pipeline.drop_waiting()
        self.held.difference_update(dropped)
        self._given_back += dropped

    def _leave_to_others(self) -> None:
        """Forget what other ranks have finished meanwhile, except what is being written."""
        writing = self._permits.close(self.held)
        if writing != self.held:
            self.is_abandoning = True
        self.held.intersection_update(writing)

    def _submit(self, lease: Lease) -> None:
        """Give a block to the pipeline, unless it has it: this rank was given up, and is back."""
        if lease in self.held:
            return
        self.held.add(lease)
        self._permits.begin(lease)
        self._pipeline.submit(lease)
