"""The ranks that the tests here run on: alone under pytest, or all of a world under mpirun."""

import tempfile
from pathlib import Path

import pytest

from mpichunk.ranks.comm import MpiCommunicator, SerialCommunicator, start_mpi


@pytest.fixture(scope="session")
def world():
    """All ranks that were started: one, when pytest runs alone."""
    return start_mpi()


@pytest.fixture(scope="session", params=["serial", "self", "world"])
def comm(request, world):
    """The same test on no MPI, on each rank for itself, and on all ranks together."""
    if request.param == "serial":
        return SerialCommunicator()
    if request.param == "world":
        return world
    if isinstance(world, SerialCommunicator):
        pytest.skip(world.library)
    from mpi4py import MPI

    return MpiCommunicator(MPI, MPI.COMM_SELF)


@pytest.fixture
def tmp_path():
    """A folder of this rank's own.

    Those of pytest are cleaned up by every process that ends, and ranks end at the same time.
    """
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)
