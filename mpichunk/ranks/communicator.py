"""What mpichunk asks of the ranks of a run, and the form of it that one rank alone has.

Knows no MPI: `comm` does. Only the main thread may call a communicator (MPI_THREAD_FUNNELED);
`abort` and `die` alone may come from any thread, since nothing comes after them.
"""

import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol, TypeVar

T = TypeVar("T")


class Communicator(Protocol):
    """The ranks of a run. Collectives must be called by every rank, in the same order.

    A rank keeps its number for its whole life, also when others are lost. Where MPI is fault
    tolerant any call may raise RankLost; then all survivors must call `agree(False)`.
    """

    rank: int
    """This process, 0 to the number of ranks that were started - 1."""

    alive: tuple[int, ...]
    """The ranks that are still there, in order; the first one is the coordinator."""

    is_fault_tolerant: bool
    """Whether the others can go on when a rank dies."""

    host: str
    """Name of the machine."""

    hosts: Mapping[int, str]
    """Name of the machine of each rank, lost ones included."""

    local_rank: int
    """Place among the ranks of this machine."""

    local_size: int
    """Ranks of this machine."""

    library: str
    """What MPI this is, for the log; why there is none, if there is none."""

    job: str
    """A name that no other job has, the same on every rank."""

    @property
    def size(self) -> int:
        """Number of ranks that are still there."""

    @property
    def coordinator(self) -> int:
        """The rank that has the second role: the lowest one."""

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank has the second role."""

    def bcast(self, value: T, root: int | None = None) -> T:
        """Return the value of rank `root`; default: that of the coordinator."""

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks, in their order, on the coordinator, None elsewhere."""

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def send(self, dest: int, message: object) -> None:
        """Send a picklable value to a rank, possibly this one; never waits."""

    def receive(self) -> list[tuple[int, Any]]:
        """Return what has arrived, each with the rank that sent it; never waits."""

    def num_unreceived(self) -> int:
        """Return how many messages of this rank their receivers have not yet taken."""

    def unreceived_by(self) -> set[int]:
        """Return the ranks that have not yet taken a message of this rank."""

    def agree(self, is_well: bool) -> bool:
        """Return, alike on every rank, whether all are well; else leave the lost ranks behind.

        The one collective that ranks may meet in from different places. Where it returns False,
        what was on its way is gone, and `alive` is who is left.
        """

    def leave(self, code: int, *, at_once: bool = False) -> None:
        """End this process in good order; returns where the interpreter can do that itself.

        Args:
            code: Exit code.
            at_once: Not to wait for threads: nobody needs what they do.
        """

    def die(self, code: int) -> NoReturn:
        """End this process at once, and the others where they cannot go on without it."""

    def abort(self, code: int) -> NoReturn:
        """End every rank at once."""


class Ranks:
    """What follows from who is there."""

    rank: int
    alive: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks that are still there."""
        return len(self.alive)

    @property
    def coordinator(self) -> int:
        """The rank that has the second role: the lowest one."""
        return self.alive[0]

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank has the second role."""
        return self.rank == self.alive[0]


class SerialCommunicator(Ranks):
    """One rank without MPI: the specification of the other."""

    def __init__(self, library: str = "none") -> None:
        self.rank = 0
        self.alive = (0,)
        self.is_fault_tolerant = False
        self.host = socket.gethostname()
        self.hosts: Mapping[int, str] = {0: self.host}
        self.local_rank = 0
        self.local_size = 1
        self.library = library
        self.job = secrets.token_hex(8)
        self._inbox: deque[object] = deque()

    def bcast(self, value: T, root: int | None = None) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T] | None:
        """Return the value in a list."""
        return [value]

    def allgather(self, value: T) -> list[T]:
        """Return the value in a list."""
        return [value]

    def barrier(self) -> None:
        """Do nothing."""

    def send(self, dest: int, message: object) -> None:
        """Keep the message for `receive`."""
        self._inbox.append(message)

    def receive(self) -> list[tuple[int, Any]]:
        """Return what was sent since the last call."""
        messages = [(self.rank, message) for message in self._inbox]
        self._inbox.clear()
        return messages

    def num_unreceived(self) -> int:
        """Return how many messages `receive` has not yet returned."""
        return len(self._inbox)

    def unreceived_by(self) -> set[int]:
        """Return this rank while there is a message that `receive` has not yet returned."""
        return {self.rank} if self._inbox else set()

    def agree(self, is_well: bool) -> bool:
        """Return whether this rank is well."""
        return is_well

    def leave(self, code: int, *, at_once: bool = False) -> None:
        """Return, unless it is to be at once."""
        if at_once:
            self.abort(code)

    def die(self, code: int) -> NoReturn:
        """End the process at once."""
        self.abort(code)

    def abort(self, code: int) -> NoReturn:
        """End the process at once."""
        flush()
        os._exit(code)


def flush() -> None:
    """Show what was printed before the process ends without cleaning up."""
    sys.stdout.flush()
    sys.stderr.flush()
