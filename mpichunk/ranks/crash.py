"""What an unexpected exception does to a rank, and to the others.

Knows no MPI and nothing of what is computed.
"""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from mpichunk.errors import ExitCode, RankLost, UserError
from mpichunk.ranks.communicator import Communicator


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
