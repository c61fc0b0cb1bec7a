"""What ends a job whose ranks do not find together."""

import subprocess
import sys

import pytest

from mpichunk.ranks.launcher import name_of
from mpichunk.ranks.recovery import Fuse
from tests.launch import REPOSITORY


def burn(script):
    """Run a script with a fuse of 0.8 s."""
    start = (
        "import time; from mpichunk.ranks.recovery import Fuse\n"
        "f = Fuse(0.8, who='rank 3 on node7')"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{start}\n{script}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_the_fuse_ends_is_told_before_the_stacks():
    done = burn("f.light(); f.light(); time.sleep(60)")
    assert done.returncode == 1
    told, *rest = done.stderr.splitlines()
    assert told == (
        "mpichunk: rank 3 on node7: the ranks have not all met within 0.8 s "
        "(schedule.start_timeout_seconds); the job ends; run it again"
    )
    assert rest[0].startswith("Timeout")


@pytest.mark.parametrize("script", ["f.light(); f.put_out(); time.sleep(1.2)", "f.light()"])
def test_nothing_is_told_of_a_fuse_that_does_not_burn_down(script):
    done = burn(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_fuse_never_ends_anything():
    fuse = Fuse()
    fuse.light()
    assert fuse.lit_since is not None
    fuse.put_out()
    assert fuse.lit_since is None


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
