"""Every rank's role: keep the pipeline filled, and report what it has finished.

Messages in, messages out, so that it can be tested without ranks. Knows no MPI, no policy and
nothing of how a block is computed.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from mpichunk.messages import (
    Acknowledge,
    Assign,
    Lease,
    Record,
    Records,
    Request,
    Stop,
    ToCoordinator,
    ToWorker,
)
from mpichunk.progress import Counters


class Pipeline(Protocol):
    """What a worker asks of the pipeline."""

    def submit(self, lease: Lease) -> None:
        """Begin to compute a block; never waits. Its record comes through the queue."""


class Worker:
    """One rank's blocks, from lease to acknowledgement.

    Args:
        pipeline: Computes blocks in other threads.
        records: Where the pipeline puts a record of each block.
        counters: What the rank has done, kept up to date here.
        depth: Blocks that the pipeline holds at the same time. More than it computes at once, so
            that the next one is there before it is needed.
        own_blocks: With static scheduling, the blocks that are this rank's without asking.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        records: Records,
        counters: Counters,
        *,
        depth: int = 3,
        own_blocks: Iterable[int] = (),
    ) -> None:
        self._pipeline = pipeline
        self._records = records
        self._counters = counters
        self._depth = depth
        self._own: Iterator[int] = iter(own_blocks)
        self._num_asked = 0
        self._is_stopped = False

        self.held: set[Lease] = set()
        """Leases without a record yet."""

        self.unacknowledged: dict[Lease, Record] = {}
        """Records that are perhaps not in the journal yet."""

    @property
    def is_ended(self) -> bool:
        """Whether the rank has nothing more to compute, to report or to expect."""
        return self._is_stopped and not self.held and not self.unacknowledged

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
                self._is_stopped = True
                self._own = iter(())

    def step(self) -> list[ToCoordinator]:
        """Refill the pipeline and return what the coordinator must know.

        Raises:
            BaseException: what has crashed a thread of the pipeline.
        """
        messages: list[ToCoordinator] = list(self._finished())
        self._submit_own()
        num_missing = self._depth - len(self.held) - self._num_asked
        if num_missing > 0 and not self._is_stopped:
            self._num_asked += num_missing
            messages.append(Request(num_blocks=num_missing))
        self._counters["busy"] = bool(self.held)
        self._counters["held"] = len(self.held)
        return messages

    def _finished(self) -> Iterator[Record]:
        """Yield the records that the pipeline has put in the queue since the last step."""
        while not self._records.empty():
            record = self._records.get()
            if isinstance(record, BaseException):
                raise record
            self.held.discard(record.lease)
            self.unacknowledged[record.lease] = record
            self._counters.count(record)
            yield record

    def _submit_own(self) -> None:
        """Submit blocks of the static run, as far as there is room."""
        while len(self.held) < self._depth:
            block = next(self._own, None)
            if block is None:
                return
            # Plain numbers only: what comes out of an array could not go into the journal.
            self._submit(Lease(block=int(block), attempt=1))

    def _submit(self, lease: Lease) -> None:
        """Give a block to the pipeline."""
        self.held.add(lease)
        self._pipeline.submit(lease)
