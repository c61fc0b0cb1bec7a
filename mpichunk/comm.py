"""All that mpichunk asks of MPI: point-to-point messages and collectives, nothing one-sided.

The only module that imports mpi4py, and only when MPI is started. Knows nothing of what is sent.
Only the main thread may call a communicator (MPI_THREAD_FUNNELED); `abort` alone may come from
any thread, since nothing comes after it.
"""

import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, cast

from mpichunk.errors import ExitCode, LaunchError, RankLost, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` puts into the environment of the ranks."""


_MESSAGE, _COLLECTIVE = 0, 1
"""Tags."""

DYING_SECONDS = 2.0
"""How long the last of several ranks that die of the same bug waits to find that it is the last."""


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


class _Ranks:
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


class SerialCommunicator(_Ranks):
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
        _flush()
        os._exit(code)


class MpiCommunicator(_Ranks):
    """Ranks over MPI, on a duplicate of the given communicator so that nobody else's mail mixes in.

    Args:
        mpi: The module mpi4py.MPI.
        comm: The ranks that take part.
        is_fault_tolerant: Whether MPI reports lost ranks as errors (ULFM) and goes on.
    """

    def __init__(self, mpi: Any, comm: "MPI.Intracomm", *, is_fault_tolerant: bool = False) -> None:
        self._mpi = mpi
        self.is_fault_tolerant = is_fault_tolerant
        self._lost_classes: tuple[int, ...] = ()
        if is_fault_tolerant:
            names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
            self._lost_classes = tuple(getattr(mpi, name) for name in names)
        self._started = comm.Get_group()
        self._comm = comm
        self.rank = comm.Get_rank()
        self.alive = tuple(range(comm.Get_size()))
        self.host = socket.gethostname()
        self.hosts: Mapping[int, str] = {}
        self.library: str = mpi.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        self._inbox: deque[object] = deque()
        self._outbox: list[tuple[int, MPI.Request]] = []
        # Requests that a failure has cut off: MPI may still look at their buffers.
        self._cut_off: list[tuple[int, MPI.Request]] = []
        while not self.agree(self._begin()):
            pass

    def bcast(self, value: T, root: int | None = None) -> T:
        """Return the value of rank `root`, or of the coordinator."""
        root = self.coordinator if root is None else root
        with self._losses():
            if self.is_fault_tolerant:
                return self._spread(value, root)
            result: T = self._comm.bcast(value, root=self.alive.index(root))
            return result

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks on the coordinator, None elsewhere."""
        with self._losses():
            if self.is_fault_tolerant:
                return self._collect(value)
            return self._comm.gather(value, root=0)

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        with self._losses():
            if self.is_fault_tolerant:
                return cast(list[T], self._spread(self._collect(value), self.coordinator))
            return self._comm.allgather(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.allgather(None)

    def send(self, dest: int, message: object) -> None:
        """Send a picklable value to a rank; a synchronous send completes when it is received."""
        if dest == self.rank:
            self._inbox.append(message)
            return
        place = self.alive.index(dest)
        with self._losses():
            self._outbox.append((dest, self._comm.issend(message, dest=place, tag=_MESSAGE)))

    def receive(self) -> list[tuple[int, Any]]:
        """Return what has arrived, this rank's own messages first."""
        messages: list[tuple[int, Any]] = [(self.rank, message) for message in self._inbox]
        self._inbox.clear()
        status = self._mpi.Status()
        with self._losses():
            while (arrived := self._comm.improbe(tag=_MESSAGE, status=status)) is not None:
                messages.append((self.alive[status.Get_source()], arrived.recv()))
        return messages

    def num_unreceived(self) -> int:
        """Return how many messages of this rank their receivers have not yet taken."""
        with self._losses():
            self._outbox = [item for item in self._outbox if not item[1].Test()]
        return len(self._outbox) + len(self._inbox)

    def unreceived_by(self) -> set[int]:
        """Return the ranks that have not yet taken a message of this rank."""
        self.num_unreceived()
        return {dest for dest, _ in self._outbox} | ({self.rank} if self._inbox else set())

    def agree(self, is_well: bool) -> bool:
        """Return whether all ranks are well; revoke, agree and shrink where one is not."""
        if not self.is_fault_tolerant:
            return is_well
        if not is_well:
            # Whoever waits for a message or in a collective is told by an error, and comes here.
            self._comm.Revoke()
        if self._agreed(is_well):
            return True
        self._cut_off += self._outbox
        self._outbox, self._inbox = [], deque()
        shrunk: Any = self._comm.Shrink()
        self._comm = shrunk
        group = self._comm.Get_group()
        everyone = list(range(self._started.Get_size()))
        places = group.Translate_ranks(list(range(group.Get_size())), self._started)
        self.alive = tuple(everyone[place] for place in places)
        return False

    def leave(self, code: int, *, at_once: bool = False) -> None:
        """Leave without MPI_Finalize where a rank that dies in it would hold up the others."""
        if self.is_fault_tolerant:
            # A second time, so that nobody leaves before everybody knows the outcome of the first.
            self._agreed(True)
        elif at_once:
            self._mpi.Finalize()
        else:
            return
        _flush()
        os._exit(code)

    def die(self, code: int) -> NoReturn:
        """End this process so that MPI notices: it does not when a process exits by itself.

        To mpirun a job of which every rank was killed is a success, so the last one is to abort.
        """
        started = time.monotonic()
        while self.is_fault_tolerant and self._others_left():
            seconds = time.monotonic() - started
            is_lowest = self.rank < min(self._others_left(), default=self.rank)
            if seconds > (DYING_SECONDS if is_lowest else DYING_SECONDS / 5):
                _flush()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        self.abort(code)

    def _others_left(self) -> list[int]:
        """Return the other ranks that MPI does not know to be dead."""
        with suppress(self._mpi.Exception):
            # Lets MPI look.
            self._comm.Iprobe(tag=_MESSAGE)
        failed = self._comm.Get_failed()
        places = failed.Translate_ranks(list(range(failed.Get_size())), self._started)
        return [rank for rank in self.alive if rank != self.rank and rank not in places]

    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once."""
        _flush()
        try:
            self._mpi.COMM_WORLD.Abort(code)
        finally:
            os._exit(code)

    # Collectives made of messages. When a rank dies in the middle of one of Open MPI's, the others
    # were seen to return garbage without an error.

    def _collect(self, value: T) -> list[T] | None:
        """Return the values of all ranks on the coordinator, None elsewhere."""
        if not self.is_coordinator:
            self._comm.send(value, dest=0, tag=_COLLECTIVE)
            return None
        return [value, *(self._take(place) for place in range(1, self.size))]

    def _spread(self, value: T, root: int) -> T:
        """Return the value of `root`."""
        place = self.alive.index(root)
        if self.rank != root:
            result: T = self._take(place)
            return result
        for dest in range(self.size):
            if dest != place:
                self._comm.send(value, dest=dest, tag=_COLLECTIVE)
        return value

    def _take(self, source: int) -> Any:
        """Wait for the next message of a collective."""
        nap = 0.0001
        while (arrived := self._comm.improbe(source=source, tag=_COLLECTIVE)) is None:
            time.sleep(nap)
            nap = min(1.5 * nap, 0.01)
        return arrived.recv()

    def _begin(self) -> bool:
        """Make what needs all ranks; return whether none was lost meanwhile."""
        try:
            with self._losses():
                comm: MPI.Intracomm = self._comm.Dup()
                local = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
                self.local_rank: int = local.Get_rank()
                self.local_size: int = local.Get_size()
                local.Free()
                self._comm = comm
                self.hosts = dict(self.allgather((self.rank, self.host)))
                self.job: str = self.bcast(secrets.token_hex(8))
        except RankLost:
            return False
        return True

    def _agreed(self, is_well: bool) -> bool:
        """Return whether all survivors are well, once all know the same ranks for lost."""
        while True:
            with suppress(RankLost), self._losses():
                self._comm.Ack_failed()
                return bool(self._comm.Agree(int(is_well)))

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Turn MPI's errors that mean a lost rank into RankLost."""
        try:
            yield
        except self._mpi.Exception as error:
            if error.Get_error_class() in self._lost_classes:
                raise RankLost(error.Get_error_string()) from None
            raise


def _flush() -> None:
    """Show what was printed before the process ends without cleaning up."""
    sys.stdout.flush()
    sys.stderr.flush()


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
    is_enabled = os.environ.get(_FAULT_TOLERANCE, "").lower() in {"1", "true", "yes", "enabled"}
    is_open_mpi = MPI.Get_library_version().startswith("Open MPI")
    return MpiCommunicator(
        MPI,
        MPI.COMM_WORLD,
        is_fault_tolerant=is_enabled and is_open_mpi and MPI.COMM_WORLD.Get_size() > 1,
    )


@contextmanager
def crash_guard(comm: Communicator) -> Iterator[None]:
    """End this rank at once when any of its threads meets an unexpected exception.

    Otherwise the other ranks would wait for it for ever. They end with it where MPI is not fault
    tolerant. What goes past: SystemExit, and UserError, which must then be raised on every rank
    alike.
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
        if comm.size == 1 and not comm.is_fault_tolerant:
            raise
        crash(comm, error)
    finally:
        sys.excepthook, threading.excepthook = before


def crash(comm: Communicator, error: BaseException) -> NoReturn:
    """Say on which rank what went wrong and end it at once, the job too if need be; any thread."""
    code = ExitCode.UNEXPECTED
    text = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        code, text = ExitCode.USER_ERROR, f"{error}\n"
    if isinstance(error, RankLost):
        # Here nobody goes on without it; every survivor comes here.
        sys.stderr.write("mpichunk: a rank has died, and all are needed here; run it again\n")
        comm.abort(code)
    thread = threading.current_thread().name
    sys.stderr.write(f"mpichunk: rank {comm.rank} on {comm.host}, {thread}: {text}")
    goes_on = comm.is_fault_tolerant and comm.size > 1
    end = "dies of it; the others go on" if goes_on else "ends the job"
    sys.stderr.write(f"mpichunk: rank {comm.rank} on {comm.host} {end}\n")
    comm.die(code)


def _crash_in_thread(comm: Communicator, args: Any) -> None:
    """Do for `threading.excepthook` what `crash` does; a thread may leave by SystemExit."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        crash(comm, args.exc_value)
