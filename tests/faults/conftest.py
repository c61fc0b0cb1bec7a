"""What tests of disturbed runs share: the output of one that nothing disturbs."""

import pytest

from tests.faults.slow import slow_config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, python):
    """The output of a run that nothing disturbs."""
    config = slow_config(tmp_path_factory.mktemp("undisturbed"))
    done = python("-m", "mpichunk", "run", config)
    assert done.returncode == 0, done.stderr
    return config.parent / "out/v.zarr"
