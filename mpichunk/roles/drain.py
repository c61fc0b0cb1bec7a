"""When a rank is to end early: a signal, a stop file, the end of the allocation.

Decides only; finishing what is in flight is the roles' work. Knows no MPI and no journal.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mpichunk.rundir.layout import STOP

LOOK_SECONDS = 2.0
"""How often the coordinator looks for the stop file."""

DROP_SECONDS = 15.0
"""So long before the end of the allocation blocks in flight are dropped, rather than killed."""

REPEAT_SECONDS = 5.0
"""A request is sent again after so long: a coordinator may have died with the first one."""

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers

DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Signals:
    """Remembers that this process was asked to end, from entering to leaving a `with`.

    Only the first SIGINT is caught: the second one ends the process at once, by the default action,
    which works also while the main thread waits in a library. Signals that are ignored already, as
    SIGINT is for a background job of a shell, stay so.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that asked to end."""

        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Signals":
        for number in DRAIN_SIGNALS:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:
                signal.signal(number, self._handle)
                self._before[number] = signal.SIG_DFL if before is None else before
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Only remember: anything may be under way, and logs may be locked."""
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainSources:
    """What the world outside may tell a run."""

    signals: Signals = field(default_factory=Signals)
    """What this process was sent."""

    end_time: Callable[[], float | None] = lambda: None
    """Returns the end of the allocation, seconds since the epoch, None if it is not known."""


class DrainWatch:
    """Asks again and again whether the run should end early.

    Args:
        sources: What there is to ask.
        stop_file: The run directory's stop file.
        stop_before_seconds: How long before the end of the allocation to begin.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        sources: DrainSources,
        *,
        stop_file: Path,
        stop_before_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources = sources
        self._stop_file = stop_file
        self._stop_before_seconds = stop_before_seconds
        self._clock = clock
        self._next_look = float("-inf")
        self._next_word = float("-inf")
        self._reason: str | None = None

    def poll(self, now: float, *, is_leader: bool) -> str | None:
        """Return why the run should end early, when that is to be said (again); else None.

        Args:
            now: Monotonic seconds.
            is_leader: Whether this rank looks for the stop file and at the time: one is enough.
        """
        if self._reason is None:
            self._reason = self._find_reason(now, is_leader)
        if self._reason is None or now < self._next_word:
            return None
        self._next_word = now + REPEAT_SECONDS
        return self._reason

    @property
    def is_time_up(self) -> bool:
        """Whether the allocation ends at once, and nothing in flight can be finished."""
        end_time = self._sources.end_time()
        seconds = min(DROP_SECONDS, self._stop_before_seconds / 4)
        return end_time is not None and self._clock() >= end_time - seconds

    def _find_reason(self, now: float, is_leader: bool) -> str | None:
        if self._sources.signals.received is not None:
            return self._sources.signals.received.name
        if not is_leader:
            return None
        is_there = False
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            is_there = _exists(self._stop_file)
        return reason_to_stop(
            is_asked=is_there,
            now=self._clock(),
            end_time=self._sources.end_time(),
            stop_before_seconds=self._stop_before_seconds,
        )


def reason_to_stop(
    *, is_asked: bool, now: float, end_time: float | None, stop_before_seconds: float
) -> str | None:
    """Return why a run should end early, as a few words, or None.

    Args:
        is_asked: Whether the stop file is there.
        now: Seconds since the epoch.
        end_time: Known end of the allocation, seconds since the epoch.
        stop_before_seconds: How long before it to begin.
    """
    if is_asked:
        return "`mpichunk stop`"
    if end_time is not None and now >= end_time - stop_before_seconds:
        return f"the allocation ends in {max(0, round(end_time - now))} s"
    return None


def request_stop(run_dir: Path) -> None:
    """Ask the job that runs in a run directory to end."""
    (run_dir / STOP).touch()


def clear_stop(run_dir: Path, *, before: float) -> None:
    """Forget that an earlier job was asked to end.

    Args:
        run_dir: The run directory.
        before: When this job took it, by the file system's clock: what was asked since is for it.
    """
    path = run_dir / STOP
    with suppress(FileNotFoundError):
        if path.stat().st_mtime < before:
            path.unlink()


def _exists(path: Path) -> bool:
    """Return whether a file is there, also on a network file system that remembers it was not."""
    try:
        # Opening the directory makes NFS look again.
        return path.name in os.listdir(path.parent)
    except OSError:
        return False
