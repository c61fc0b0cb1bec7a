"""Whole benchmarks, which leave nothing behind, and the places where they write meanwhile."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpichunk.backends.stageclock import BENCH_STAGES
from mpichunk.bench.scratch import scratch_output, scratch_parent
from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.errors import VolumeError
from mpichunk.job.forward_probe import read_probe, warm_seconds, write_probe
from mpichunk.job.startup import prepare
from mpichunk.plan.probe import Probe
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.bench import Options, bench_on
from mpichunk.verbs.run import run_on
from tests.endtoend import files_of
from tests.launch import Launch, finish
from tests.smallrun import NET, SHORT, config_file


@pytest.mark.parametrize(
    "volume",
    [
        "out/pred.zarr",
        "file://out/pred|zarr3:",
        "zarr2://file://out/pred",
        "precomputed://file://out/pred",
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": "out/pred/"}},
    ],
)
def test_scratch_is_like_the_output_and_goes(tmp_path: Path, volume: Any) -> None:
    output = load_config(config_file(tmp_path, output={"volume": volume})).config
    spec = prepare(output).output
    parent = scratch_parent(spec, None)
    assert parent == tmp_path, "the nearest folder that is there"
    with pytest.raises(KeyError), scratch_output(spec, parent) as scratch:
        assert (scratch.dtype, scratch.domain) == (spec.dtype, spec.domain)
        assert any(name.startswith(".mpichunk-bench-") for name in files_of(tmp_path))
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "net.py"]


def test_scratch_elsewhere(tmp_path: Path) -> None:
    spec = prepare(load_config(config_file(tmp_path)).config).output
    assert scratch_parent(spec, tmp_path / ".") == tmp_path
    with pytest.raises(VolumeError, match="is not a folder"):
        scratch_parent(spec, tmp_path / "nowhere")
    with (
        pytest.raises(VolumeError, match="cannot be written"),
        scratch_output(spec, tmp_path / "nowhere"),
    ):
        pass


def test_scratch_of_a_bucket_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    spec = prepare(load_config(config_file(tmp_path)).config).output
    spec = replace(spec, volume="gs://bucket-of-nobody/pred|zarr3:")
    parent = scratch_parent(spec, None)
    assert parent == tmp_path / "tmp"
    with scratch_output(spec, parent):
        assert any(name.endswith("zarr.json") for name in files_of(parent))
    assert files_of(parent) == {}


# ---- Whole ones ---------------------------------------------------------------------------------


def run_bench(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert bench_on(SerialCommunicator(), path, overrides, SHORT) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": {"batch_size": 3}, "model": {"augment": ["flip_z", "flip_y"]}},
        {"model": {"activation": "softmax"}, "output": {"reduce": "vote"}},
        {"output": {"volume": "precomputed://file://out/pred"}},
    ],
)
def test_bench_measures_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    path = config_file(tmp_path, **changes)
    found = run_bench(path, capsys)
    assert found["num_ranks"] == 1 and found["num_repeats"] == 2
    assert found["engine"]["backend"] == "pytorch" and found["engine"]["threads"] == 1
    blocks = found["blocks"]
    assert blocks["per_rank"] == 2 and blocks["num_voxels"] == 2 * 12 * 16 * 16
    config = load_config(path).config
    work = prepare(config).work
    assert found["redundancy"] == work.redundancy
    turns = len(changes.get("model", {}).get("augment", [])) * 2 or 1
    assert found["turns"] == turns
    (own,) = found["ranks"]
    for item in own["whole"]:
        batches = sum(-(-n // config.patch.batch_size) for n in [item["num_patches"] // 2] * 2)
        assert item["num_batches"] == turns * batches
        assert item["seconds"] > 0 and item["nbytes_written"] > 0
    for name in ("bare", "whole"):
        spread = found["mvox_per_second"][name]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert found["efficiency"]["median"] > 0
    assert set(found["stages"]) == set(BENCH_STAGES) and min(found["stages"].values()) > 0
    assert found["bound_by"] and found["advice"][0]["message"]
    # Nothing but what the forward told.
    left = {name for name in files_of(tmp_path) if "__pycache__" not in name}
    assert left == {"config.yaml", "net.py", "runs/config/probe.json"}


def test_plan_and_run_know_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    assert main(["plan", str(path)]) == 0
    assert "unmeasured" in capsys.readouterr().out
    found = run_bench(path, capsys)
    assert main(["plan", str(path), "--json"]) == 0
    probe = json.loads(capsys.readouterr().out)["probe"]
    assert probe["seconds"] == found["seconds_per_batch"]
    # A network this small may fit into pages that are there.
    assert probe["nbytes"] is not None and probe["device"] == "cpu, 1 CPU thread"
    assert main(["plan", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "for one rank, measured on cpu, 1 CPU thread" in text and "unmeasured" not in text
    # Another network, patch or device is another forward; what only follows it is not.
    assert main(["plan", str(path), "--set", "patch.shape=[8,12,12]"]) == 0
    assert "unmeasured" in capsys.readouterr().out
    assert main(["plan", str(path), "--set", "output.dtype=float32"]) == 0
    assert "unmeasured" not in capsys.readouterr().out
    # A run directory with a probe in it is still a new one.
    assert run_on(SerialCommunicator(), path) == 0


def test_bench_of_a_run_that_is_there_touches_nothing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path)
    assert run_on(SerialCommunicator(), path) == 0
    capsys.readouterr()
    before = files_of(tmp_path)
    # What the run's own forward told is replaced: now more is known.
    assert before.pop("runs/config/probe.json")
    run_bench(path, capsys)
    after = files_of(tmp_path)
    assert after.pop("runs/config/probe.json")
    assert after == before


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, model={"augment": ["rot90"]})
    assert bench_on(SerialCommunicator(), path, [], Options(num_repeats=1, num_blocks=1)) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "measured 1 block per rank and repeat, 1 repeat; 8 patches a repeat" in words
    assert "times the network predicts each voxel, 4 of them turned ways" in words
    assert "of the whole's time:" in words and "bound by" in words
    assert max(len(line) for line in text.splitlines()) <= 110


def test_identity_and_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((24, 40, 40), np.uint8)
    mask[14:20, 20:30, 5:10] = 1
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["mask"] = mask
    sizes = {"voxel_size": [4, 4, 4]}
    path = config_file(
        tmp_path,
        input=sizes,
        model={"backend": "identity", "path": None},
        mask={"volume": "mask.h5"} | sizes,
    )
    found = run_bench(path, capsys)
    assert found["engine"]["backend"] == "identity"
    assert found["mvox_per_second"]["whole"]["median"] > 0
    # Only one block is wanted, and it is whole: z from 12, y from 16, x from 0.
    assert found["blocks"]["indices"] == [12]


def test_blank_region_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "zero.h5", "w") as file:
        file["raw"] = np.zeros((24, 32, 32), np.uint8)
    path = config_file(tmp_path, input={"volume": "zero.h5"})
    found = run_bench(path, capsys)
    assert found["advice"][0]["key"] == "roi" and "no patch ran" in found["advice"][0]["message"]
    assert found["seconds_per_batch"] == 0 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.path=gone.py:Net", "gone.py"),
        ("model.out_channels=3", "model.out_channels"),
        ("roi={start: [0,0,0], stop: [99,1,1]}", "roi"),
        ("model.bogus=1", "unknown key"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    path = config_file(tmp_path)
    assert bench_on(SerialCommunicator(), path, [change], SHORT) == 2
    found = capsys.readouterr()
    assert found.out == "" and message in found.err
    assert "Traceback" not in found.err
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


def test_block_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    net = NET.replace("return self.b(", "return float('nan') * self.b(").replace(
        "def forward(self, x):",
        "def forward(self, x):\n        if x.std() > 0.285: return self.b(torch.relu(self.a(x)))",
    )
    (tmp_path / "net.py").write_text(net)
    assert bench_on(SerialCommunicator(), path, [], SHORT) == 2
    assert "failed (BlockError): the result holds NaN" in capsys.readouterr().err
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_bench_leaves_nothing(tmp_path: Path, name: str) -> None:
    path = config_file(tmp_path)

    def interrupt(process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while not any("/c/" in written for written in files_of(tmp_path)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))

    done = finish(
        [sys.executable, "-m", "mpichunk", "bench", path, "--repeats", 1000], meanwhile=interrupt
    )
    assert done.returncode == 1 and "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(".mpichunk-bench" in str(found) for found in tmp_path.iterdir())


def test_two_ranks(tmp_path: Path, mpirun: Launch) -> None:
    path = config_file(tmp_path)
    done = mpirun(2, "-m", "mpichunk", "bench", path, "--repeats", 1, "--blocks", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_ranks"] == len(found["ranks"]) == 2
    assert found["blocks"]["num_voxels"] == 4 * 12 * 16 * 16
    assert len(found["blocks"]["indices"]) == 4
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


def test_two_ranks_and_a_mistake(tmp_path: Path, mpirun: Launch) -> None:
    path = config_file(tmp_path)
    done = mpirun(2, "-m", "mpichunk", "bench", path, "--set", "model.out_channels=5")
    assert done.returncode == 2
    assert done.stderr.count("the network returned 2 channels") == 1


def test_probe_that_is_damaged_is_none(tmp_path: Path) -> None:
    config = Config.model_validate(load_config(config_file(tmp_path)).config.model_dump())
    files = [tmp_path / "net.py"]
    run_dir = tmp_path / "r"
    assert read_probe(run_dir, config, files) is None
    probe = Probe(seconds=0.5, nbytes=None, device="cpu")
    write_probe(run_dir, config, files, probe)
    assert read_probe(run_dir, config, files) == probe
    files[0].write_text(NET + "\n")
    assert read_probe(run_dir, config, files) is None
    (run_dir / "probe.json").write_text("{")
    assert read_probe(run_dir, config, files) is None


@pytest.mark.parametrize(("seconds", "most_forwards"), [(0.001, 20), (0.3, 1)])
def test_a_forward_is_timed_warm_and_a_long_one_is_not_repeated(
    seconds: float, most_forwards: int
) -> None:
    calls: list[int] = []

    def forward() -> None:
        calls.append(1)
        cold = 0.03 if len(calls) <= 2 and most_forwards > 1 else 0.0
        time.sleep(seconds + cold)

    found = warm_seconds(forward)
    assert len(calls) <= most_forwards
    assert seconds <= found
    assert most_forwards == 1 or found < 0.03
