"""Jobs that end by being aborted, so each is launched by its own mpirun."""

import time

import pytest


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("main", "ZeroDivisionError: in the main thread"),
        ("thread", "ZeroDivisionError: in a thread"),
        ("before", "ZeroDivisionError: before the loop"),
    ],
)
def test_a_crash_in_any_thread_ends_all_ranks_at_once(mpirun, way, told):
    start = time.monotonic()
    done = mpirun(3, "-m", "tests.crash_program", way, timeout=60)
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" in done.stderr
    assert "mpichunk: rank 1 on " in done.stderr
    assert "mpichunk: rank 0 on " not in done.stderr


def test_an_exit_code_passes_through(mpirun):
    assert mpirun(3, "-m", "tests.crash_program", "exit").returncode == 3


def test_a_user_error_on_every_rank_is_left_to_the_caller(mpirun):
    done = mpirun(2, "-m", "tests.crash_program", "user")
    assert done.returncode == 1
    assert "told once: the same on every rank" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_mpi_library_there_is_one_rank(python):
    script = (
        "from mpichunk.ranks.comm import start_mpi; c = start_mpi();"
        "print(type(c).__name__, c.size, c.library)"
    )
    done = python("-c", script, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.stdout.startswith("SerialCommunicator 1 no MPI library: cannot load MPI library")
