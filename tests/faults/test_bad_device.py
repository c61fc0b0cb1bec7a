"""A rank whose device or libraries are broken is left out; the others do its work."""

import pytest

from tests.endtoend import block_lines, check
from tests.faults.slow import NUM_BLOCKS, slow_config

PROGRAM = """
import os, sys
from mpichunk import cli
from mpichunk.verbs import run

load, rank = run.load_engine, os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))

def broken(job, request, prepared):
    if rank in sys.argv[2]:
        raise RuntimeError("CUDA error: no kernel image is available")
    return load(job, request, prepared)

run.load_engine = broken
sys.exit(cli.main(["run", sys.argv[1]]))
"""


@pytest.mark.parametrize(("bad", "mode"), [(0, "static"), (1, "dynamic")])
def test_a_rank_that_cannot_load_the_network_is_left_out(tmp_path, mpirun, bad, mode):
    config = slow_config(tmp_path, schedule={"mode": mode})
    done = mpirun(3, "-c", PROGRAM, config, bad)
    assert done.returncode == 0, done.stderr
    assert f"mpichunk: rank {bad} on " in done.stderr
    assert "cannot run the network: cpu fails: RuntimeError: CUDA error: no kernel" in done.stderr
    assert "the run goes on without it" in done.stderr
    assert "Traceback" not in done.stderr
    lines = block_lines(tmp_path / "runs/v")
    assert len(lines) == NUM_BLOCKS
    assert bad not in {line["rank"] for line in lines}
    assert check(config) == 0


def test_what_no_rank_can_load_is_one_message(tmp_path, mpirun):
    done = mpirun(2, "-c", PROGRAM, slow_config(tmp_path), "01")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("CUDA error: no kernel image") == 1
    assert "compute.device" in done.stderr
    assert "Traceback" not in done.stderr
