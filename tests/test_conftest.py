"""The rule of CI: what it could have run, it must not skip. Tried on a small suite of its own."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import _can_unshare
from tests.launch import REPOSITORY, Launch

SUITE = """
import pytest

def test_runs():
    pass

@pytest.mark.skipif(True, reason="{reason}")
def test_skips():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "launch.py", "optional.py"):
        shutil.copy(REPOSITORY / "tests" / name, tmp_path / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def run_suite(python: Launch, suite: Path, **env: str) -> tuple[int, str]:
    done = python("-m", "pytest", "-p", "no:cacheprovider", cwd=suite, env=env)
    return done.returncode, done.stdout


def test_a_skip_fails_in_ci_and_only_there(python: Launch, suite: Path) -> None:
    (suite / "tests/test_it.py").write_text(SUITE.format(reason="not today"))

    code, output = run_suite(python, suite, CI="true")
    assert code == 1
    assert "1 passed, 1 error" in output
    assert "skipped where CI could have run it: not today" in output

    code, output = run_suite(python, suite, CI="")
    assert code == 0
    assert "1 passed, 1 skipped" in output


def test_missing_real_data_may_be_skipped_only_when_missing(python: Launch, suite: Path) -> None:
    (suite / "tests/test_it.py").write_text(SUITE.format(reason="real data is not here"))

    code, _ = run_suite(python, suite, CI="true", MPICHUNK_TEST_DATA=str(suite / "nowhere"))
    assert code == 0

    code, _ = run_suite(python, suite, CI="true", MPICHUNK_TEST_DATA=str(suite))
    assert code == 1


def test_slurm_may_be_skipped_only_where_it_cannot_be_started(python: Launch, suite: Path) -> None:
    (suite / "tests/test_it.py").write_text(SUITE.format(reason="no Slurm here: not installed"))
    code, _ = run_suite(python, suite, CI="true")
    assert code == int(_can_unshare())


def test_slurm_is_left_out_unless_it_is_named(python: Launch, suite: Path) -> None:
    (suite / "tests/slurm").mkdir()
    (suite / "tests/slurm/test_it.py").write_text("def test_it():\n    pass\n")
    (suite / "tests/test_it.py").write_text("def test_it():\n    pass\n")
    for arguments, told in (
        ([], "1 passed, 1 deselected"),
        (["tests/test_it.py"], "1 passed"),
        (["tests/slurm"], "1 passed"),
        (["tests", "tests/slurm/test_it.py::test_it"], "2 passed"),
    ):
        done = python("-m", "pytest", "-p", "no:cacheprovider", *arguments, cwd=suite)
        assert told in done.stdout


def test_a_file_that_skips_itself_fails_in_ci(python: Launch, suite: Path) -> None:
    text = "import pytest\npytest.importorskip('no_such_module')\n"
    (suite / "tests/test_it.py").write_text(text)

    code, output = run_suite(python, suite, CI="true")
    assert code == 2
    assert "could not import 'no_such_module'" in output


def test_a_failure_on_one_rank_ends_all(mpirun: Launch, suite: Path) -> None:
    (suite / "tests/mpi").mkdir()
    (suite / "tests/mpi/test_it.py").write_text(
        "from mpi4py import MPI\n"
        "def test_it():\n"
        "    assert MPI.COMM_WORLD.rank != 1, 'rank 1 cannot'\n"
        "    MPI.COMM_WORLD.Barrier()\n"
    )
    done = mpirun(3, "-m", "pytest", "-m", "mpi", "tests/mpi", cwd=suite, timeout=60)
    assert done.returncode != 0
    assert "rank 1 of 3: tests/mpi/test_it.py::test_it failed" in done.stderr
    assert "rank 1 cannot" in done.stderr
