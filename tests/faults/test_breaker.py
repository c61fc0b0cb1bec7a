"""Blocks that fail, errors that would make every block fail, and disks that are full."""

import json
from functools import partial

import pytest

from mpichunk.rundir import journal
from tests.endtoend import assert_same_files, block_lines, check, status_of
from tests.faults.slow import NUM_BLOCKS, program, remount, slow_config, small_disk


def finish(config, start, undisturbed):
    """Run it again, undisturbed, and compare every byte."""
    done = start("-m", "mpichunk", "run", config)
    assert done.returncode == 0, done.stderr
    assert check(config) == 0
    assert_same_files(config.parent / "out/v.zarr", undisturbed)


def test_a_failed_block_is_tried_on_other_ranks_then_listed(tmp_path, mpirun, undisturbed, capsys):
    config = slow_config(tmp_path)
    how = program(config, 0.02, nan_blocks=[7, 30])
    done = mpirun(3, *how["args"], env=how["env"])
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert check(config) == 3
    tries = [
        (line["block"], line["rank"])
        for state in ("retry", "failed")
        for line in block_lines(tmp_path / "runs/v", state)
    ]
    assert sorted(tries) == [(block, rank) for block in (7, 30) for rank in (0, 1, 2)]
    found = status_of(config, capsys)
    assert (found["num_done"], found["num_failed"]) == (NUM_BLOCKS - 2, 2)
    assert [failure["block"] for failure in found["failures"]] == [7, 30]
    assert all("NaN" in failure["message"] for failure in found["failures"])

    # Running again tries only those, and lists those that fail again.
    how = program(config, 0.02, nan_blocks=[30])
    done = mpirun(2, *how["args"], env=how["env"])
    assert done.returncode == 3, done.stderr
    assert block_lines(tmp_path / "runs/v")[-1]["block"] == 7
    assert len(block_lines(tmp_path / "runs/v")) == NUM_BLOCKS - 1
    finish(config, partial(mpirun, 2), undisturbed)
    assert len(block_lines(tmp_path / "runs/v")) == NUM_BLOCKS


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_error_of_every_block_stops_the_run_early(
    tmp_path, mpirun, undisturbed, capsys, num_ranks
):
    config = slow_config(tmp_path, schedule={"max_consecutive_failures": 5})
    how = program(config, 0.05, nan_blocks=list(range(NUM_BLOCKS)))
    done = mpirun(num_ranks, *how["args"], env=how["env"])
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "ending early: " in done.stderr
    assert "NaN" in done.stderr
    found = status_of(config, capsys)
    assert found["end_reason"] == "failures"
    assert "NaN" in found["end_why"]
    assert (found["num_done"], found["is_alive"]) == (0, False)
    assert 1 <= found["num_failed"] <= 5 + 3 * num_ranks
    assert check(config) == 3
    capsys.readouterr()
    finish(config, partial(mpirun, num_ranks), undisturbed)


def test_a_full_disk_under_the_output(tmp_path, mpirun, undisturbed, capsys):
    config = slow_config(tmp_path)
    with small_disk(tmp_path / "out", 90 << 10):
        how = program(config, 0.05)
        done = mpirun(2, *how["args"], env=how["env"])
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        assert f"{tmp_path}/out/v.zarr" in done.stderr
        found = status_of(config, capsys)
        assert found["end_reason"] == "failures"
        assert 0 < found["num_done"] < NUM_BLOCKS
        assert found["num_failed"] >= 1
        assert check(config) == 3
        remount(tmp_path / "out", "size=1m")
        capsys.readouterr()
        finish(config, partial(mpirun, 2), undisturbed)
    blocks = [line["block"] for line in block_lines(tmp_path / "runs/v")]
    assert sorted(blocks) == list(range(NUM_BLOCKS))


def test_a_full_disk_under_the_journal(tmp_path, mpirun, undisturbed):
    config = slow_config(tmp_path)
    with small_disk(tmp_path / "runs", 32 << 10):
        how = program(config, 0.05)
        done = mpirun(2, *how["args"], env=how["env"])
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert "Logging error" not in done.stderr
        path = tmp_path / "runs/v" / journal.NAME
        assert f"{path}: the journal cannot be written: No space left" in done.stderr
        num_done = len(block_lines(tmp_path / "runs/v"))
        assert 0 < num_done < NUM_BLOCKS
        # Whole lines only; how it ended may or may not have found a place.
        for line in path.read_text().splitlines():
            json.loads(line)
        assert check(config) in (3, 75)
        remount(tmp_path / "runs", "size=1m")
        finish(config, partial(mpirun, 2), undisturbed)
        assert len(block_lines(tmp_path / "runs/v")) == NUM_BLOCKS


def test_a_run_directory_that_is_full_from_the_start(tmp_path, mpirun):
    config = slow_config(tmp_path)
    with small_disk(tmp_path / "runs", 8 << 10):
        done = mpirun(2, "-m", "mpichunk", "run", config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr
    assert "run_dir" in done.stderr


def test_a_run_directory_that_cannot_be_written(tmp_path, mpirun):
    config = slow_config(tmp_path)
    with small_disk(tmp_path / "runs", 1 << 20):
        remount(tmp_path / "runs", "ro")
        done = mpirun(2, "-m", "mpichunk", "run", config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Read-only file system" in done.stderr
    assert "run_dir" in done.stderr
