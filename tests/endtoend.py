"""What tests of whole runs share: configs and outputs as files, journals as lines, jobs killed."""

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from mpichunk import cli
from mpichunk.geometry.box import Box
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.rundir import journal
from mpichunk.schedule.lookahead import LOOKAHEAD_SECONDS
from mpichunk.volume import open_input
from tests.journals import read_history


def write_config(folder: Path, *, name: str = "config.yaml", **sections: Any) -> Path:
    """Write a config made of these sections; relative paths in it start at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def read_volume(volume: object, box: Box | None = None) -> np.ndarray:
    """Return (c, z, y, x) of a stored volume, or of a box of it."""
    with open_input(str(volume)) as reader:
        return np.asarray(reader.read(box or reader.info.domain).result())


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its relative path, hidden ones too.

    A killed process may leave a chunk half written under a temporary name: that is no part of a
    volume.
    """
    paths = [p for p in folder.rglob("*") if not p.is_dir() and p.suffix != ".__lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_files(found: Path, expected: Path) -> None:
    """Compare two folders file by file, byte by byte."""
    files, wanted = files_of(found), files_of(expected)
    assert wanted, f"{expected} is empty"
    assert sorted(files.keys() - wanted.keys()) == [], "files that should not be there"
    assert sorted(wanted.keys() - files.keys()) == [], "files that are missing"
    assert [name for name in sorted(wanted) if files[name] != wanted[name]] == []


def most_redone(seconds_per_block: float) -> int:
    """Return how many blocks of one rank a crash may repeat at most.

    What its pipeline holds and one that is reported just now; and, where blocks are so short that
    leases wait, as many as may wait, since they are reported together.
    """
    return BLOCKS_IN_FLIGHT + 1 + int(LOOKAHEAD_SECONDS / seconds_per_block)


def block_lines(run_dir: Path, state: str = "done") -> list[dict[str, Any]]:
    """Return the journal's lines about blocks that came to this state, in order."""
    text = (run_dir / journal.NAME).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line.get("state") == state]


def start_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the journal notes at each start."""
    return read_history(run_dir / journal.NAME).starts


def check(config: Path) -> int:
    """Return what `status --check` exits with."""
    return cli.main(["status", str(config), "--check"])


def status_of(config: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what `status --json` prints."""
    capsys.readouterr()
    assert cli.main(["status", str(config), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def wait_until_done(process: subprocess.Popen[Any], run_dir: Path, num_blocks: int) -> None:
    """Wait until the journal of a job that runs has so many blocks done."""
    path = run_dir / journal.NAME
    end = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b'"state":"done"') < num_blocks:
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < end, "has not done its blocks in 120 s"
        time.sleep(0.005)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all below it, the lowest first: nobody tidies up after anybody."""
    try:
        top = psutil.Process(process.pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    # Stopped first, so that none sees another one die and ends in good order.
    for member in family:
        _signal(member.suspend)
    for member in reversed(family):
        _signal(member.kill)
    process.wait()
    end = time.monotonic() + 10
    while any(_is_alive(member) for member in family):
        assert time.monotonic() < end, "a killed process is still there"
        time.sleep(0.01)


def kill_one_rank(process: subprocess.Popen[Any]) -> None:
    """SIGKILL one rank of an mpirun, and leave it to mpirun to end the others."""
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [member for member in family if "mpichunk" in member.cmdline()]
    ranks[-1].kill()


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; nobody may be there to bury one whose parent is dead."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(send: Any) -> None:
    with suppress(psutil.NoSuchProcess):
        send()


def trap(folder: Path, *modules: str) -> dict[str, str]:
    """Return an environment in which importing one of these modules ends the process at once."""
    folder.mkdir(parents=True)
    for module in modules:
        # Not an exception: somebody might catch it.
        code = f"import os, sys, traceback\ntraceback.print_stack()\nos._exit({TRAPPED})\n"
        (folder / f"{module}.py").write_text(code)
    repository = Path(__file__).resolve().parents[1]
    return {"PYTHONPATH": f"{folder}{os.pathsep}{repository}", "PYTHONUNBUFFERED": "1"}


TRAPPED = 99
"""How a process ends that has stepped into a trap."""
