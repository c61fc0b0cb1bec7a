"""How far a run is, from its run directory alone: also while it runs, also after it died.

Reads the journal; knows no MPI, no network and no volume.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpichunk import drain, history, journal
from mpichunk.config import Config
from mpichunk.configfile import load_config
from mpichunk.errors import ExitCode, JournalError
from mpichunk.fingerprint import differing_keys
from mpichunk.lock import is_held
from mpichunk.messages import DRAINED, FAILURES, Failure, State
from mpichunk.slurm import describe
from mpichunk.words import duration

WATCH_SECONDS = 2.0
"""How often `--watch` looks again."""

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


def status(
    config_path: Path, overrides: Sequence[str], *, as_json: bool, watch: bool, check: bool
) -> ExitCode:
    """Print how far the run of a config is.

    Raises:
        UserError: the config cannot be read, its run has never been started, or it was started
            with another config.
    """
    loaded = load_config(config_path, overrides)
    run_dir = Path(loaded.config.run_dir)
    with loaded.locating():
        _check_same_config(loaded.config, run_dir)
    while True:
        with loaded.locating():
            found = read_status(run_dir)
        print(json.dumps(_as_json(found), indent=2) if as_json else _text(found), flush=True)
        if not watch or not found.is_alive:
            return found.exit_code if check else ExitCode.ALL_DONE
        time.sleep(WATCH_SECONDS)


def _check_same_config(config: Config, run_dir: Path) -> None:
    """Refuse to report on blocks that `run` would not take for those of this config."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    differing = differing_keys(load_config(path).config, config)
    if differing:
        raise JournalError(
            f"{run_dir} holds a run with another {', '.join(differing)}: see {path}; take that "
            "back, choose another run_dir, or start over with `run --fresh`",
            key="run_dir",
        )


def stop(config_path: Path, overrides: Sequence[str]) -> ExitCode:
    """Ask the job that runs a config to end early, and say what is known of it.

    Raises:
        UserError: the config cannot be read, the run has never been started, or its directory
            cannot be written.
    """
    loaded = load_config(config_path, overrides)
    run_dir = Path(loaded.config.run_dir)
    with loaded.locating():
        found = read_status(run_dir)
    if not found.is_alive:
        print(f"{run_dir}: no job runs there, there is nothing to stop: {_state(found)}")
        return ExitCode.ALL_DONE
    try:
        drain.request_stop(run_dir)
    except OSError as error:
        raise JournalError(f"{error.filename}: cannot be written: {error.strerror}") from error
    print(f"{run_dir}: asked to finish the blocks that are being computed, and end")
    return ExitCode.ALL_DONE


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


def _as_json(found: RunStatus) -> dict[str, Any]:
    """Return the status as JSON values."""
    return asdict(found) | {"exit_code": int(found.exit_code)}


def _text(found: RunStatus) -> str:
    """Return the status as a few lines."""
    share = found.num_done / found.num_blocks
    left = found.num_blocks - found.num_done - found.num_failed
    lines = [
        f"run      {found.run_dir}",
        f"blocks   {found.num_done} of {found.num_blocks} done ({share:.1%}), "
        f"{found.num_running} running, {found.num_failed} failed, {left} to do",
    ]
    if found.blocks_per_second:
        lines.append(f"pace     {found.blocks_per_second:.3g} blocks/s, {found.num_ranks} ranks")
    if found.seconds_left is not None:
        lines.append(f"left     {duration(found.seconds_left)}")
    if found.slurm:
        lines.append(f"job      {describe(found.slurm)}")
    lines.append(f"state    {_state(found)}")
    for failure in found.failures[:MOST_FAILURES_SHOWN]:
        lines.append(
            f"failed   block {failure.block}, {failure.core}: {failure.message} "
            f"(attempt {failure.attempt}, rank {failure.rank} on {failure.host})"
        )
    if len(found.failures) > MOST_FAILURES_SHOWN:
        lines.append(f"         and {len(found.failures) - MOST_FAILURES_SHOWN} more: --json")
    return "\n".join(lines)


def _state(found: RunStatus) -> str:
    """Return what is going on, and what to do next, in words."""
    if found.is_alive:
        return "running"
    if found.exit_code == ExitCode.ALL_DONE:
        return "complete"
    if found.end_reason == FAILURES:
        return f"stopped early: {found.end_why}; mend that and run it again"
    if found.exit_code == ExitCode.BLOCKS_FAILED:
        return "ended with failed blocks; run it again to try those"
    if found.end_reason == DRAINED:
        return f"ended early as asked ({found.end_why}); run it again to go on where it stopped"
    return "not running; run it again to go on where it stopped"
