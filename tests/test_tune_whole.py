"""Tuning of real networks: what is measured, told and written."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpichunk.bench.figures import Spread
from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.job.startup import prepare
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.tune import measure as measure_module
from mpichunk.tune import trial as trial_module
from mpichunk.tune.figures import Row
from mpichunk.tune.variants import Facts, Variant, variant_of
from mpichunk.verbs import tune as tune_module
from mpichunk.verbs.run import run_on
from tests import onnx_maker
from tests.smalltune import begin, em_config, favour


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure briefly; compile nothing, and start no processes, which takes half a minute."""
    monkeypatch.setattr(measure_module, "TURN_SECONDS", 0.01)
    whole = tune_module.facts_of

    def facts_of(device: str) -> Facts:
        return replace(whole(device, lambda name: None), has_avx512=False)

    monkeypatch.setattr(tune_module, "facts_of", facts_of)


TUNED = {
    "model.backend",
    "model.options",
    "patch.batch_size",
    "compute.precision",
    "compute.channels_last",
    "compute.fold_batch_norm",
    "compute.compile",
    "compute.cuda_graphs",
}
"""What a config that was tuned may say otherwise."""


def assert_only_tuned(original: Config, written: Config) -> None:
    """Assert that two configs are the same but for how the network runs."""

    def values(found: Config) -> dict[str, Any]:
        sections = found.model_dump(exclude={"run_dir"})
        return {
            f"{name}.{key}": value
            for name, section in sections.items()
            for key, value in (section if isinstance(section, dict) else {"": section}).items()
        }

    before, after = values(original), values(written)
    assert before.keys() == after.keys() > TUNED
    assert {key for key in before if before[key] != after[key]} <= TUNED


def test_tune_tells_all_and_writes_a_config_that_runs(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = em_config(tmp_path)
    before = path.read_text()
    assert main(["tune", str(path), "--repeats", "2", "--json", "--tolerance", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {item["name"]: item for item in found["rows"]}
    assert found["patches"] == {"count": 4, "of_the_volume": True}
    exact = rows["pytorch float32, batch 1"]
    assert exact["difference"] == {"largest": 0.0, "mean": 0.0}
    assert exact["nbytes"] > 0
    half = rows["pytorch bfloat16, batch 1"]
    assert 1e-4 < half["difference"]["largest"] < 0.1
    (folded,) = (item for name, item in rows.items() if "fold_batch_norm" in name)
    assert folded["refused"] is None, "it has batch norms behind convolutions only"
    most = 1e-4 if folded["settings"]["compute.precision"] == "float32" else 0.1
    assert 0 < folded["difference"]["largest"] < most
    assert rows["openvino float32, batch 1"]["difference"]["largest"] < 1e-4
    assert found["best"] in rows
    largest_batch = found["largest_batch"]
    assert largest_batch["num_patches"] >= 1
    # Whatever is the fastest here, it is what the written config says, and that one runs.
    written = load_config(tmp_path / "config-tuned.yaml").config
    best = rows[found["best"]]["settings"]
    assert {key: variant_of(written).settings[key] for key in best} == best
    assert path.read_text() == before
    assert_only_tuned(load_config(path).config, written)
    assert not (tmp_path / "out.zarr").exists() and not (tmp_path / "runs").exists()
    assert run_on(SerialCommunicator(), tmp_path / "config-tuned.yaml") == 0


STEEP = """
import torch

class Net(torch.nn.Module):
    '''From -20 to 20 over inputs from 0 to 1.'''

    def forward(self, x):
        return 40 * x - 20
"""


class Off:
    """An engine whose values are off by a little."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.arrays, self.info = engine.arrays, engine.info

    def infer(self, batch_nczyx: Any) -> Any:
        return self._engine.infer(batch_nczyx) + 0.02


@pytest.mark.parametrize(("activation", "expected"), [("none", 0.02 / 40), ("sigmoid", 0.02 / 4)])
def test_what_is_compared_is_activated(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
    expected: float,
) -> None:
    (tmp_path / "net.py").write_text(STEEP)
    model = {"path": "net.py:Net", "backend": "pytorch", "activation": activation}
    patches_nczyx = np.linspace(0, 1, 2 * 8**3, dtype=np.float32).reshape(2, 1, 8, 8, 8)
    meter, row = begin(em_config(tmp_path, model=model), patches_nczyx)
    load = trial_module.load_engine
    monkeypatch.setattr(trial_module, "load_engine", lambda *how: Off(load(*how)))
    found = meter.measure(replace(row.variant, batch_size=2))
    assert found.difference is not None
    assert found.difference.largest == pytest.approx(expected, rel=0.01)
    assert found.is_exact_enough(1e-3) == (activation == "none")


def test_a_batch_is_run_before_it_is_said_to_fit(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, row = begin(em_config(tmp_path), limit_seconds=60)
    assert row.nbytes is not None
    larger = replace(row.variant, batch_size=3)
    assert meter.is_fitting(larger, 0.01) is None, "it would be the end of this process"
    monkeypatch.setattr(measure_module.Meter, "is_on_host", False)
    assert meter.is_fitting(larger, 0.01) is True
    assert meter.is_fitting(larger, 1e6) is None, "there is no time"
    meter.available = row.nbytes
    assert meter.is_fitting(larger, 0.01) is False
    meter.available = None
    assert meter.is_fitting(larger, 0.01) is None


def test_what_is_far_slower_is_not_measured_at_length(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, row = begin(em_config(tmp_path), limit_seconds=60)
    other = replace(row.variant, batch_size=2)
    monkeypatch.setattr(measure_module, "HOPELESS", 1e-6)
    assert not meter.measure(other).refused
    monkeypatch.setattr(measure_module, "HOPELESS", 1e6)
    found = meter.measure(other)
    assert "times as long" in found.refused and found.is_tried


def test_the_table_is_for_people(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = em_config(tmp_path)
    assert main(["tune", str(path), "--repeats", "1", "--limit-seconds", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "* pytorch float32, batch 1" in text
    assert "not tried: the time of --limit-seconds is over" in text
    assert "patches per second of the network alone" in text
    assert "The config already uses the best variant of those tried (1 of " in text
    assert not (tmp_path / "config-tuned.yaml").exists()


def test_written_beside_keeps_the_words_and_elsewhere_the_paths(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    onnx_maker.convolution(tmp_path / "net.onnx")
    path = tmp_path / "my.yaml"
    path.write_text(
        "# my own words\n"
        "input: {volume: 'synthetic://membranes?shape=16,32,32&seed=7'}\n"
        "model: {backend: onnxruntime, path: net.onnx, out_channels: 2}   # and here\n"
        "patch:\n  shape: [4, 8, 12]\n"
        "block: {shape: [16, 32, 32]}\n"
        "output: {volume: out.zarr}\n"
    )

    def is_large(row: Row) -> bool:
        assert not row.refused or row.variant.precision != "float32", row.refused
        return row.variant.batch_size == 2

    favour(monkeypatch, is_large)
    how = ["--repeats", "1", "--set", "compute.threads=1"]
    (tmp_path / "other").mkdir()
    for target in (tmp_path / "my-tuned.yaml", tmp_path / "other/new.yaml"):
        more = [] if target.name == "my-tuned.yaml" else ["--write", str(target)]
        assert main(["tune", str(path), *how, *more]) == 0
        written = load_config(target).config
        assert written.patch.batch_size == 2
        assert written.compute.threads == 1
        assert written.model.path == str(tmp_path / "net.onnx")
        assert_only_tuned(load_config(path, ["compute.threads=1"]).config, written)
        assert "# my.yaml, tuned by `mpichunk tune` for cpu" in target.read_text()
        # Only a run that has begun stands in the way of the new settings, and that is told.
        journal = tmp_path / "runs/my/journal.jsonl"
        printed = " ".join(capsys.readouterr().out.split())
        cure = "another output.volume"
        comment = " ".join(target.read_text().replace("\n# ", " ").split())
        assert cure in comment
        assert (cure in printed) == journal.exists()
        assert (f"The run in {journal.parent} has begun" in comment) == journal.exists()
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.touch()
        assert Path(written.run_dir) == target.parent / "runs" / target.stem
    # Where the config names the run directory, that must be another one, too.
    named = tmp_path / "named.yaml"
    how += ["--set", f"run_dir={tmp_path}/runs/my"]
    assert main(["tune", str(path), *how, "--write", str(named)]) == 0
    assert "another run_dir AND another output.volume" in " ".join(capsys.readouterr().out.split())
    assert load_config(named).config.run_dir == str(tmp_path / "runs/my")
    text = (tmp_path / "my-tuned.yaml").read_text()
    assert "# my own words\n" in text and "# and here\n" in text and "path: net.onnx" in text


def test_nothing_is_overwritten_and_that_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = em_config(tmp_path, model={"backend": "identity"})
    target = tmp_path / "config-tuned.yaml"
    target.write_text("mine")
    assert main(["tune", str(path)]) == 2
    assert "exists, and is not overwritten" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["tune", str(path), "--write", str(tmp_path / "nowhere/x.yaml")]) == 2
    assert "not a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_measured", [0, 2])
def test_what_was_measured_before_an_interrupt_is_told_and_nothing_is_written(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    num_measured: int,
) -> None:
    path = small_config(tmp_path)
    names: list[str] = []
    real = measure_module.Meter.measure

    def interrupted(self: Any, variant: Variant) -> Row:
        if len(names) == num_measured:
            os.kill(os.getpid(), number)
        found = real(self, variant)
        names.append(variant.name)
        # So that there is something to write.
        return replace(found, speedup=Spread.of([float(len(names))])) if found.speedup else found

    monkeypatch.setattr(measure_module.Meter, "measure", interrupted)
    before = signal.getsignal(number)
    assert main(["tune", str(path), "--repeats", "1"]) == 1
    printed = capsys.readouterr()
    assert "mpichunk: interrupted; no config was written" in printed.err
    assert len(names) == num_measured
    assert all(name in printed.out for name in names)
    assert ("INTERRUPTED: more was to be tried" in printed.out) == bool(num_measured)
    assert not (tmp_path / "config-tuned.yaml").exists()
    assert signal.getsignal(number) is before


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let Ctrl-C be pressed when `tune` calls one of its parts."""
    real = getattr(tune_module, name)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(tune_module, name, interrupted)


def small_config(folder: Path) -> Path:
    onnx_maker.convolution(folder / "net.onnx")
    model = {"backend": "onnxruntime", "path": "net.onnx", "out_channels": 2}
    return em_config(folder, model=model)


def test_an_interrupt_when_all_was_tried_says_so(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, "_largest_batch")
    assert main(["tune", str(small_config(tmp_path)), "--repeats", "1"]) == 1
    printed = capsys.readouterr()
    assert "INTERRUPTED: all was tried, but no config was written.\nThe best: " in printed.out
    assert "mpichunk: interrupted; no config was written" in printed.err
    assert not (tmp_path / "config-tuned.yaml").exists()


@pytest.mark.parametrize("name", ["_says", "render_tuning"])
def test_an_interrupt_once_a_config_is_being_written_leaves_all_of_it_and_says_so(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    path = small_config(tmp_path)
    favour(monkeypatch, lambda row: row.variant.batch_size == 2)
    interrupt(monkeypatch, name)
    assert main(["tune", str(path), "--repeats", "1"]) == 1
    target = tmp_path / "config-tuned.yaml"
    assert f"mpichunk: interrupted; {target} was written\n" in capsys.readouterr().err
    assert load_config(target).config.patch.batch_size == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_ranks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main(["tune", str(em_config(tmp_path))]) == 2
    assert "`tune` measures one" in capsys.readouterr().err


def test_a_network_that_gives_nan_is_refused(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nan.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x / 0 * 0\n"
    )
    path = em_config(tmp_path, model={"backend": "pytorch", "path": "nan.py:Net"})
    assert main(["tune", str(path)]) == 2
    assert "the network returned NaN or inf for patches of the volume" in capsys.readouterr().err
    assert not (tmp_path / "config-tuned.yaml").exists()


def test_a_network_that_does_not_run_is_one_message(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = em_config(tmp_path)
    assert main(["tune", str(path), "--set", "model.out_channels=2"]) == 2
    assert "returned 3 channels, but model.out_channels is 2" in capsys.readouterr().err


def test_blank_volumes_are_replaced_by_chance(tmp_path: Path, quick: None) -> None:
    with h5py.File(tmp_path / "blank.h5", "w") as file:
        file["raw"] = np.zeros((16, 32, 32), np.uint8)
    path = em_config(tmp_path, input={"volume": "blank.h5", "dataset": "raw"})
    patches, is_real = measure_module.read_patches(prepare(load_config(path).config))
    assert not is_real
    assert patches.shape == (4, 1, 8, 8, 8) and patches.max() <= 1
