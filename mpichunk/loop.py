"""The main thread of a rank while blocks are computed: receive, decide, send, sleep.

Joins the roles to the ranks; knows no policy and nothing of how a block is computed. It works in
turns. When a turn finds nothing to do the next one comes later and later, up to 20 ms, unless the
pipeline wakes it: an idle rank leaves its core alone.
"""

import threading
import time
from collections.abc import Callable, Iterable

from mpichunk.comm import Communicator, PendingSum, crash
from mpichunk.coordinator import Coordinator
from mpichunk.messages import Acknowledge, Assign, Message, Stop
from mpichunk.progress import Counters, Display, totals
from mpichunk.worker import Worker

COORDINATOR = 0
"""The rank that has the second role."""

SHORTEST_NAP_SECONDS = 0.0002
LONGEST_NAP_SECONDS = 0.02


class Pulse:
    """Sums the counters of all ranks again and again, and so learns when all have ended.

    Every rank contributes to each round, for a sum is complete only when all have: a rank that
    works does so every `interval` seconds, one that has ended does so at once. The round that
    counts every rank as ended is the last one, and every rank sees the same sums: so all leave
    together, and none leaves a collective or a message behind.
    """

    def __init__(
        self, comm: Communicator, counters: Counters, display: Display, *, interval: float
    ) -> None:
        self._comm = comm
        self._counters = counters
        self._display = display
        self._interval = interval
        self._pending: PendingSum | None = None
        self._next = 0.0
        self.is_over = False

    def step(self, now: float, *, is_ended: bool) -> bool:
        """Contribute if it is time to, take the sum if it is there; return whether it was."""
        if self._pending is None:
            if now < self._next and not is_ended:
                return False
            self._next = now + self._interval
            self._counters["ended"] = is_ended
            self._pending = self._comm.start_sum(self._counters.vector)
        vector = self._pending.test()
        if vector is None:
            return False
        self._pending = None
        summed = totals(vector)
        self._display.update(summed, now)
        self.is_over = summed["ended"] == self._comm.size
        return True


def serve(
    comm: Communicator,
    worker: Worker,
    coordinator: Coordinator | None,
    pulse: Pulse,
    *,
    wake: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Work until every rank has ended; called by the main thread of every rank.

    Any exception ends the whole job when there are other ranks, and at once: unwinding the stack
    first could wait for threads that wait for other ranks.

    Args:
        comm: The ranks.
        worker: This rank's role.
        coordinator: The second role, on rank 0 only.
        pulse: The sums over all ranks.
        wake: Set by the pipeline's threads when there is a record.
        clock: Monotonic seconds.
    """
    nap = SHORTEST_NAP_SECONDS
    try:
        while not pulse.is_over:
            # Cleared before looking: what comes while we look sets it again.
            wake.clear()
            if _turn(comm, worker, coordinator, pulse, clock()):
                nap = SHORTEST_NAP_SECONDS
            else:
                wake.wait(nap)
                nap = min(2 * nap, LONGEST_NAP_SECONDS)
    except BaseException as error:
        if comm.size == 1:
            raise
        crash(comm, error)


def _turn(
    comm: Communicator,
    worker: Worker,
    coordinator: Coordinator | None,
    pulse: Pulse,
    now: float,
) -> bool:
    """Do all that can be done without waiting; return whether there was anything."""
    arrived = comm.receive()
    for source, messages in arrived:
        for message in messages:
            _deliver(worker, coordinator, source, message)
    num_sent = _send(comm, ((COORDINATOR, message) for message in worker.step()))
    if coordinator is not None:
        num_sent += _send(comm, coordinator.assign(now))
        num_sent += _send(comm, coordinator.commit(now))
    is_ended = worker.is_ended and comm.num_unreceived() == 0
    if coordinator is not None:
        is_ended = is_ended and coordinator.is_ended
    return pulse.step(now, is_ended=is_ended) or bool(arrived) or num_sent > 0


def _deliver(
    worker: Worker, coordinator: Coordinator | None, source: int, message: Message
) -> None:
    """Give a message to the role that it is for."""
    if isinstance(message, Assign | Acknowledge | Stop):
        worker.handle(message)
    else:
        assert coordinator is not None, f"rank {source} takes this rank for the coordinator"
        coordinator.handle(source, message)


def _send(comm: Communicator, outgoing: Iterable[tuple[int, Message]]) -> int:
    """Send each rank what is for it in one parcel; return the number of parcels."""
    parcels: dict[int, list[Message]] = {}
    for dest, message in outgoing:
        parcels.setdefault(dest, []).append(message)
    for dest, messages in parcels.items():
        comm.send(dest, messages)
    return len(parcels)
