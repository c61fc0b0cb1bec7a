"""Whole runs that are killed, and resumed on other ranks: no byte differs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mpichunk.rundir import journal
from tests.endtoend import (
    assert_same_files,
    block_lines,
    check,
    kill_one_rank,
    kill_tree,
    most_redone,
    start_lines,
    status_of,
    wait_until_done,
    write_config,
)

RUN = ("-m", "mpichunk", "run")


def slow_config(folder: Path) -> Path:
    """Write a config that takes a while: its input is computed, and read again and again."""
    return write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=64,168,168&seed=4"},
        model={"backend": "identity"},
        patch={"shape": [16, 32, 32], "overlap": [8, 16, 16]},
        block={"shape": [16, 24, 24], "stitch": "seamless"},
        output={"volume": "out.zarr", "dtype": "uint8", "chunk_shape": [16, 24, 24]},
    )


@pytest.mark.slow
def test_killed_again_and_again_and_resumed_on_other_ranks(tmp_path, mpirun, python, capsys):
    undisturbed = slow_config(tmp_path / "undisturbed")
    done = mpirun(2, *RUN, undisturbed)
    assert done.returncode == 0, done.stderr
    num_blocks = len(block_lines(tmp_path / "undisturbed/runs/config"))

    config = slow_config(tmp_path / "killed")
    run_dir, output = tmp_path / "killed/runs/config", tmp_path / "killed/out.zarr"
    assert check(config) == 75
    assert "nothing is done yet" in capsys.readouterr().out

    # The first start, of one rank, has all cores: the others keep its number of threads.
    for num_ranks, mode, num_done, kill in (
        (1, "dynamic", 10, kill_tree),
        (3, "static", 30, kill_tree),
        (2, "dynamic", 50, kill_one_rank),
    ):
        start = python if num_ranks == 1 else partial(mpirun, num_ranks)
        seen: list[dict[str, Any]] = []

        def watch_and_kill(process, num_done=num_done, kill=kill, seen=seen):
            wait_until_done(process, run_dir, num_done - 5)
            seen.append(status_of(config, capsys))
            wait_until_done(process, run_dir, num_done)
            kill(process)

        done = start(*RUN, config, "--set", f"schedule.mode={mode}", meanwhile=watch_and_kill)
        assert done.returncode != 0
        assert seen[0]["is_alive"]
        assert seen[0]["num_ranks"] == num_ranks
        assert num_done - 5 <= seen[0]["num_done"] < num_blocks == seen[0]["num_blocks"]
        assert check(config) == 75
        # What is lost: the blocks that ranks held, and what they reported at the very end.
        num_journaled = len(block_lines(run_dir))
        num_written = sum(path.suffix == "" for path in output.glob("c/*/*/*/*"))
        print(f"{num_ranks} ranks: {num_journaled} blocks journaled, {num_written} written")
        assert num_done <= num_journaled < num_blocks
        shortest = min(sum(line["seconds"].values()) for line in block_lines(run_dir))
        assert 0 <= num_written - num_journaled <= most_redone(shortest) * num_ranks
    # What a kill leaves now and then.
    (output / "c/0/0/0/0_ec3970eed89698c6.__lock").write_bytes(b"half a chunk")
    done = mpirun(5, *RUN, config, "--set", "schedule.mode=static")
    assert done.returncode == 0, done.stderr
    assert check(config) == 0
    assert_same_files(output, tmp_path / "undisturbed/out.zarr")

    # No block that the journal knew was computed again.
    blocks = [line["block"] for line in block_lines(run_dir)]
    assert sorted(blocks) == list(range(num_blocks))
    starts = start_lines(run_dir)
    assert [line["num_ranks"] for line in starts] == [1, 3, 2, 5]
    assert len({line["threads"] for line in starts}) == 1
    header = journal.read_header(run_dir / journal.NAME)
    assert header["fingerprint"]["parts"]["compute.threads"] == starts[0]["threads"]
