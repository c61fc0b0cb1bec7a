"""Networks named by a MONAI bundle: the same run as the config in full, or a refusal."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mpichunk.config.file import load_config
from tests.described import (
    assert_same_runs,
    config_file,
    fingerprint,
    plain_values,
    problems_of,
    run,
)
from tests.endtoend import read_volume
from tests.packages import (
    METADATA,
    POINTS,
    SIGMOID,
    UNET,
    points_bundle,
    points_network,
    unet_bundle,
    write_bundle,
)

pytestmark = pytest.mark.usefixtures("one_thread")

UNET_ARGUMENTS = {
    **{key: value for key, value in UNET.items() if key != "_target_"},
    "out_channels": 2,
    "norm": "batch",
}


def test_bundle_runs_as_the_plain_config(tmp_path: Path, monai: None) -> None:
    bundle = unet_bundle(tmp_path / "net")
    sections: dict[str, Any] = {"patch": {"shape": [16, 32, 32]}}
    plain = {
        "input": {"normalize": {"subtract": 120, "divide": 100, "clip": [20, 220]}},
        **sections,
    }
    model = {"out_channels": 2, "activation": "softmax"}
    script = config_file(tmp_path, {"path": "net"}, name="script.yaml", **sections)
    assert_same_runs(
        script,
        config_file(
            tmp_path, model | {"path": "net/models/model.ts"}, name="plain_script.yaml", **plain
        ),
    )
    (bundle / "models/model.ts").unlink()
    code = config_file(tmp_path, {"path": "net"}, name="code.yaml", **sections)
    unet = model | {
        "path": "monai.networks.nets:BasicUNet",
        "weights": "net/models/model.pt",
        "arguments": UNET_ARGUMENTS,
    }
    assert_same_runs(code, config_file(tmp_path, unet, name="plain_code.yaml", **plain))
    values = [read_volume(path.with_suffix(".zarr")) for path in (script, code)]
    np.testing.assert_allclose(*values, atol=1e-5)
    assert values[0].std() > 0.01


def test_bundle_with_a_network_of_its_own(tmp_path: Path) -> None:
    """Needs no MONAI; the file is part of the run as every model file is."""
    bundle = write_bundle(
        tmp_path / "net",
        inference={
            "network_def": {"_target_": "scripts.net.Points", "channels": "@num_classes"},
            "preprocessing": None,
            "postprocessing": {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "Activationsd", "sigmoid": True},
                    {"_target_": "AsDiscreted", "threshold": 0.5},
                ],
            },
        },
    )
    (bundle / "scripts").mkdir()
    (bundle / "scripts/net.py").write_text(POINTS)
    torch.save({"w.weight": torch.ones(2, 1, 1, 1, 1)}, bundle / "models/model.pt")
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]})
    config = load_config(path).config
    assert config.model.path == f"{bundle}/scripts/net.py:Points"
    assert config.model.arguments == {"channels": 2}
    assert config.input.normalize is not None and config.input.normalize.divide == 1
    # 0.5 itself counts for MONAI.
    values = np.array([0.49999997, 0.5, 0.50000006], np.float32)
    assert ((values > np.float32(config.output.threshold)) == (values >= 0.5)).all()
    run(path)
    assert any(key.endswith("net.py") for key in fingerprint(path))


def transforms(*steps: Any) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(steps)}


SCALED = {"_target_": "NormalizeIntensityd", "subtrahend": 3, "divisor": 4}


BUNDLE = "the MONAI bundle {bundle}"
BUNDLE_REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "mean of the image": (
        {"preprocessing": transforms({"_target_": "NormalizeIntensityd", "nonzero": True})},
        METADATA,
        f"input.normalize: {BUNDLE} asks for NormalizeIntensityd (nonzero: True); mpichunk scales "
        "by fixed numbers only; measure them once, over the whole volume, and write",
    ),
    "unknown transform": (
        {"preprocessing": transforms({"_target_": "scripts.Mine", "keys": "image"})},
        METADATA,
        f"input.normalize: {BUNDLE} asks for Mine; mpichunk scales by fixed numbers only",
    ),
    "preprocessing in Python": (
        {"preprocessing": transforms("$make()")},
        METADATA,
        f"input.normalize: {BUNDLE} asks for the preprocessing `$make()`; mpichunk scales",
    ),
    "numbers in Python": (
        {
            "preprocessing": transforms(
                {"_target_": "ScaleIntensityRanged", "a_min": "$-5", "a_max": 5}
            )
        },
        METADATA,
        f"input.normalize: {BUNDLE} asks for ScaleIntensityRanged (a_min: $-5, a_max: 5); mpichunk",
    ),
    "components": (
        {
            "postprocessing": transforms(
                {"_target_": "Activationsd", "softmax": True},
                {"_target_": "KeepLargestConnectedComponentd"},
            )
        },
        METADATA,
        f"model.activation: {BUNDLE} asks for KeepLargestConnectedComponentd; mpichunk does not do "
        "that; write model.activation (none, sigmoid or softmax) to run without it",
    ),
    "truth as a threshold": (
        {"postprocessing": transforms({"_target_": "AsDiscreted", "threshold": True})},
        METADATA,
        f"model.activation: {BUNDLE} asks for AsDiscreted (threshold: True); mpichunk does not",
    ),
    "threshold of zero": (
        {"postprocessing": transforms({"_target_": "AsDiscreted", "threshold": 0})},
        METADATA,
        f"model.activation: {BUNDLE} asks for AsDiscreted (threshold: 0); mpichunk does not",
    ),
    "scaled bytes": (
        {"preprocessing": transforms(SCALED, {"_target_": "CastToTyped", "dtype": "$np.uint8"})},
        METADATA,
        f"input.normalize: {BUNDLE} asks for CastToTyped (dtype: $np.uint8); mpichunk scales",
    ),
    "one of several types": (
        {
            "preprocessing": transforms(
                SCALED, {"_target_": "EnsureTyped", "dtype": ["float32", "int16"]}
            )
        },
        METADATA,
        f"input.normalize: {BUNDLE} asks for EnsureTyped (dtype: ['float32', 'int16']); mpichunk",
    ),
    "type that only code could tell": (
        {"preprocessing": transforms(SCALED, {"_target_": "EnsureType", "dtype": "$mine()"})},
        METADATA,
        f"input.normalize: {BUNDLE} asks for EnsureType (dtype: $mine()); mpichunk scales",
    ),
    "result as bytes": (
        {
            "postprocessing": transforms(
                *SIGMOID, {"_target_": "CastToTyped", "dtype": "$torch.uint8"}
            )
        },
        METADATA,
        f"model.activation: {BUNDLE} asks for CastToTyped (dtype: $torch.uint8); mpichunk does not",
    ),
    "argument in Python": (
        points_network(channels="$1 + 1"),
        METADATA,
        f"model.arguments.channels: {BUNDLE} asks for the network's argument `channels` as $1 + 1; "
        "mpichunk does not execute code of a bundle's config; write its value here",
    ),
    "argument that is an object": (
        points_network(channels={"_target_": "Thing"}),
        METADATA,
        f"model.arguments.channels: {BUNDLE} asks for the network's argument `channels` as "
        "{{_target_: Thing}}; mpichunk does not execute code",
    ),
    "no channels": (
        {},
        None,
        f"model.out_channels: {BUNDLE} asks for a number of output channels that it does not "
        "state; write how many the network returns",
    ),
    "two dimensions": (
        points_network(spatial_dims=2),
        METADATA,
        f"model.path: {BUNDLE} is for two-dimensional images; mpichunk runs networks over",
    ),
    "two inputs": (
        {},
        {"network_data_format": {"inputs": {"a": {}, "b": {}}}},
        f"model.path: {BUNDLE} describes 2 inputs (a, b); mpichunk runs networks with one",
    ),
    "patch": (
        {},
        {
            "network_data_format": {
                "inputs": {"image": {"spatial_shape": ["32*n", "*", "n*24"]}},
                "outputs": {"pred": {"num_channels": 2}},
            }
        },
        f"patch.shape: [16, 32, 32] does not fit {BUNDLE}: z = 32 + n * 32, x = 24 + n * 24; the "
        "nearest is [32, 32, 24]",
    ),
}


@pytest.mark.parametrize("case", BUNDLE_REFUSED)
def test_what_a_bundle_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    inference, metadata, expected = BUNDLE_REFUSED[case]
    bundle = points_bundle(tmp_path / "net", inference=inference, metadata=metadata)
    (problem,) = problems_of(config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]}))
    assert problem.startswith(expected.format(bundle=bundle))


def test_bundle_and_its_user(tmp_path: Path) -> None:
    steps = transforms(
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0]},
        {"_target_": "CropForegroundd", "keys": "image"},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        {"_target_": "NormalizeIntensityd", "keys": "image", "_disabled_": True},
    )
    after = transforms(
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing"},
        {"_target_": "AsDiscreted", "argmax": True},
    )
    bundle = points_bundle(
        tmp_path / "net",
        inference=points_network(channels="$1 + 1", spatial_dims="@dims")
        | {"preprocessing": steps, "postprocessing": after, "dims": 3},
    )
    model = {"path": "net", "arguments": {"channels": 2}}
    path = config_file(tmp_path, model, input={"normalize": {"divide": 9}})
    values = yaml.safe_load(path.read_text())
    del values["patch"]
    path.write_text(yaml.safe_dump(values))
    loaded = load_config(path)
    origin = BUNDLE.format(bundle=bundle)
    assert [warning.partition(": ")[2] for warning in loaded.warnings()] == [
        f"model.arguments.channels: is used; {origin} asks for the network's argument `channels` "
        "as $1 + 1, which is left out",
        f"input.normalize: is used; {origin} asks for ScaleIntensityd, which is left out",
        f"model.path: {origin} asks for Orientationd (axcodes: RAS), Spacingd (pixdim: [1.5, 1.5, "
        "2.0]), which mpichunk does not do: store the volume so that its z, y and x axes are the "
        "network's, at that voxel size",
        f"model.path: {origin} has the roi_size [16, 32, 32] along its own axes, which are x, y, z "
        "where it reads NIfTI; it is taken as z, y, x: store the volume so that its z, y and x "
        "axes are the network's first, second and third",
    ]
    assert loaded.config.model.arguments == {"spatial_dims": 3, "channels": 2}
    assert loaded.config.model.activation == "softmax"
    assert loaded.config.output.reduce == "argmax" and loaded.config.output.dtype == "uint8"
    assert loaded.config.patch.shape == (16, 32, 32)
    assert "its inferer has roi_size: [16, 32, 32]; its inferer has overlap: 0.5" in loaded.notes[0]


@pytest.mark.parametrize("dtype", [None, "float32", "$torch.float16", "$np.float64"])
def test_types_that_change_nothing(tmp_path: Path, dtype: str | None) -> None:
    """A floating type anywhere, any type of what is not scaled yet, and any of labels."""
    whole = {"_target_": "CastToTyped", "dtype": "$np.uint8"}
    casts = [{"_target_": name, "dtype": dtype} for name in ("EnsureTyped", "CastToTyped")]
    points_bundle(
        tmp_path / "net",
        inference={
            "preprocessing": transforms(whole, SCALED, *casts),
            "postprocessing": transforms(
                *SIGMOID, *casts, {"_target_": "AsDiscreted", "threshold": 0.5}, whole
            ),
        },
    )
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]})
    found = plain_values(load_config(path))
    assert found["normalize"] == {"subtract": 3.0, "divide": 4.0, "clip": None}
    assert found["activation"] == "sigmoid" and found["threshold"] == pytest.approx(0.5)


@pytest.mark.parametrize(("roi", "is_told"), [([32, 32, 32], False), ([32, 32, 16], True)])
def test_axes_of_a_patch_that_are_not_alike_are_told(
    tmp_path: Path, roi: list[int], is_told: bool
) -> None:
    """Whatever the preprocessing is: reading NIfTI as x, y, z needs no transform of its own."""
    read = [{"_target_": "LoadImaged"}, {"_target_": "EnsureChannelFirstd"}]
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": roi}
    points_bundle(
        tmp_path / "net", inference={"preprocessing": transforms(*read), "inferer": inferer}
    )
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]})
    told = [line for line in load_config(path).warnings() if "axes are the network's" in line]
    assert len(told) == is_told
    assert all("taken as z, y, x" in line for line in told)


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime", "openvino"])
def test_bundle_without_a_network(tmp_path: Path, backend: str) -> None:
    bundle = write_bundle(tmp_path / "net")
    (problem,) = problems_of(
        config_file(tmp_path, {"path": "net", "backend": backend}, patch={"shape": [16, 32, 32]})
    )
    assert problem.startswith(f"model.path: {bundle} has no models/model.")
    assert f"which the {backend} backend requires of a bundle" in problem


def test_nothing_of_a_bundle_is_executed_before_the_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    evil = f"$open({str(trace)!r}, 'w')"
    bundle = points_bundle(
        tmp_path / "net",
        inference=deepcopy(points_network(channels=evil))
        | {"preprocessing": evil, "bundle_root": evil},
    )
    (bundle / "scripts/net.py").write_text(f"open({str(trace)!r}, 'w')\n")
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]})
    assert len(problems_of(path)) == 2
    assert not trace.exists()
