"""What ends a job whose ranks do not find together."""

import subprocess
import sys

import pytest

from mpichunk.ranks.launcher import name_of
from mpichunk.ranks.recovery import Watchdog
from tests.launch import REPOSITORY


def watched(script):
    """Run a script with a watchdog of 0.8 s."""
    start = (
        "import time; from mpichunk.ranks.recovery import Watchdog\n"
        "w = Watchdog(0.8, who='rank 3 on node7')"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{start}\n{script}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_the_watchdog_ends_is_told_before_the_stacks():
    done = watched("w.start(); w.start(); time.sleep(60)")
    assert done.returncode == 1
    told, *rest = done.stderr.splitlines()
    assert told == (
        "mpichunk: rank 3 on node7: the ranks have not all met within 0.8 s "
        "(schedule.start_timeout_seconds); the job ends; run it again"
    )
    assert rest[0].startswith("Timeout")


@pytest.mark.parametrize("script", ["w.start(); w.stop(); time.sleep(1.2)", "w.start()"])
def test_nothing_is_told_of_a_watchdog_that_is_stopped_in_time(script):
    done = watched(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_watchdog_never_ends_anything():
    watchdog = Watchdog()
    watchdog.start()
    assert watchdog.running_since is not None
    watchdog.stop()
    assert watchdog.running_since is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "a process on node7"),
        ({"OMPI_COMM_WORLD_RANK": "4", "SLURM_PROCID": "0"}, "rank 4 on node7"),
        ({"SLURM_PROCID": "2"}, "rank 2 on node7"),
    ],
)
def test_a_process_has_a_name_before_mpi_starts(environ, name):
    assert name_of(environ, "node7") == name
