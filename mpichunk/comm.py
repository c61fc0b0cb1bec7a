"""All that mpichunk asks of MPI: point-to-point messages and collectives, nothing one-sided.

The only module that imports mpi4py, and only when MPI is started. Knows nothing of what is sent.
Only the main thread may call a communicator (MPI_THREAD_FUNNELED); `abort` alone may come from
any thread, since nothing comes after it.
"""

import os
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mpichunk.errors import ExitCode, LaunchError, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
Vector = npt.NDArray[np.float64]


class PendingSum(Protocol):
    """A sum over ranks that is under way."""

    def test(self) -> Vector | None:
        """Return the sum once every rank has contributed, None until then; never waits."""


class Communicator(Protocol):
    """The ranks of a run. Collectives must be called by every rank, in the same order."""

    rank: int
    """This process, 0 to size - 1."""

    size: int
    """Number of ranks."""

    host: str
    """Name of the machine."""

    local_rank: int
    """Place among the ranks of this machine."""

    local_size: int
    """Ranks of this machine."""

    library: str
    """What MPI this is, for the log; why there is none, if there is none."""

    def bcast(self, value: T, root: int = 0) -> T:
        """Return the value of rank `root`."""

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks on rank 0, None elsewhere."""

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def send(self, dest: int, message: object) -> None:
        """Send a picklable value to a rank, possibly this one; never waits."""

    def receive(self) -> list[tuple[int, Any]]:
        """Return what has arrived, each with the rank that sent it; never waits."""

    def num_unreceived(self) -> int:
        """Return how many messages of this rank their receivers have not yet taken."""

    def start_sum(self, vector: Vector) -> PendingSum:
        """Begin to sum vectors of equal length over all ranks (collective); copies its argument."""

    def abort(self, code: int) -> NoReturn:
        """End every rank at once."""


class SerialCommunicator:
    """One rank without MPI: the specification of the other."""

    def __init__(self, library: str = "none") -> None:
        self.rank = 0
        self.size = 1
        self.host = socket.gethostname()
        self.local_rank = 0
        self.local_size = 1
        self.library = library
        self._inbox: deque[object] = deque()

    def bcast(self, value: T, root: int = 0) -> T:
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

    def start_sum(self, vector: Vector) -> PendingSum:
        """Return a sum that is complete at once."""
        return _OwnSum(vector.copy())

    def abort(self, code: int) -> NoReturn:
        """End the process at once."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class MpiCommunicator:
    """Ranks over MPI, on a duplicate of the given communicator so that nobody else's mail mixes in.

    Args:
        mpi: The module mpi4py.MPI.
        comm: The ranks that take part.
    """

    def __init__(self, mpi: Any, comm: "MPI.Intracomm") -> None:
        self._mpi = mpi
        self._comm = comm.Dup()
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.host = socket.gethostname()
        local = comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank: int = local.Get_rank()
        self.local_size: int = local.Get_size()
        local.Free()
        self.library: str = mpi.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        self._inbox: deque[object] = deque()
        self._outbox: list[MPI.Request] = []

    def bcast(self, value: T, root: int = 0) -> T:
        """Return the value of rank `root`."""
        result: T = self._comm.bcast(value, root=root)
        return result

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks on rank 0, None elsewhere."""
        return self._comm.gather(value, root=0)

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        return self._comm.allgather(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._comm.Barrier()

    def send(self, dest: int, message: object) -> None:
        """Send a picklable value to a rank; a synchronous send completes when it is received."""
        if dest == self.rank:
            self._inbox.append(message)
        else:
            self._outbox.append(self._comm.issend(message, dest=dest))

    def receive(self) -> list[tuple[int, Any]]:
        """Return what has arrived, this rank's own messages first."""
        messages: list[tuple[int, Any]] = [(self.rank, message) for message in self._inbox]
        self._inbox.clear()
        status = self._mpi.Status()
        while (arrived := self._comm.improbe(status=status)) is not None:
            messages.append((status.Get_source(), arrived.recv()))
        return messages

    def num_unreceived(self) -> int:
        """Return how many messages of this rank their receivers have not yet taken."""
        self._outbox = [request for request in self._outbox if not request.Test()]
        return len(self._outbox) + len(self._inbox)

    def start_sum(self, vector: Vector) -> PendingSum:
        """Begin to sum vectors over all ranks (collective)."""
        source, total = vector.copy(), np.empty_like(vector)
        return _MpiSum(self._comm.Iallreduce(source, total), source, total)

    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self._mpi.COMM_WORLD.Abort(code)
        finally:
            os._exit(code)


class _OwnSum:
    """The sum over one rank."""

    def __init__(self, vector: Vector) -> None:
        self._vector = vector

    def test(self) -> Vector | None:
        return self._vector


class _MpiSum:
    """A non-blocking MPI_Iallreduce; keeps its buffers alive, as MPI wants."""

    def __init__(self, request: "MPI.Request", source: Vector, total: Vector) -> None:
        self._request = request
        self._source = source
        self._total = total

    def test(self) -> Vector | None:
        return self._total if self._request.Test() else None


def start_mpi() -> Communicator:
    """Start MPI and return all its ranks, or one rank without MPI when there is no MPI library.

    To be called before torch is imported, so that a rank that is lost early is lost before the
    others depend on it.

    Raises:
        LaunchError: the MPI library cannot be used from a program with threads.
    """
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        # mpi4py raises RuntimeError when it finds no library to load.
        return SerialCommunicator(f"no MPI library: {str(error).splitlines()[0]}")
    if MPI.Query_thread() < MPI.THREAD_FUNNELED:
        raise LaunchError(
            f"{MPI.Get_library_version().splitlines()[0]} allows no threads beside MPI; mpichunk "
            "needs MPI_THREAD_FUNNELED: use an MPI library that was built with threads"
        )
    return MpiCommunicator(MPI, MPI.COMM_WORLD)


@contextmanager
def crash_guard(comm: Communicator) -> Iterator[None]:
    """End the whole job at once when any thread of this rank meets an unexpected exception.

    Otherwise the other ranks would wait for this one for ever. What goes past: SystemExit, and
    UserError, which must then be raised on every rank alike.
    """
    before = sys.excepthook, threading.excepthook
    sys.excepthook = lambda kind, error, trace: crash(comm, error)
    threading.excepthook = lambda args: _crash_in_thread(comm, args)
    try:
        yield
    except (UserError, SystemExit):
        raise
    except BaseException as error:
        # With no other rank to end, the exception takes its usual way through open files and locks.
        if comm.size == 1:
            raise
        crash(comm, error)
    finally:
        sys.excepthook, threading.excepthook = before


def crash(comm: Communicator, error: BaseException) -> NoReturn:
    """Say on which rank what went wrong and end the whole job at once; from any thread."""
    code = ExitCode.UNEXPECTED
    text = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        code, text = ExitCode.USER_ERROR, f"{error}\n"
    thread = threading.current_thread().name
    sys.stderr.write(f"mpichunk: rank {comm.rank} on {comm.host}, {thread}: {text}")
    sys.stderr.write(f"mpichunk: rank {comm.rank} on {comm.host} ends the job\n")
    comm.abort(code)


def _crash_in_thread(comm: Communicator, args: Any) -> None:
    """Do for `threading.excepthook` what `crash` does; a thread may leave by SystemExit."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        crash(comm, args.exc_value)
