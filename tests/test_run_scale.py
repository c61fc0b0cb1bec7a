"""More ranks than cores: 64 of them on a small volume."""

import re
from pathlib import Path

import pytest

from tests.endtoend import assert_same_files, block_lines, write_config

RUN = ("-m", "mpichunk", "run")
NUM_RANKS = 64


def small_config(folder: Path) -> Path:
    return write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=64,128,128&seed=9"},
        model={"backend": "identity"},
        patch={"shape": [12, 24, 24], "overlap": [4, 8, 8]},
        block={"shape": [16, 16, 16]},
        output={"volume": "out.zarr", "dtype": "uint8", "chunk_shape": [16, 16, 16]},
        compute={"threads": 1},
    )


@pytest.mark.slow
def test_64_ranks(tmp_path, mpirun, python):
    config = small_config(tmp_path / "many")
    done = mpirun(NUM_RANKS, *RUN, config, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "all 256 blocks are done" in done.stderr

    alone = small_config(tmp_path / "alone")
    assert python(*RUN, alone).returncode == 0
    assert_same_files(tmp_path / "many/out.zarr", tmp_path / "alone/out.zarr")

    # Rank 0 has not done it all by itself, and no rank has taken much more than its share.
    ranks = [line["rank"] for line in block_lines(tmp_path / "many/runs/config")]
    assert len(set(ranks)) > NUM_RANKS / 2
    assert len(list((tmp_path / "many/runs/config/logs").iterdir())) == NUM_RANKS

    # An identity run loads no torch: it stays a small program, however many ranks there are.
    found = re.search(r"peak memory, MiB +([\d.]+) +([\d.]+) +([\d.]+)", done.stderr)
    assert found, done.stderr
    print(f"peak memory of a rank, MiB: {found.groups()} (min, median, max)")
    assert float(found[3]) < 250
