"""How far a run is, from its run directory alone: also while it runs, also after it died.

Reads the journal; knows no MPI, no network and no volume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpichunk.errors import ExitCode, JournalError
from mpichunk.rundir import history, journal
from mpichunk.rundir.lock import is_held
from mpichunk.schedule.messages import FAILURES, Failure, State

MOST_FAILURES_SHOWN = 20
"""Failed blocks that the text lists; JSON lists all."""


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
        is_over = self.num_done + self.num_failed == self.num_blocks
        is_stopped = self.end_reason == FAILURES
        return ExitCode.BLOCKS_FAILED if is_over or is_stopped else ExitCode.DRAINED


def is_started(run_dir: Path) -> bool:
    """Return whether there is a journal: False before the first start has come that far.

    Raises:
        JournalError: the file is none, or cannot be read.
    """
    return journal.read_header(run_dir / journal.NAME) is not None


def read_status(run_dir: Path) -> RunStatus:
    """Read the journal of a run directory, and whether a job holds it.

    Raises:
        JournalError: there is no journal, or the file is none.
    """
    path = run_dir / journal.NAME
    header = journal.read_header(path)
    if header is None:
        raise JournalError(
            f"{path} does not exist: this config has not been run yet; start it with "
            "`python -m mpichunk run`",
            key="run_dir",
        )
    states = np.zeros(header["num_blocks"], np.uint8)
    journal.scan(path, states)
    num_done = int(np.count_nonzero(states == State.DONE))
    events = history.read_events(path)
    start = events.starts[-1] if events.starts else {}
    beat, end = events.last_beat, events.end
    last_time = max(path.stat().st_mtime, beat.get("time", 0.0))
    is_complete = num_done == header["num_blocks"]
    is_alive = not is_complete and not end and is_held(run_dir)
    # A job that runs tries again what has failed before it started.
    failures = history.read_failures(path, states, of_latest_start=is_alive)
    num_failed = len(failures)
    num_running = min(beat.get("num_held", 0), header["num_blocks"] - num_done - num_failed)
    pace = _pace(start, num_done, last_time)
    return RunStatus(
        run_dir=str(run_dir),
        num_blocks=header["num_blocks"],
        num_done=num_done,
        num_running=num_running if is_alive else 0,
        num_failed=num_failed,
        num_ranks=int(start.get("num_ranks", 0)),
        slurm=start.get("slurm"),
        is_alive=is_alive,
        blocks_per_second=pace,
        seconds_left=(header["num_blocks"] - num_done) / pace if pace and is_alive else None,
        end_reason=end.get("reason"),
        end_why=end.get("why", ""),
        failures=tuple(failures),
    )


def _pace(start: dict[str, Any], num_done: int, last_time: float) -> float | None:
    """Return blocks per second since a start, None before the first block."""
    num_new = num_done - start.get("num_done", 0)
    seconds = last_time - start.get("time", last_time)
    return num_new / seconds if num_new > 0 and seconds > 0 else None
