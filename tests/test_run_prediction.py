"""Whole runs with augmentation and reductions, from config to stored voxels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.cli import main
from mpichunk.config.file import dump_config, load_config
from mpichunk.config.reduction import Reduction
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box
from mpichunk.geometry.padding import pad, source_box
from mpichunk.geometry.symmetry import NAMES, turns_of
from mpichunk.job.assembly import (
    bind_ranks,
    engine_request,
    load_engine,
    make_augmentation,
    make_inference,
)
from mpichunk.job.startup import fingerprint_of, prepare
from mpichunk.plan.estimate import estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.verbs.run import run_on
from tests.endtoend import read_volume, write_config
from tests.geometries import cases, make_config, make_info, make_plan
from tests.metrics import auc
from tests.reference import activate, cut, reference, reference_config_defaults
from tests.test_augmentation import edge_mean
from tests.test_block_reference import inference_of
from tests.test_reduction import reduce_voxel
from tests.test_run_reference import Case, net_of, texture

NET = {"backend": "pytorch", "path": "net.py:Net", "arguments": {"outputs": 4}, "out_channels": 4}
OFFSETS = {2: (-1, 0, 0), 0: (0, -1, 0), 1: (0, 0, -1)}


@pytest.mark.parametrize("same", [True, False])
def test_augmented_run_is_the_mean_over_all_edges(tmp_path: Path, same: bool) -> None:
    case = Case(tmp_path, texture((6, 11, 10)))
    names = ["flip_z", "rot90"]
    model = NET | {
        "arguments": {"outputs": 4, "same": same},
        "activation": "sigmoid",
        "augment": names,
        "affinity_channels": {c: list(offset) for c, offset in OFFSETS.items()},
    }
    patch = {"shape": [7, 9, 9], "overlap": [1, 2, 2], "crop": [2, 2, 2], "batch_size": 2}
    config = case.run(model=model, patch=patch, block={"shape": [8, 8, 8]})
    net, g = net_of(config), reference_config_defaults(config)
    expected = reference(
        case.volume_czyx,
        case.domain,
        lambda p: edge_mean(lambda q: activate(cut(net(q), g), "sigmoid"), p, names, OFFSETS),
        config.model_copy(update={"model": config.model.model_copy(update={"activation": "none"})}),
    )
    np.testing.assert_allclose(case.output(config), expected.values_czyx, atol=2e-6)
    assert case.num_patches(config) == expected.num_patches


@pytest.mark.parametrize("backend", ["identity", "pytorch"])
def test_memory_does_not_grow_with_the_group(tmp_path: Path, backend: str) -> None:
    case = Case(tmp_path, texture((8, 16, 16)))
    config = case.run(
        model={
            "backend": backend,
            "path": "net.py:Net",
            "out_channels": 2,
            "activation": "sigmoid",
        },
        patch={"batch_size": 2},
    )
    job = prepare(config)
    block = job.plan[0]
    source_czyx = texture((1, *block.input_box.shape))
    kept = {}
    for names in (["flip_z"], [*NAMES]):
        model = config.model.model_copy(update={"augment": tuple(names)})
        augmented = replace(job, config=config.model_copy(update={"model": model}))
        request = engine_request(job, bind_ranks(SerialCommunicator(), job).of(0))
        engine = load_engine(augmented, request)
        inference = make_inference(augmented, engine, request)
        inference.run(block, source_czyx, None, np.dtype(np.uint8))
        assert inference.num_batches % len(turns_of(names)) == 0
        kept[len(names)] = {name: b.nbytes for name, b in engine.arrays._buffers.items()}
    assert kept[1] == kept[4] and kept[1]["sums"] > 0


@settings(max_examples=30)
@given(cases(largest=12), st.lists(st.sampled_from(NAMES), unique=True), st.integers(0, 99))
def test_equivariant_network_is_unchanged_for_any_geometry(
    case: tuple[Config, Box], names: list[str], seed: int
) -> None:
    config, domain = case
    square = config.patch.shape[1] == config.patch.shape[2]
    if not square or config.patch.crop[1] != config.patch.crop[2]:
        names = [name for name in names if name != "rot90"]
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"augment": tuple(names)})}
    )
    plan = Plan.from_config(config, domain)
    assume(len(plan) < 30 and sum(block.num_patches for block in plan) < 300)
    volume_czyx = texture((1, *domain.shape), seed=seed)
    straight = inference_of(config, plan)
    turned = inference_of(config, plan)
    turned._augmentation = make_augmentation(config)
    for block in plan:
        inside = source_box(block.input_box, domain)
        raw = volume_czyx[(slice(None), *inside.slices(domain.start))]
        source_czyx = pad(raw, inside, block.input_box, domain, "reflect")
        a, b = (
            i.run(block, source_czyx, None, np.dtype(np.float32)).core() for i in (straight, turned)
        )
        np.testing.assert_allclose(b, a, rtol=1e-6)


@pytest.mark.parametrize("backend", ["identity", "pytorch"])
@pytest.mark.parametrize(
    ("output", "dtype"),
    [
        ({"gate": {"channel": 3, "below": 0.5}, "dtype": "uint8"}, "uint8"),
        ({"gate": {"channel": 3, "below": 0.5}, "reduce": "vote"}, "uint8"),
        ({"channels": [2, 0], "dtype": "float32"}, "float32"),
        ({"channels": [3, 1, 0], "reduce": "argmax", "dtype": "uint16"}, "uint16"),
        ({"threshold": 0.45}, "uint8"),
        ({"threshold": 0.45, "channels": [1], "dtype": "float16"}, "float16"),
        ({"gate": {"channel": 0, "below": 0.5}}, "float32"),
    ],
)
def test_reduced_run(tmp_path: Path, backend: str, output: dict[str, Any], dtype: str) -> None:
    volume = texture((4, 12, 20, 20))
    volume[:, :, :, :10] = 0  # blank patches, a wholly blank block, and some voxels of each
    case = Case(tmp_path, volume)
    model = NET | {"arguments": {"channels": 4, "outputs": 4}, "activation": "sigmoid"}
    if backend == "identity":
        model = {"backend": "identity", "out_channels": 4}
    # The values before they are reduced, in float32 as the run has them.
    (tmp_path / "plain").mkdir()
    plain_case = Case(tmp_path / "plain", volume)
    values = plain_case.output(plain_case.run(model=model))
    if "gate" in output:
        channel = output["gate"]["channel"]
        below = float(np.median(values[channel][values[channel] > 0]))
        output = output | {"gate": {"channel": channel, "below": below}}
    config = case.run(model=model, output=output)
    found = case.output(config)
    reduction = Reduction.of(config)
    flat = values.reshape(4, -1).T.tolist()
    expected = np.array([reduce_voxel(voxel, reduction) for voxel in flat], np.float32).T
    if reduction.kind == "values" and dtype == "uint8":
        expected = np.rint(np.clip(expected, 0, 1) * np.float32(255))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected.reshape(-1, *found.shape[1:]).astype(dtype))
    assert len(np.unique(found)) > 1
    assert main(["verify", str(tmp_path / "config.yaml")]) == 0
    line = (Path(config.run_dir) / journal.NAME).read_text().splitlines()[0]
    parts = json.loads(line)["fingerprint"]["parts"]
    assert {"output.reduce", "output.channels", "output.threshold", "model.augment"} <= set(parts)


@pytest.mark.slow
def test_real_affinities_gain_only_where_they_are_named(tmp_path: Path, real_data: Path) -> None:
    """The area under the ROC curve of a trained network, by itself and averaged over flips."""
    with h5py.File(real_data / "em/fib25_train2_250.h5") as file:
        labels = file["labels"][...]
    roi = {"start": [200, 40, 40], "stop": [248, 104, 104]}
    part = tuple(slice(a, b) for a, b in zip(roi["start"], roi["stop"], strict=True))
    augment = {"augment": ["flip_z", "flip_x"]}
    models = {
        "alone": {},
        "named": augment | {"affinity_channels": [0, 1, 2]},
        "as they lie": augment | {"affinity_channels": {}},
    }
    scores = {}
    for name, model in models.items():
        path = write_config(
            tmp_path / name,
            input={"volume": str(real_data / "em/fib25_train2_250.h5"), "dataset": "image"},
            roi=roi,
            model={
                "backend": "pytorch",
                "path": str(real_data / "nets/em_affinity_resunet_same.ts.pt"),
                "out_channels": 3,
                **model,
            },
            patch={"shape": [48, 64, 64], "overlap": [0, 0, 0]},
            block={"shape": [64, 64, 64]},
            output={"volume": "out.zarr", "domain": "roi"},
            compute={"threads": 1, "device": "cpu"},
        )
        assert run_on(SerialCommunicator(), path) == 0
        values = np.round(read_volume(tmp_path / name / "out.zarr"), 4)
        scores[name] = [
            auc(values[axis], (labels == np.roll(labels, 1, axis))[part]) for axis in (0, 2)
        ]
    for alone, named, as_they_lie in zip(*scores.values(), strict=True):
        assert named > alone + 0.001
        assert as_they_lie < alone


def test_changed_augmentation_or_reduction_is_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, texture((8, 16, 16)))
    case.run(model={"out_channels": 2}, output={"reduce": "argmax"})
    path = tmp_path / "config.yaml"
    parts = {}
    for names in ("[]", "[flip_z, flip_x]", "[flip_x, flip_z]"):
        job = prepare(load_config(path, [f"model.augment={names}"]).config)
        parts[names] = fingerprint_of(job, device_kinds=["cpu"], threads=1)
    assert parts["[]"]["model.augment"] == []
    assert parts["[flip_z, flip_x]"] == parts["[flip_x, flip_z]"] != parts["[]"]
    for change in ("model.augment=[flip_z]", "output.reduce=vote", "output.channels=[1, 0]"):
        assert run_on(SerialCommunicator(), path, [change]) == 2
        assert change.partition("=")[0] in capsys.readouterr().err


def test_plan_tells_augmentation_and_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=32,64,64&seed=1"},
        model={"backend": "identity", "out_channels": 4, "augment": ["flip_x", "rot90"]},
        patch={"shape": [16, 32, 32]},
        block={"shape": [24, 48, 48]},
        output={"volume": "out.zarr", "gate": {"channel": 3, "below": 0.2}, "reduce": "vote"},
    )
    assert main(["plan", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "augmentation 8 forwards of each patch" in text
    assert "output 32 64 64 uint8, 1 channel" in text
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["patches"]["turns"] == 8
    assert found["output"]["num_channels"] == 1 and found["output"]["dtype"] == "uint8"
    assert found["write"]["nbytes"] == 32 * 64 * 64
    assert main(["plan", str(path), "--json", "--set", "model.augment=[]"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert found["patches"]["passes_per_voxel"] == 8 * plain["patches"]["passes_per_voxel"]


def test_memory_that_is_planned() -> None:
    """One more copy of the prediction however many turns; labels are one channel of a byte."""

    def parts(**more: Any) -> dict[str, int | None]:
        config = make_config((8, 16, 16), (16, 32, 32), model_out_channels=4, **more)
        plan = make_plan(config, (64, 64, 64))
        found = estimate(Premise(plan=plan, config=config, info=make_info(plan.volume))).memory
        return {part.name: part.cpu_nbytes for part in found}

    batch, written = "batch into and out of the network", "output of the blocks in flight"
    plain = parts()
    patch_nbytes = 4 * 8 * 16 * 16
    assert plain[batch] == 5 * patch_nbytes
    assert parts(model_augment=["flip_z"])[batch] == 9 * patch_nbytes
    assert parts(model_augment=list(NAMES)) == parts(model_augment=["flip_z"])
    core = 16 * 32 * 32
    assert plain[written] == 3 * 4 * 4 * core
    assert parts(output_reduce="vote")[written] == 3 * core


def test_effective_config_reads_back(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        input={"volume": "a.h5"},
        model={
            "backend": "identity",
            "out_channels": 4,
            "augment": ["flip_y"],
            "affinity_channels": {0: [-1, 0, 0], 3: [0, -9, 0]},
        },
        patch={"shape": [8, 8, 8]},
        block={"shape": [8, 8, 8]},
        output={"volume": "b.zarr", "gate": {"channel": 3, "below": 0.2}, "threshold": 0.5},
        run_dir="r",
    )
    config = load_config(path).config
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again).config == config
    assert config.output.dtype == "uint8" and config.used_channels == (0, 1, 2)
