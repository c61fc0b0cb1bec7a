"""Whole runs under real `mpirun`: who computes what changes no byte."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from mpichunk import cli
from mpichunk.config.file import load_config
from mpichunk.geometry.box import Box
from mpichunk.plan.plan import Plan
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.volume import OutputSpec, create_output, open_output
from tests.endtoend import (
    TRAPPED,
    assert_same_files,
    block_lines,
    check,
    files_of,
    read_volume,
    start_lines,
    status_of,
    trap,
    write_config,
)

RUN = ("-m", "mpichunk", "run")
OFFSET = (-7, 100, 3)
SHAPE = (42, 75, 94)
DOMAIN = Box.from_shape(OFFSET, SHAPE)
ROI = Box(start=(-4, 107, 9), stop=(31, 171, 90))


def texture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, SHAPE, dtype=np.uint8)


def identity_config(folder: Path, raw: Path, **sections: Any) -> Path:
    """Write a config whose ROI, offset, patches, blocks and shards do not fit one another."""
    config: dict[str, Any] = {
        "input": {"volume": str(raw)},
        "roi": {"start": list(ROI.start), "stop": list(ROI.stop)},
        "model": {"backend": "identity", "out_channels": 2},
        "patch": {"shape": [7, 13, 15], "overlap": [2, 5, 4], "batch_size": 3},
        "block": {"shape": [8, 24, 32]},
        "output": {
            "volume": "file://out/a|zarr3:",
            "chunk_shape": [4, 6, 8],
            "shard_shape": [8, 12, 16],
        },
    }
    return write_config(folder, **(config | sections))


@pytest.fixture(scope="module")
def identity(tmp_path_factory, python) -> SimpleNamespace:
    """A small volume, and what one rank without mpirun makes of it."""
    folder = tmp_path_factory.mktemp("identity")
    raw = folder / "raw.h5"
    with h5py.File(raw, "w") as file:
        data = file.create_dataset("raw", data=texture(), chunks=(8, 32, 32))
        data.attrs["voxel_offset"] = OFFSET
    config = identity_config(folder / "one", raw)
    # More files may be there than are written by the run, and so more than one block's.
    done = python(*RUN, config)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=folder, raw=raw, config=config, stderr=done.stderr, output=folder / "one/out/a"
    )


def test_one_rank_copies_the_roi_and_nothing_else(identity):
    found = read_volume(identity.output)
    where = (slice(None), *ROI.slices(DOMAIN.start))
    expected = np.zeros((2, *SHAPE), dtype=np.float32)
    expected[where] = (texture() / np.float32(255))[where[1:]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(files_of(identity.output)) > 100


@pytest.mark.parametrize(
    ("num_ranks", "mode"), [(2, "static"), (3, "dynamic"), (5, "static"), (8, "dynamic")]
)
def test_bytes_do_not_depend_on_the_ranks(tmp_path, mpirun, identity, num_ranks, mode):
    config = identity_config(tmp_path, identity.raw, schedule={"mode": mode})
    done = mpirun(num_ranks, *RUN, config)
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "out/a", identity.output)
    assert not list(tmp_path.rglob("*.__lock"))
    np.testing.assert_array_equal(read_volume(tmp_path / "out/a"), read_volume(identity.output))
    lines = block_lines(tmp_path / "runs/config")
    num_blocks = len(plan_of(config))
    assert sorted(line["block"] for line in lines) == list(range(num_blocks))
    if mode == "static":
        # Contiguous runs in the order of ranks.
        ranks = [line["rank"] for line in sorted(lines, key=lambda line: line["block"])]
        assert ranks == sorted(ranks)
        assert set(ranks) == set(range(num_ranks))
    logs = sorted(path.name for path in (tmp_path / "runs/config/logs").iterdir())
    assert logs == [f"rank-{rank:05d}.log" for rank in range(num_ranks)]


def plan_of(config: Path) -> Plan:
    return Plan.from_config(load_config(config).config, DOMAIN)


def test_blocks_that_are_not_finite_in_different_ways_stop_the_run_as_one(tmp_path, mpirun):
    raw_zyx = np.ones((512, 8, 8), np.float32)
    raw_zyx[:256:8, 0, 0] = np.nan  # seen by one patch
    raw_zyx[259::8, 0, 0] = np.nan  # by two
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["raw"] = raw_zyx
    config = write_config(
        tmp_path,
        input={"volume": "raw.h5"},
        model={"backend": "identity"},
        patch={"shape": [4, 8, 8], "overlap": [2, 0, 0]},
        block={"shape": [8, 8, 8], "margin": [0, 0, 0]},
        output={"volume": "out.zarr", "chunk_shape": [8, 8, 8]},
        schedule={"mode": "static", "max_attempts": 1, "max_consecutive_failures": 20},
    )
    done = mpirun(2, *RUN, config)
    assert done.returncode == 3, done.stderr
    assert "the first blocks of 2 ranks failed alike: block" in done.stderr, done.stderr
    text = (tmp_path / "runs/config/journal.jsonl").read_text()
    assert "from the output patch [" in text and "from output patches such as [" in text


# ---- With a network ---------------------------------------------------------------------------

NET = """
import os
import torch

class Net(torch.nn.Module):
    def __init__(self, crash=False):
        super().__init__()
        self.a = torch.nn.Conv3d(1, 5, 3, padding=1)
        self.b = torch.nn.Conv3d(5, 2, 3, padding=1)
        self.crash = crash
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
        if self.crash and rank == "1" and self.num_calls > 3:
            raise KeyError("a bug in the network")
        return torch.sigmoid(self.b(torch.relu(self.a(x))))
"""


def network_config(folder: Path, identity: SimpleNamespace, **model: Any) -> Path:
    """Write a config that runs `NET`, and the network, whose weights are the same each time."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (identity.folder / "net.py").write_text(NET)
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.manual_seed(5)
    weights = identity.folder / "weights.pt"
    if not weights.exists():
        torch.save({"state_dict": names["Net"]().state_dict()}, weights)
    return identity_config(
        folder,
        identity.raw,
        model={
            "backend": "pytorch",
            "path": str(identity.folder / "net.py:Net"),
            "weights": str(weights),
            "out_channels": 2,
            **model,
        },
        compute={"device": "cpu", "threads": 1},
    )


@pytest.mark.slow
def test_a_network_gives_the_same_bytes_on_one_rank_and_on_three(
    tmp_path, mpirun, python, identity
):
    for name, start in (("one", python), ("three", partial(mpirun, 3))):
        done = start(*RUN, network_config(tmp_path / name, identity))
        assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "three/out/a", tmp_path / "one/out/a")
    found = read_volume(tmp_path / "one/out/a", ROI)
    assert found.std() > 0.01


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_the_whole_job_at_once(tmp_path, mpirun, identity):
    config = network_config(tmp_path, identity, arguments={"crash": True})
    start = time.monotonic()
    done = mpirun(3, *RUN, config, timeout=90)
    assert time.monotonic() - start < 60
    assert done.returncode not in (0, 2, 3, 75)
    assert "mpichunk: rank 1 on " in done.stderr
    assert "Traceback" in done.stderr
    assert "KeyError: 'a bug in the network'" in done.stderr
    assert "net.py" in done.stderr
    assert cli.main(["status", str(config), "--check"]) == 75


# ---- Started again ----------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch, capfd):
    """Return `alone(*arguments) -> (exit code, stderr)`: the program in this process, no MPI."""
    monkeypatch.setattr("mpichunk.verbs.run.start_mpi", SerialCommunicator)

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        return cli.main([str(argument) for argument in arguments]), capfd.readouterr().err

    return run


def test_a_finished_run_is_left_alone_then_computed_afresh(tmp_path, mpirun, alone, identity):
    config = identity_config(tmp_path, identity.raw)
    output, run_dir = tmp_path / "out/a", tmp_path / "runs/config"
    assert alone("run", config)[0] == 0
    times = modification_times(tmp_path)
    first = block_lines(run_dir)

    # At another number of ranks, with which it would have had another number of threads.
    done = mpirun(2, *RUN, config)
    assert done.returncode == 0, done.stderr
    assert "are done" in done.stderr
    assert modification_times(tmp_path) == times

    code, told = alone("run", config, "--set", "patch.window=hann")
    assert code == 2
    assert "patch.window" in told
    assert '"bump" then, "hann" now' in told
    assert "Traceback" not in told
    assert modification_times(tmp_path) == times

    # A shard that is not as it was shows whether it is written again.
    shard = max(output.rglob("c/*/*/*/*"), key=lambda path: path.stat().st_size)
    shard.write_bytes(b"broken")
    done = mpirun(3, *RUN, config, "--fresh")
    assert done.returncode == 0, done.stderr
    assert_same_files(output, identity.output)
    assert sorted(line["block"] for line in block_lines(run_dir)) == list(range(len(first)))
    assert len(start_lines(run_dir)) == 1
    assert (run_dir / "journal.1.jsonl").exists()
    assert check(config) == 0


def modification_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_block_that_fails_is_listed_and_alone_computed_again(tmp_path, mpirun, identity, capsys):
    chunk_shape = (8, 32, 32)
    spec = OutputSpec(
        volume=str(tmp_path / "raw.zarr"),
        domain=DOMAIN,
        num_channels=1,
        dtype=np.dtype(np.uint8),
        chunk_shape=chunk_shape,
        shard_shape=None,
        voxel_size=None,
    )
    create_output(spec)
    open_output(spec).write(DOMAIN, texture()[None]).result()
    chunk = tmp_path / "raw.zarr/c/0/2/1/1"
    damaged = Box.from_shape((OFFSET[0] + 16, OFFSET[1] + 32, OFFSET[2] + 32), chunk_shape)
    config = identity_config(tmp_path, tmp_path / "raw.zarr")
    run_dir = tmp_path / "runs/config"
    plan = plan_of(config)
    victims = [b.index for b in plan if not b.input_box.intersect(damaged).is_empty]
    assert 0 < len(victims) < len(plan) / 2

    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    # So many neighbours of one chunk may fail in a row: they fail sooner than others are written.
    done = mpirun(3, *RUN, config, "--set", f"schedule.max_consecutive_failures={len(plan)}")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{len(victims)} of {len(plan)} blocks failed" in done.stderr
    assert sorted({line["block"] for line in block_lines(run_dir, "failed")}) == victims
    assert len(block_lines(run_dir, "retry")) == 2 * len(victims)
    others = sorted(set(range(len(plan))) - set(victims))
    assert sorted(line["block"] for line in block_lines(run_dir)) == others
    assert check(config) == 3
    told = capsys.readouterr().out
    assert f"failed   block {victims[0]}, {plan[victims[0]].core}: could not read " in told
    assert "raw.zarr" in told
    failures = status_of(config, capsys)["failures"]
    assert [failure["block"] for failure in failures] == victims
    assert {failure["attempt"] for failure in failures} == {3}

    chunk.write_bytes(whole)
    done = mpirun(2, *RUN, config)
    assert done.returncode == 0, done.stderr
    lines = block_lines(run_dir)
    assert sorted(line["block"] for line in lines[len(others) :]) == victims
    assert_same_files(tmp_path / "out/a", identity.output)
    assert check(config) == 0


# ---- Without MPI, and with the wrong one ------------------------------------------------------

NO_MPI = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}


def test_without_an_mpi_library_it_runs_alone_and_says_so(tmp_path, python, identity):
    config = identity_config(tmp_path, identity.raw)
    done = python(*RUN, config, env=NO_MPI)
    assert done.returncode == 0, done.stderr
    assert "1 rank, MPI: no MPI library" in done.stderr
    assert_same_files(tmp_path / "out/a", identity.output)


@pytest.mark.parametrize(
    ("variable", "environment"),
    [
        # MPICH's mpiexec and Open MPI's library: the library starts, as a world of one.
        pytest.param("PMI_SIZE", {}, id="another-mpi"),
        pytest.param("OMPI_COMM_WORLD_SIZE", NO_MPI, id="no-mpi"),
        pytest.param("SLURM_STEP_NUM_TASKS", NO_MPI, id="no-mpi-srun"),
    ],
)
def test_tasks_that_do_not_see_each_other_are_refused(
    tmp_path, python, identity, variable, environment
):
    config = identity_config(tmp_path, identity.raw)
    done = python(*RUN, config, env=environment | {variable: 4})
    assert done.returncode == 2
    assert f"started 4 tasks ({variable}=4)" in done.stderr
    assert "srun --mpi=list" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


# ---- What is not imported ---------------------------------------------------------------------


def test_identity_imports_no_torch_and_the_other_verbs_no_mpi(tmp_path, python, identity):
    without_torch = trap(tmp_path / "torch", "torch")
    config = identity_config(tmp_path, identity.raw)
    done = python(*RUN, config, env=without_torch)
    assert done.returncode == 0, done.stderr

    # The traps work.
    environment = trap(tmp_path / "both", "torch", "mpi4py")
    assert python("-c", "import torch", env=environment).returncode == TRAPPED
    assert python(*RUN, config, env=environment).returncode == TRAPPED

    network = network_config(tmp_path / "network", identity)
    for arguments in (["--help"], ["plan", network], ["status", config], ["run", "--help"]):
        done = python("-m", "mpichunk", *arguments, env=environment)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
