"""How the survivors of a lost rank find together again, from wherever each of them was.

Knows collectives, not what is computed. Whoever meets RankLost comes here; whoever waits for a
message or in a collective is sent here by an error.

    attempt  --- all well ------------------------------> outcome
       |  ^
       |  '------------- not all were computing: start over, with those who are left
    RankLost -> revoke, agree, shrink -> who was computing?
                                            '-- all: the roles go on with what each rank holds
"""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mpichunk.errors import RankLost, StartOver, UserError
from mpichunk.ranks.communicator import Communicator

T = TypeVar("T")

WARNING_SECONDS = 0.5
"""How long before the end it is told."""

log = logging.getLogger(__name__)


class Watchdog:
    """Ends this process, and with it the job, when ranks wait for one another for too long.

    Works while the interpreter lock is held, as it is while MPI starts; a sentence that says what
    happens comes before the stacks of all threads where that lock is free.

    Args:
        seconds: How long is too long; None never ends it.
        who: This process, in words.
    """

    def __init__(self, seconds: float | None = None, *, who: str = "a rank") -> None:
        self._seconds = seconds
        self._who = who
        self._warning: threading.Timer | None = None

        self.running_since: float | None = None
        """Monotonic seconds; None while it is stopped."""

    def start(self) -> None:
        """Begin to count, anew if it has begun already."""
        self.running_since = time.monotonic()
        self._call_off()
        if self._seconds is not None:
            ahead = min(WARNING_SECONDS, self._seconds / 4)
            self._warning = threading.Timer(self._seconds - ahead, self._warn)
            self._warning.daemon = True
            self._warning.start()
            faulthandler.dump_traceback_later(self._seconds, exit=True)

    def stop(self) -> None:
        """All is well."""
        self.running_since = None
        self._call_off()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _call_off(self) -> None:
        if self._warning is not None:
            self._warning.cancel()
            self._warning = None

    def _warn(self) -> None:
        """Say what is about to end the process: the body of a timer."""
        sys.stderr.write(
            f"mpichunk: {self._who}: the ranks have not all met within {self._seconds:g} s "
            "(schedule.start_timeout_seconds); the job ends; run it again\n"
        )
        sys.stderr.flush()


def survive(comm: Communicator, attempt: Callable[[], T]) -> T:
    """Return what `attempt` returns once all survivors have come to its end; repeat it if not.

    Raises:
        UserError: that of `attempt`, on every rank alike.
    """
    while True:
        refusal: UserError | None = None
        try:
            outcome = attempt()
        except UserError as error:
            refusal = error
        except StartOver:
            continue
        except RankLost:
            regroup(comm, is_computing=False)
            continue
        if comm.agree(True):
            if refusal is not None:
                raise refusal
            return outcome
        if _all_compute(comm, False) is None:
            regroup(comm, is_computing=False)


def regroup(comm: Communicator, *, is_computing: bool) -> bool:
    """Leave the lost ranks behind; return whether all who are left were computing.

    To be called by every survivor, and again when another rank is lost meanwhile.
    """
    before = set(comm.alive)
    while True:
        comm.agree(False)
        answer = _all_compute(comm, is_computing)
        if answer is not None:
            break
    if comm.is_coordinator:
        for rank in sorted(before.difference(comm.alive)):
            host = comm.hosts.get(rank, "an unknown host")
            log.warning("rank %d on %s has died; ranks that go on: %d", rank, host, comm.size)
    return answer


def _all_compute(comm: Communicator, is_computing: bool) -> bool | None:
    """Return whether all ranks are computing, None when yet another one was lost."""
    try:
        return all(comm.allgather(is_computing))
    except RankLost:
        return None
