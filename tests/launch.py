"""Starts programs and a real mpirun in a clean environment, and ends what they started.

Knows no module of the package.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

Completed = subprocess.CompletedProcess[str]
Launch = Callable[..., Completed]


def finish(
    command: list[object],
    *,
    timeout: float = 120,
    cwd: Path | None = None,
    env: Mapping[str, object] | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], object] | None = None,
) -> Completed:
    """Run a command to its end, in a process group that is ended with it.

    `env` is added to the environment. A job that outlives `timeout` seconds is ended, and fails the
    test. `meanwhile` is called with the started process, and may look at it, or end it.
    """
    words = [str(word) for word in command]
    with TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=launch_environment(scratch) | {n: str(value) for n, value in (env or {}).items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            if meanwhile is not None:
                meanwhile(process)
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            # mpirun ends its ranks when it is asked to, and would leave them behind if killed.
            process.terminate()
            try:
                out, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                pytest.fail(f"{' '.join(words)}: still running after {timeout} s\n{out}\n{err}")
            raise
    return Completed(words, process.returncode, out, err)


def launch_environment(scratch: Path | str) -> dict[str, str]:
    """Return this process's environment without what a launcher or MPI itself has put there.

    A process that has started MPI carries variables that would make an mpirun below it believe
    that it is part of that job.

    Args:
        scratch: A folder of this launch alone. An mpirun that is killed leaves ompi.PID there, and
            a later one that is given the same process id does not start (Open MPI 5.0).
    """
    foreign = ("OMPI_COMM_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HYDRA_", "MPI_LOCAL")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    paths = [str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])]
    # Of Open MPI 5.0, a transport to other hosts: where it finds no use it sleeps for a second.
    kept.setdefault("OMPI_MCA_btl", "^ofi")
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(scratch),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def find_mpirun() -> str | None:
    """Return the mpirun beside this Python, whose MPI library it uses, or that of the PATH."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


@cache
def mpirun_options(program: str) -> list[str]:
    """Return the options that allow more ranks than cores, each on all cores."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if "Open MPI" in version.stdout or "prte" in version.stdout:
        return ["--oversubscribe", "--bind-to", "none"]
    return ["-bind-to", "none"]
