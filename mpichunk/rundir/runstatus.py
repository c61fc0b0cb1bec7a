"""How far a run is, from its run directory alone: also while it runs, also after it died.

Reads the journal; knows no MPI, no network and no volume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpichunk.errors import ExitCode, NotStartedError
from mpichunk.rundir import history, journal
from mpichunk.rundir.lock import find_holder
from mpichunk.schedule.messages import FAILURES, FINISHED, Failure, State

MOST_FAILURES_SHOWN = 20
"""Failed blocks that the text lists; JSON lists all."""

_TAIL_NBYTES = 256
"""By so much of the end of what was read it is known again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the journal proves."""

    run_dir: str
    """Where it was read."""

    num_blocks: int
    """Blocks of the plan."""

    num_done: int
    """Blocks whose bytes are durably written."""

    num_running: int
    """Blocks that ranks held at the last sign of life; 0 when the run does not run."""

    num_failed: int
    """Blocks tried as often as allowed."""

    num_failed_lately: int
    """Those of them that failed in the latest start; what failed before is to be tried again."""

    num_ranks: int
    """Ranks of the latest start."""

    slurm: dict[str, Any] | None
    """Slurm's job of the latest start; None: it was not started under Slurm."""

    is_alive: bool
    """Whether the run has given a sign of life lately."""

    blocks_per_second: float | None
    """Pace since the latest start; None before the first block."""

    seconds_left: float | None
    """What is left at that pace; None when it is not known or not running."""

    starting: str | None
    """The job that has taken the run directory and not begun yet, in words; None: there is none."""

    end_reason: str | None
    """How the latest start ended: `finished`, `drained`, `failures`; None: it runs or was lost."""

    end_why: str
    """More about it in words, e.g. the error that stopped it."""

    failures: tuple[Failure, ...]
    """The failed blocks, with causes."""

    @property
    def exit_code(self) -> ExitCode:
        """What `--check` exits with."""
        if self.num_done == self.num_blocks:
            return ExitCode.ALL_DONE
        # A start that was drained or lost may not have come to what had failed before it.
        num_over = self.num_failed if self.end_reason == FINISHED else self.num_failed_lately
        is_over = self.num_done + num_over == self.num_blocks
        is_stopped = self.end_reason == FAILURES
        return ExitCode.BLOCKS_FAILED if is_over or is_stopped else ExitCode.DRAINED


def check_started(run_dir: Path) -> int:
    """Return the number of blocks of the plan, once there is a journal that says so.

    Raises:
        NotStartedError: there is none: the first start has not come that far.
        JournalError: the file is none, or cannot be read.
    """
    path = run_dir / journal.NAME
    header = journal.read_header(path)
    if header is None:
        raise NotStartedError(
            f"{path} does not exist: this config has not been run yet; start it with "
            "`python -m mpichunk run`",
            run_dir=run_dir,
        )
    return int(header["num_blocks"])


def find_starting(run_dir: Path) -> str | None:
    """Return in words which job is about to start where nothing is noted yet, None if none is."""
    holder = find_holder(run_dir)
    return None if holder is None else str(holder)


def read_status(run_dir: Path) -> RunStatus:
    """Return the status of a run directory; see `StatusReader`."""
    return StatusReader(run_dir).read()


class StatusReader:
    """Reads the journal of a run directory, and again what has come since.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / journal.NAME
        self._states = np.zeros(0, np.uint8)
        self._history = history.History()
        self._num_read = 0
        self._last = b""

    def read(self) -> RunStatus:
        """Return the status as it is now.

        Raises:
            JournalError: there is no journal (a NotStartedError), or the file is none.
        """
        try:
            return self._read()
        except FileNotFoundError:
            # `run --fresh` has set the journal aside while it was read.
            self._begin_anew(0)
            return self._read()

    def _read(self) -> RunStatus:
        """Return the status, unless the journal is set aside meanwhile."""
        path, num_blocks = self._path, check_started(self._run_dir)
        if len(self._states) != num_blocks or self._read_end() != self._last:
            self._begin_anew(num_blocks)
        self._num_read = journal.scan(path, self._states, self._num_read)
        self._last = self._read_end()
        self._history.follow(path)
        last_time = max(path.stat().st_mtime, self._history.last_beat.get("time", 0.0))
        is_complete = bool((self._states == State.DONE).all())
        holder = None if is_complete else find_holder(self._run_dir)
        if holder is None or not self._history.end:
            return self._status(last_time, is_alive=holder is not None)
        # A job that has noted its end is about to leave; one that came later has noted nothing.
        is_later = holder.renewed > self._history.end["time"]
        return self._status(last_time, starting=str(holder) if is_later else None)

    def _begin_anew(self, num_blocks: int) -> None:
        """Forget everything: there is another journal, or its last lines were taken back."""
        self._states = np.zeros(num_blocks, np.uint8)
        self._history = history.History()
        self._num_read = 0
        self._last = b""

    def _read_end(self) -> bytes:
        """Return the last bytes of what was read, as they are in the file now."""
        begin = max(0, self._num_read - _TAIL_NBYTES)
        with self._path.open("rb") as file:
            file.seek(begin)
            return file.read(self._num_read - begin)

    def _status(
        self, last_time: float, *, is_alive: bool = False, starting: str | None = None
    ) -> RunStatus:
        """Return what was read, put together."""
        states, told = self._states, self._history
        num_done = int(np.count_nonzero(states == State.DONE))
        start, end = told.starts[-1] if told.starts else {}, told.end
        lately = told.failures(states, of_latest_start=True)
        # A job that runs tries again what has failed before it started.
        failures = lately if is_alive else told.failures(states)
        num_left = len(states) - num_done
        num_held = told.last_beat.get("num_held", 0) if is_alive else 0
        pace = _pace(start, num_done, last_time)
        return RunStatus(
            run_dir=str(self._run_dir),
            num_blocks=len(states),
            num_done=num_done,
            num_running=min(num_held, num_left - len(failures)),
            num_failed=len(failures),
            num_failed_lately=len(lately),
            num_ranks=int(start.get("num_ranks", 0)),
            slurm=start.get("slurm"),
            is_alive=is_alive,
            blocks_per_second=pace,
            seconds_left=num_left / pace if pace and is_alive else None,
            starting=starting,
            end_reason=end.get("reason"),
            end_why=end.get("why", ""),
            failures=tuple(failures),
        )


def _pace(start: dict[str, Any], num_done: int, last_time: float) -> float | None:
    """Return blocks per second since a start, None before the first block."""
    num_new = num_done - start.get("num_done", 0)
    seconds = last_time - start.get("time", last_time)
    return num_new / seconds if num_new > 0 and seconds > 0 else None
