"""The verbs `status` and `stop`: tell how far a run is, and ask it to end.

Knows no MPI, no network and no volume.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpichunk.config.file import LoadedConfig, load_plain_config, load_run_config
from mpichunk.config.schema import Config
from mpichunk.errors import ExitCode, JournalError, NotStartedError, UserError
from mpichunk.plan.fingerprint import differing_keys
from mpichunk.ranks.slurm import describe
from mpichunk.roles import drain
from mpichunk.rundir.layout import CONFIG
from mpichunk.rundir.runstatus import (
    MOST_FAILURES_SHOWN,
    RunStatus,
    StatusReader,
    check_started,
    find_starting,
    read_status,
)
from mpichunk.schedule.messages import DRAINED, FAILURES
from mpichunk.words import count, duration

WATCH_SECONDS = 2.0
"""How often `--watch` looks again."""


def status(
    config_path: Path, overrides: Sequence[str], *, as_json: bool, watch: bool, check: bool
) -> ExitCode:
    """Print how far the run of a config is.

    A run without a journal is an error where no job is about to begin one, but not for `check`: a
    job that was lost early leaves none.

    Raises:
        UserError: the config cannot be read, its run has never been started, or it was started
            with another config.
    """
    while isinstance(run := _find_run(config_path, overrides), _NotStarted):
        _print_not_started(run, as_json=as_json, check=check)
        if not watch or run.starting is None:
            return ExitCode.DRAINED if check else ExitCode.ALL_DONE
        time.sleep(WATCH_SECONDS)
    run_dir = Path(run.config.run_dir)
    with run.locating():
        _check_same_config(run.config, run_dir)
    reader = StatusReader(run_dir)
    while True:
        found = _read(reader, run)
        if isinstance(found, _NotStarted):
            _print_not_started(found, as_json=as_json, check=check)
            is_going_on, code = found.starting is not None, ExitCode.DRAINED
        else:
            print(json.dumps(_as_json(found), indent=2) if as_json else _text(found), flush=True)
            is_going_on, code = bool(found.is_alive or found.starting), found.exit_code
        if not watch or not is_going_on:
            return code if check else ExitCode.ALL_DONE
        time.sleep(WATCH_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _NotStarted:
    """A run of which nothing is noted yet."""

    run_dir: Path
    error: UserError
    """Why there is nothing to tell."""

    starting: str | None
    """The job that is about to change that, if there is one."""


def _find_run(config_path: Path, overrides: Sequence[str]) -> LoadedConfig | _NotStarted:
    """Return the config of a run that has been started.

    Raises:
        UserError: the config cannot be read, or its run was started with another one.
    """
    try:
        loaded = load_run_config(config_path, overrides)
        run_dir = Path(loaded.config.run_dir)
        with loaded.locating():
            check_started(run_dir)
    except NotStartedError as error:
        assert error.run_dir is not None
        starting = find_starting(error.run_dir)
        return _NotStarted(run_dir=error.run_dir, error=error, starting=starting)
    return loaded


def _read(reader: StatusReader, run: LoadedConfig) -> RunStatus | _NotStarted:
    """Return the status of a run that has been started, unless `run --fresh` begins it anew."""
    try:
        with run.locating():
            return reader.read()
    except NotStartedError as error:
        run_dir = Path(run.config.run_dir)
        return _NotStarted(run_dir=run_dir, error=error, starting=find_starting(run_dir))


def _print_not_started(run: _NotStarted, *, as_json: bool, check: bool) -> None:
    """Print the status of a run that has no journal.

    Raises:
        UserError: no job is about to begin one, and it is not for `check`.
    """
    if run.starting is None and not check:
        raise run.error
    print(_not_started(run, as_json=as_json), flush=True)


def _not_started(run: _NotStarted, *, as_json: bool) -> str:
    """Return the status of a run that has no journal."""
    if as_json:
        nothing = {"num_done": 0, "starting": run.starting, "end_reason": None}
        code = {"exit_code": int(ExitCode.DRAINED)}
        return json.dumps({"run_dir": str(run.run_dir)} | nothing | code, indent=2)
    state = "nothing is done yet: not started, or lost before its first block"
    if run.starting is not None:
        state = f"starting: {run.starting} has taken the run directory, no block is done yet"
    return f"run      {run.run_dir}\nstate    {state}"


def _check_same_config(config: Config, run_dir: Path) -> None:
    """Refuse to report on blocks that `run` would not take for those of this config."""
    path = run_dir / CONFIG
    if not path.exists():
        return
    differing = differing_keys(load_plain_config(path).config, config)
    if differing:
        raise JournalError(
            f"{run_dir} holds a run with another {', '.join(differing)}: see {path}; undo that "
            "change, choose another run_dir, or start over with `run --fresh`",
            key="run_dir",
        )


def stop(config_path: Path, overrides: Sequence[str]) -> ExitCode:
    """Ask the job that runs a config to end early, and say what is known of it.

    Raises:
        UserError: the config cannot be read, the run has never been started, or its directory
            cannot be written.
    """
    run = _find_run(config_path, overrides)
    if isinstance(run, _NotStarted):
        if run.starting is None:
            raise run.error
        run_dir = run.run_dir
    else:
        run_dir = Path(run.config.run_dir)
        with run.locating():
            found = read_status(run_dir)
        if not (found.is_alive or found.starting):
            print(f"{run_dir}: no job runs there, nothing to stop: {_state(found)}")
            return ExitCode.ALL_DONE
    try:
        drain.request_stop(run_dir)
    except OSError as error:
        raise JournalError(f"{error.filename}: cannot be written: {error.strerror}") from error
    print(f"{run_dir}: asked to finish the blocks that are being computed, and end")
    return ExitCode.ALL_DONE


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
        lines.append(
            f"pace     {found.blocks_per_second:.3g} blocks/s, {count(found.num_ranks, 'rank')}"
        )
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
    if found.starting:
        return f"starting: {found.starting} has taken the run directory, and begun no block yet"
    if found.exit_code == ExitCode.ALL_DONE:
        return "complete"
    if found.end_reason == FAILURES:
        return f"stopped early: {found.end_why}; fix that and run it again"
    if found.exit_code == ExitCode.BLOCKS_FAILED:
        return "ended with failed blocks; run it again to try those"
    if found.end_reason == DRAINED:
        return f"ended early as asked ({found.end_why}); run it again to go on where it stopped"
    return "not running; run it again to go on where it stopped"
