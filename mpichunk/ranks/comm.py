"""All that mpichunk asks of MPI: point-to-point messages and collectives, nothing one-sided.

The only module that imports mpi4py, and only when MPI is started. Knows nothing of what is sent.
"""

import os
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from mpichunk.errors import LaunchError, RankLost
from mpichunk.ranks.communicator import Communicator, Ranks, SerialCommunicator, flush

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "MpiCommunicator", "SerialCommunicator", "start_mpi"]

T = TypeVar("T")

_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` puts into the environment of the ranks."""


_MESSAGE, _COLLECTIVE = 0, 1
"""Tags."""

FEW_MESSAGES = 64
"""So many that are on their way are not worth a look at each."""

DYING_SECONDS = 2.0
"""How long the last of several ranks that die of the same bug waits to find that it is the last."""


class MpiCommunicator(Ranks):
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
        self._stay(range(comm.Get_size()))
        self.host = socket.gethostname()
        self.hosts: Mapping[int, str] = {}
        self.library: str = mpi.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        self._inbox: deque[object] = deque()
        self._outbox: list[tuple[int, MPI.Request]] = []
        self._most_in_outbox = FEW_MESSAGES
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
            result: T = self._comm.bcast(value, root=self._places[root])
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
        place = self._places[dest]
        with self._losses():
            self._outbox.append((dest, self._comm.issend(message, dest=place, tag=_MESSAGE)))
        if len(self._outbox) > self._most_in_outbox:
            # Now and then, so that a message costs as much however many are on their way.
            self._most_in_outbox = FEW_MESSAGES + 2 * self.num_unreceived()

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
        self._stay(everyone[place] for place in places)
        return False

    def _stay(self, ranks: Iterable[int]) -> None:
        """Note who is there, in the order of their places in the communicator."""
        self.alive = tuple(ranks)
        self._places = {rank: place for place, rank in enumerate(self.alive)}

    def leave(self, code: int, *, at_once: bool = False) -> None:
        """Leave without MPI_Finalize where a rank that dies in it would hold up the others."""
        if self.is_fault_tolerant:
            # A second time, so that nobody leaves before everybody knows the outcome of the first.
            self._agreed(True)
        elif at_once:
            self._mpi.Finalize()
        else:
            return
        flush()
        os._exit(code)

    def die(self, code: int) -> NoReturn:
        """End this process so that MPI notices: it does not when a process exits by itself.

        To mpirun a job of which every rank was killed is a success, so the last one is to say what
        it was.
        """
        started = time.monotonic()
        # Asked once a turn: the others may be gone a moment later, and this rank is the last one.
        while self.is_fault_tolerant and (others := self._others_left()):
            seconds = time.monotonic() - started
            is_lowest = self.rank < min(others)
            if seconds > (DYING_SECONDS if is_lowest else DYING_SECONDS / 5):
                flush()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        self.abort(code)

    def _others_left(self) -> list[int]:
        """Return the other ranks that MPI does not know to be dead."""
        # Lets MPI look. Where a message waits, or that is revoked, it would answer without looking.
        self._mpi.COMM_SELF.Iprobe(tag=_MESSAGE)
        failed = self._comm.Get_failed()
        places = failed.Translate_ranks(list(range(failed.Get_size())), self._started)
        return [rank for rank in self.alive if rank != self.rank and rank not in places]

    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once; mpirun returns `code`.

        Of the abort of the last rank, after others were lost, mpirun (Open MPI 5.0) makes a
        success. It passes on the code of a rank that exits, and then ends the others, stopped ones
        too; before a rank was lost it would wait for them.
        """
        flush()
        try:
            if code == 0 or not self._is_any_lost():
                self._mpi.COMM_WORLD.Abort(code)
        finally:
            os._exit(code)

    def _is_any_lost(self) -> bool:
        """Return whether MPI can tell, and knows of, a rank that has died since the start."""
        if not self.is_fault_tolerant:
            return False
        return len(self._others_left()) + 1 < self._started.Get_size()

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
        place = self._places[root]
        if self.rank != root:
            result: T = self._take(place)
            return result
        # Pickled once for all: received as what `send` has sent.
        parcel = [self._mpi.pickle.dumps(value), self._mpi.BYTE]
        for dest in range(self.size):
            if dest != place:
                self._comm.Send(parcel, dest=dest, tag=_COLLECTIVE)
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
