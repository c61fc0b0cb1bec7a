"""Tuning: narrower instructions, which only a process of their own can try."""

import json
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpichunk.backends.devices.probing import cpu_kind
from mpichunk.backends.openvino.instructions import OPTION
from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.tune import measure as measure_module
from mpichunk.tune.measure import Meter
from mpichunk.tune.variants import Variant, variant_of
from tests import onnx_maker
from tests.launch import Launch
from tests.realnets import EM_MODEL
from tests.smalltune import begin, em_config, favour

pytest.importorskip("openvino", reason="no openvino: pip install 'mpichunk[openvino]'")

NARROW = Variant(backend="openvino", batch_size=1, instructions="AVX2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure briefly, and leave no process behind."""
    monkeypatch.setattr(measure_module, "TURN_SECONDS", 0.01)
    yield
    # What openvino starts where tests have imported it ends by itself; what waits to be asked not.
    for child in multiprocessing.active_children():
        child.join(10)
    assert multiprocessing.active_children() == []


def meter_of(folder: Path, model: dict[str, Any]) -> Meter:
    """Return what measures one network on two patches of chance, its baseline measured."""
    path = em_config(folder, model=model, patch={"shape": [8, 16, 16]})
    patches = np.random.default_rng(0).random((2, 1, 8, 16, 16), dtype=np.float32)
    return begin(path, patches, num_repeats=2)[0]


def test_it_is_measured_in_turns_though_openvino_was_used_here(tmp_path: Path) -> None:
    meter = meter_of(tmp_path, EM_MODEL)
    assert not meter.measure(replace(NARROW, instructions=None)).refused
    # Refused, were its kernels any wider.
    found = meter.measure(NARROW)
    assert found.refused == ""
    assert found.speedup is not None and found.speedup.median > 0
    assert found.seconds is not None and found.seconds.least > 0
    assert found.difference is not None and 0 < found.difference.largest < 1e-4
    assert found.nbytes is not None and found.nbytes > 0


DOOMED = """
import multiprocessing, os, torch

class Net(torch.nn.Module):
    def forward(self, x):
        if multiprocessing.parent_process() is not None:
            {what}
        return torch.cat([x, x, x], 1)
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("os.kill(os.getpid(), 9)", f"its own process was ended by signal {signal.SIGKILL:d}, "),
        ("os._exit(7)", "its own process ended by itself, with exit code 7"),
        ("raise RuntimeError('no room')", "no room"),
    ],
)
def test_what_goes_wrong_there_is_a_line_of_the_table(
    tmp_path: Path, what: str, expected: str
) -> None:
    (tmp_path / "net.py").write_text(DOOMED.format(what=what))
    meter = meter_of(tmp_path, {"backend": "pytorch", "path": "net.py:Net", "out_channels": 3})
    found = meter.measure(NARROW)
    assert expected in found.refused and found.is_tried
    # And the next one is measured.
    assert not meter.measure(replace(NARROW, instructions=None)).refused


def test_the_config_that_is_written_says_so_and_runs(
    tmp_path: Path,
    python: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    onnx_maker.convolution(tmp_path / "net.onnx")
    path = tmp_path / "my.yaml"
    path.write_text(
        "input: {volume: 'synthetic://membranes?shape=16,32,32&seed=7'}\n"
        "model:\n"
        "  backend: openvino\n"
        "  path: net.onnx\n"
        "  out_channels: 2\n"
        "  options: {NUM_STREAMS: 1}   # mine\n"
        "patch: {shape: [4, 8, 12]}\n"
        "block: {shape: [16, 32, 32]}\n"
        "output: {volume: out.zarr}\n"
        "compute: {threads: 1}\n"
    )
    favour(monkeypatch, lambda row: row.variant == NARROW)
    assert main(["tune", str(path), "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {item["name"]: item for item in found["rows"]}
    if cpu_kind() != "cpu AVX512":
        assert not any("at most" in name for name in rows)
        return
    assert found["best"] == "openvino float32 + AVX2 at most, batch 1"
    assert rows["openvino float32 + AVX2 at most, batch 2"]["refused"] is None
    assert rows[found["best"]]["settings"][f"model.options.{OPTION}"] == "AVX2"
    options = {"NUM_STREAMS": 1, OPTION: "AVX2"}
    assert found["changes"] == {"model.options": options}
    assert found["largest_batch"]["num_patches"] >= 2
    target = tmp_path / "my-tuned.yaml"
    written = load_config(target).config
    assert written.model.options == options and variant_of(written) == NARROW
    text = target.read_text()
    assert f"options: {{NUM_STREAMS: 1, {OPTION}: AVX2}}   # mine\n" in text
    assert f"Changed: model.options: {{NUM_STREAMS: 1, {OPTION}: AVX2}}." in " ".join(
        text.replace("\n# ", " ").split()
    )
    done = python("-m", "mpichunk", "run", str(target))
    assert done.returncode == 0, done.stderr
    assert "float32, AVX2 at most" in done.stderr
