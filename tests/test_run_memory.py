"""Whole runs: refused before the first block where memory is short, else compared with plans."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.job.memory_check import keep_probe
from mpichunk.job.startup import prepare
from mpichunk.plan.estimate import estimate
from mpichunk.plan.memory import least_nbytes, total_nbytes
from mpichunk.plan.probe import Probe
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.rundir.lock import RunLock
from mpichunk.verbs.bench import bench_on
from mpichunk.verbs.run import run_on
from mpichunk.words import duration, size
from tests import smallrun
from tests.endtoend import files_of
from tests.launch import Launch
from tests.smallrun import NET, SHORT

RUN = ("-m", "mpichunk", "run")
GREEDY = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        # 32 MiB for each patch of a batch.
        return x + torch.ones(len(x), 1 << 23).sum() * 0
"""


config_file = partial(smallrun.config_file, block={"shape": [12, 24, 24]})


def slurm(megabytes: int) -> dict[str, str]:
    """Return what Slurm tells a job that may take so much on a node."""
    return {"SLURM_JOB_ID": "4711", "SLURM_MEM_PER_NODE": str(megabytes)}


def refused(done: Any, key: str, folder: Path) -> str:
    """Assert that a run was refused before anything was leased or written; return why."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "a rank needs about" in line]
    assert f": {key}" in line
    assert files_of(folder).keys() == {"config.yaml", "net.py"}
    return line


def test_a_batch_that_no_memory_holds_is_refused_before_the_network_loads(
    tmp_path: Path, python: Launch
) -> None:
    path = config_file(tmp_path, patch={"batch_size": 10**9})
    line = refused(python(*RUN, path), "patch.batch_size", tmp_path)
    assert "batch into and out of the network" in line and "would fit" in line


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_forward_that_needs_too_much_is_refused_on_all_ranks(
    tmp_path: Path, python: Launch, mpirun: Launch, num_ranks: int
) -> None:
    path = config_file(tmp_path, patch={"batch_size": 32}, model={"out_channels": 1})
    (tmp_path / "net.py").write_text(GREEDY)
    # What Python and torch take differs from machine to machine; a patch takes 32 MiB.
    limit = slurm(800 * num_ranks)
    launch = python if num_ranks == 1 else lambda *words, **how: mpirun(num_ranks, *words, **how)
    line = refused(launch(*RUN, path, env=limit), "patch.batch_size", tmp_path)
    assert "inside the network" in line and "Slurm grants" in line
    batch = int(line.partition("patch.batch_size ")[2].partition(",")[0].split()[0])
    assert 1 <= batch < 32
    assert "after `bench`, `plan` lists" in line
    if num_ranks > 1:
        return
    # What is named fits; and what was measured then tells `plan` as much.
    fitting = launch(*RUN, path, "--set", f"patch.batch_size={batch}", env=limit)
    assert fitting.returncode == 0, fitting.stderr
    assert "predicted" in fitting.stderr and "for the network alone" in fitting.stderr
    probe = json.loads((tmp_path / "runs/config/probe.json").read_text())["probe"]
    assert min(probe["start_nbytes"], probe["resident_nbytes"]) > 50 << 20
    assert probe["nbytes"] > 0.95 * (batch << 25) and probe["pace"] is None


def test_what_may_need_more_is_tried_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = config_file(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=48,160,160&seed=3"},
        model={"backend": "identity", "out_channels": 1},
        patch={"shape": [24, 40, 40], "overlap": [0, 0, 0]},
        block={"shape": [24, 160, 160]},
        output={"dtype": "float32", "chunk_shape": [24, 80, 80]},
    )
    parts = estimate(prepare(load_config(path).config).premise()).memory
    least, most = least_nbytes(parts, "cpu"), total_nbytes(parts, "cpu")
    megabytes = least // (1 << 20) + 1
    assert least <= megabytes << 20 < most
    for name, value in slurm(megabytes).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING"):
        assert run_on(SerialCommunicator(), path) == 0
    log = (tmp_path / "runs/config/logs/rank-00000.log").read_text()
    told = [text for text in (*caplog.messages, *log.splitlines()) if "a rank needs about" in text]
    assert told and "may be killed for lack of memory" in told[0] and "Slurm grants" in told[0]


def test_a_start_that_finds_the_run_locked_leaves_its_probe(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    assert run_on(SerialCommunicator(), path) == 0
    kept = tmp_path / "runs/config/probe.json"
    before = kept.read_bytes()
    (tmp_path / "runs/config" / journal.NAME).unlink()
    lock = RunLock.acquire(tmp_path / "runs/config")
    try:
        assert run_on(SerialCommunicator(), path) == 2
    finally:
        lock.release()
    assert kept.read_bytes() == before


def test_a_host_without_memory_is_refused(tmp_path: Path, python: Launch) -> None:
    path = config_file(tmp_path, model={"backend": "identity"})
    line = refused(python(*RUN, path, env=slurm(20)), "patch.shape", tmp_path)
    assert "fewer ranks per node" in line


def told(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(path), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_prediction_and_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    # So that a forward takes as long, however busy this machine is.
    slow = "def forward(self, x):\n        __import__('time').sleep(0.01)"
    (tmp_path / "net.py").write_text(NET.replace("def forward(self, x):", slow))
    assert told(path, capsys)["prediction"] is None
    assert bench_on(SerialCommunicator(), path, [], SHORT) == 0
    found = told(path, capsys)
    pace = found["probe"]["pace"]
    assert pace["num_ranks"] == 1 and pace["scale"] > 0 and min(pace.values()) > 0
    expected = found["prediction"]
    assert expected["basis"] == "bench" and expected["num_blocks"] == found["blocks"]["num"] == 8
    alone = expected["seconds"]
    assert told(path, capsys, "--ranks", "8")["prediction"]["seconds"] < alone
    # Written or read otherwise, the pace is another one; the forward stays what it is.
    other = told(path, capsys, "--set", "output.dtype=float32")
    assert other["probe"]["pace"] is None and other["prediction"]["basis"] == "forward"
    assert told(path, capsys, "--set", "block.shape=[12,16,16]")["prediction"]["basis"] == "bench"
    assert run_on(SerialCommunicator(), path) == 0
    log = (tmp_path / "runs/config/logs/rank-00000.log").read_text()
    (line,) = [line for line in log.splitlines() if "predicted" in line]
    assert f"predicted {duration(alone)} (8 blocks, 1 rank), took" in line and "alone" not in line
    ratio = re.search(r"took .*: ([0-9.]+) times as long", line)
    assert ratio and 0.2 < float(ratio[1]) < 5
    kept = json.loads((tmp_path / "runs/config/plan.json").read_text())
    assert kept["prediction"] == expected
    # What `bench` has found is more than a run's own forward, and stays.
    after = told(path, capsys)
    assert after["probe"]["pace"] == pace
    peak = after["memory"]["measured_nbytes"]
    assert peak > 50 << 20
    assert after["memory"]["measured_device_nbytes"] is None and "on device" not in log
    assert main(["plan", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"measured, last run, largest rank {size(peak)}" in text
    assert "wall time" in text and "predicted for 1 rank" in text
    # Of another block nothing was measured.
    other = told(path, capsys, "--set", "block.shape=[12,16,16]")
    assert other["memory"]["measured_nbytes"] is None


def test_the_peak_of_an_accelerator_is_told_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, model={"backend": "identity"})
    monkeypatch.setattr(NumpyArrays, "most_nbytes", lambda self: 5 << 30)
    assert run_on(SerialCommunicator(), path) == 0
    log = (tmp_path / "runs/config/logs/rank-00000.log").read_text()
    (line,) = [line for line in log.splitlines() if "peak on device, MiB" in line]
    assert line.split()[-1] == "5120.0"
    assert told(path, capsys)["memory"]["measured_device_nbytes"] == 5 << 30


def test_a_run_that_nobody_measured_says_how_to(tmp_path: Path) -> None:
    path = config_file(tmp_path, model={"backend": "identity"})
    assert run_on(SerialCommunicator(), path) == 0
    log = (tmp_path / "runs/config/logs/rank-00000.log").read_text()
    assert "no prediction: run `python -m mpichunk bench`" in log


def test_only_this_start_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    assert run_on(SerialCommunicator(), path) == 0
    run_dir = tmp_path / "runs/config"
    text = (run_dir / journal.NAME).read_text().splitlines(keepends=True)
    # Three blocks are undone again.
    done = [n for n, line in enumerate(text) if '"state":"done"' in line]
    (run_dir / journal.NAME).write_text(
        "".join(line for n, line in enumerate(text) if n not in done[-3:])
    )
    assert run_on(SerialCommunicator(), path) == 0
    assert json.loads((run_dir / "plan.json").read_text())["prediction"]["num_blocks"] == 3
    assert "(3 blocks, 1 rank)" in (run_dir / "logs/rank-00000.log").read_text()


def test_less_does_not_replace_more(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    assert bench_on(SerialCommunicator(), path, [], SHORT) == 0
    job = prepare(load_config(path).config)
    before = job.probe()
    assert before is not None and before.pace is not None
    keep_probe(job, Probe(seconds=9.0, nbytes=1, device=before.device))
    assert job.probe() == before
    # Both the bench and a run tell what a rank holds; files that say nothing of it are still read.
    assert before.resident_nbytes is not None and before.start_nbytes is not None
    assert min(before.start_nbytes, before.resident_nbytes) > 50 << 20
    kept = json.loads((job.run_dir / "probe.json").read_text())
    del kept["probe"]["resident_nbytes"], kept["probe"]["start_nbytes"]
    (job.run_dir / "probe.json").write_text(json.dumps(kept))
    assert job.probe() == replace(before, resident_nbytes=None, start_nbytes=None)
    # What ranks held besides is of these blocks only.
    kept["of_peak"] = "of others"
    (job.run_dir / "probe.json").write_text(json.dumps(kept))
    assert job.probe() == replace(before, resident_nbytes=None, start_nbytes=None, more_nbytes=0)
    elsewhere = Probe(seconds=9.0, nbytes=1, device="cuda:0 H200", free_nbytes=1 << 30)
    # What another process is about to write is in nobody's way.
    (job.run_dir / "probe.json.tmp").mkdir()
    keep_probe(job, elsewhere)
    assert job.probe() == elsewhere
