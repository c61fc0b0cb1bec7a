"""What a bioimage.io package says, as values of the config, and what a config cannot say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.config.file import load_config
from mpichunk.config.scaling import Scaling
from mpichunk.filehash import file_hash
from tests.described import config_file, plain_values, problems_of
from tests.packages import FLOAT, description, points_package, write_package


def test_older_version_of_the_format(tmp_path: Path, zoo: None) -> None:
    package = points_package(tmp_path / "net")
    content: dict[str, Any] = {
        "format_version": "0.4.10",
        "type": "model",
        "name": "Network of an older test",
        "description": "old",
        "license": "MIT",
        "authors": [{"name": "Somebody"}],
        "cite": [{"text": "nobody", "doi": "10.1000/xyz"}],
        "documentation": "README.md",
        "tags": [],
        "timestamp": "2022-01-01T00:00:00",
        "test_inputs": ["in.npy"],
        "test_outputs": ["out.npy"],
        "inputs": [
            {
                "name": "raw",
                "axes": "bczyx",
                "data_type": "float32",
                "data_range": [0, 255],
                "shape": {"min": [1, 1, 16, 16, 16], "step": [0, 0, 8, 8, 8]},
                "preprocessing": [
                    {
                        "name": "scale_linear",
                        "kwargs": {"axes": "czyx", "gain": 0.5, "offset": -3.0},
                    }
                ],
            }
        ],
        "outputs": [
            {
                "name": "out",
                "axes": "bczyx",
                "data_type": "float32",
                "data_range": [0, 1],
                "halo": [0, 0, 4, 4, 4],
                "shape": {
                    "reference_tensor": "raw",
                    "scale": [1, 0, 1, 1, 1],
                    "offset": [0, 1, 0, 0, 0],
                },
                "postprocessing": [{"name": "sigmoid"}],
            }
        ],
        "weights": {
            "pytorch_state_dict": {
                "source": "weights.pt",
                "architecture": "net.py:Points",
                "architecture_sha256": file_hash(package / "net.py"),
                "kwargs": {"channels": 2},
            }
        },
    }
    write_package(package, content)
    found = load_config(config_file(tmp_path, {"path": "net"}))
    assert plain_values(found) == {
        "normalize": {"subtract": 6.0, "divide": 2.0, "clip": None},
        "activation": "sigmoid",
        "threshold": None,
        "reduce": None,
        "crop": (4, 4, 4),
        "channels": 2,
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], {"normalize": {"subtract": 0.0, "divide": 1.0, "clip": None}}),
        (
            [
                {"id": "clip", "kwargs": {"min": 10, "max": 200}},
                FLOAT,
                {"id": "scale_linear", "kwargs": {"gain": 2, "offset": 1}},
                {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 5, "std": 4}},
                FLOAT,
            ],
            [
                {"id": "softmax", "kwargs": {"axis": "channel"}},
                {"id": "clip", "kwargs": {"min": 0, "max": 1}},
                {"id": "binarize", "kwargs": {"threshold": 0.25}},
            ],
            {
                "normalize": {"subtract": 2.0, "divide": 2.0, "clip": (10.0, 200.0)},
                "activation": "softmax",
                "threshold": 0.25,
            },
        ),
        (
            [
                FLOAT,
                {
                    "id": "fixed_zero_mean_unit_variance",
                    "kwargs": {"axis": "channel", "mean": [7], "std": [2]},
                },
                FLOAT,
            ],
            [{"id": "sigmoid"}],
            {
                "normalize": {"subtract": 7.0, "divide": 2.0, "clip": None},
                "activation": "sigmoid",
            },
        ),
    ],
)
def test_steps_that_a_config_can_say(
    tmp_path: Path, before: Any, after: Any, expected: dict[str, Any], zoo: None
) -> None:
    points_package(tmp_path / "net", before=before, after=after)
    found = plain_values(load_config(config_file(tmp_path, {"path": "net"})))
    assert expected.items() <= found.items()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mapped"), st.floats(0.01, 100), st.floats(-100, 100)),
        st.tuples(st.just("normalised"), st.floats(-100, 100), st.floats(0.01, 100)),
        st.tuples(st.just("clipped"), st.floats(-100, 0), st.floats(1, 100)),
        st.tuples(st.just("clipped"), st.none(), st.floats(1, 100)),
        st.tuples(st.just("clipped"), st.floats(-100, 0), st.none()),
    ),
    max_size=4,
)


@given(STEPS)
def test_steps_compose_to_one(steps: list[tuple[str, Any, Any]]) -> None:
    raw = np.linspace(-300, 300, 61)
    expected, scale = raw, Scaling()

    def rounding() -> float:
        """Return what float64 may lose among numbers as large as those of the scale."""
        bounds = [bound for bound in scale.clip or () if abs(bound) < 1e30]
        return 1e-12 * max(300, abs(scale.subtract), *map(abs, bounds), 0) / scale.divide

    for name, first, second in steps:
        if name == "mapped":
            expected = expected * first + second
        elif name == "normalised":
            expected = (expected - first) / second
        else:
            expected = np.clip(expected, first, second)
        try:
            scale = getattr(scale, name)(first, second)
        except ValueError:
            # What is refused makes all values one.
            assert name == "clipped" and np.ptp(expected) <= rounding()
            return
    clipped = raw if scale.clip is None else np.clip(raw, *scale.clip)
    found = (clipped - scale.subtract) / scale.divide
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=rounding())


ORIGIN = "the bioimage.io package {package}/rdf.yaml"
ONCE = "with statistics of each sample, which differ from patch to patch; mpichunk scales by fixed"


def changed(**changes: Any) -> dict[str, Any]:
    """Return a description with values at dotted keys (dots written as `__`) replaced."""
    state_dict = {
        "source": "weights.pt",
        "pytorch_version": "2.6.0",
        "architecture": {"source": "net.py", "callable": "Points", "kwargs": {"channels": 2}},
    }
    content: Any = description({"pytorch_state_dict": state_dict}, channels=2)
    for key, value in changes.items():
        inner = content
        *parents, name = key.split("__")
        for parent in parents:
            inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
        inner[int(name) if isinstance(inner, list) else name] = value
    return dict(content)


BEFORE, AFTER = "inputs__0__preprocessing", "outputs__0__postprocessing"
AXES = [
    {"type": "batch"},
    {"type": "channel", "channel_names": ["em"]},
    {"type": "space", "id": "y", "size": 64},
    {"type": "space", "id": "x", "size": 64},
]
TENSOR = {"id": "other", "axes": AXES, "test_tensor": {"source": "in.npy"}}
TENSORFLOW = {"tensorflow_js": {"source": "net.js", "tensorflow_version": "2.0"}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "percentiles": (
        {BEFORE: [FLOAT, {"id": "scale_range", "kwargs": {"max_percentile": 99.8}}]},
        f"input.normalize: {ORIGIN} asks for scale_range (min_percentile: 0.0, max_percentile: "
        f"99.8, eps: 1e-06) {ONCE}",
    ),
    "mean of the sample": (
        {BEFORE: [FLOAT, {"id": "zero_mean_unit_variance"}]},
        f"input.normalize: {ORIGIN} asks for zero_mean_unit_variance (eps: 1e-06) {ONCE}",
    ),
    "negative gain": (
        {BEFORE: [FLOAT, {"id": "scale_linear", "kwargs": {"gain": -1}}]},
        f"input.normalize: {ORIGIN} asks for scale_linear (gain: -1.0, offset: 0.0) with a gain of "
        "-1, which must be above 0; mpichunk scales by fixed numbers only",
    ),
    "by channel": (
        {
            BEFORE: [
                FLOAT,
                {"id": "scale_linear", "kwargs": {"axis": "channel", "gain": [1, 2]}},
            ],
            "inputs__0__axes__1__channel_names": ["a", "b"],
        },
        f"input.normalize: {ORIGIN} asks for scale_linear (axis: channel, gain: [1.0, 2.0], "
        "offset: 0.0) by channel; mpichunk scales by fixed numbers only",
    ),
    "scaled bytes": (
        {BEFORE: [{"id": "scale_linear", "kwargs": {"gain": 0.5}}]},
        f"input.normalize: {ORIGIN} asks for uint8 as the type of scaled values; mpichunk scales",
    ),
    "scaled result": (
        {AFTER: [{"id": "scale_linear", "kwargs": {"gain": 2}}]},
        f"model.activation: {ORIGIN} asks for scale_linear (gain: 2.0, offset: 0.0); mpichunk does "
        "not do that; write model.activation (none, sigmoid or softmax) to run without it",
    ),
    "sigmoid of labels": (
        {AFTER: [{"id": "binarize", "kwargs": {"threshold": 0.5}}, {"id": "sigmoid"}]},
        f"model.activation: {ORIGIN} asks for sigmoid; mpichunk does not do that",
    ),
    "two dimensions": (
        {"inputs__0__axes": AXES, "outputs__0__axes": AXES},
        f"model.path: {ORIGIN} is for two-dimensional images and has image with the axes batch, "
        "channel, y, x; mpichunk runs networks with batch, channel, z, y, x; wrap it",
    ),
    "two inputs": (
        {"inputs": [changed()["inputs"][0], TENSOR]},
        f"model.path: {ORIGIN} describes 2 inputs (image, other); mpichunk runs networks with one",
    ),
    "another grid": (
        {"outputs__0__axes__2__scale": 20},
        f"patch.crop: {ORIGIN} asks for an output whose z axis is not the input's less the same "
        "border on each side; mpichunk runs networks whose output lies on the grid of their input",
    ),
    "halo besides a border": (
        {
            "outputs__0__axes__2__size__offset": -4,
            "outputs__0__axes__3__halo": 3,
        },
        f"patch.crop: {ORIGIN} asks for a halo of [0, 3, 0] in addition to the [2, 0, 0] voxels "
        "that the network cuts off each side; mpichunk supports one of the two; "
        "`patch.crop: [2, 0, 0]` runs it",
    ),
    "weights of TensorFlow": (
        {"weights": TENSORFLOW},
        "model.backend: {package} has weights as tensorflow_js, but the pytorch backend takes "
        "torchscript, pytorch_state_dict; mpichunk reads none of them",
    ),
    "weights of another engine": (
        {"weights": {"onnx": {"source": "net.onnx", "opset_version": 17}}},
        "model.backend: {package} has weights as onnx, but the pytorch backend takes torchscript, "
        "pytorch_state_dict; set model.backend: onnxruntime or openvino",
    ),
    "file elsewhere": (
        {"weights__pytorch_state_dict__source": "../weights.pt"},
        "model.path: {package} names '../weights.pt', outside its own folder",
    ),
    "file on the network": (
        {"weights__pytorch_state_dict__source": "https://example.org/weights.pt"},
        "model.path: {package} names https://example.org/weights.pt, which is not in it, and "
        "mpichunk downloads nothing; export the model as a package with all its files",
    ),
    "file that is gone": (
        {"weights__pytorch_state_dict__architecture__source": "gone.py"},
        "model.path: {package} names 'gone.py', which is not there; is the package whole?",
    ),
    "file that is another": (
        {"weights__pytorch_state_dict__sha256": "0" * 64},
        "model.path: {package}/weights.pt is not the file that its description names: the SHA-256",
    ),
    "no description": (
        {"inputs": []},
        "model.path: {package}/rdf.yaml is not a valid bioimage.io description: ",
    ),
    "no model": (
        {"type": "dataset"},
        "model.path: {package}/rdf.yaml describes a dataset; expected a model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused_in_one_message(
    tmp_path: Path, case: str, zoo: None
) -> None:
    changes, expected = REFUSED[case]
    package = points_package(tmp_path / "net")
    write_package(package, changed(**changes))
    (problem,) = problems_of(config_file(tmp_path, {"path": "net"}))
    assert problem.startswith(expected.format(package=package))


def test_user_decides(tmp_path: Path, zoo: None) -> None:
    """What is written wins, and is told where the description says otherwise."""
    package = points_package(
        tmp_path / "net",
        before=[FLOAT, {"id": "zero_mean_unit_variance"}],
        after=[{"id": "sigmoid"}, {"id": "binarize", "kwargs": {"threshold": 0.5}}],
        halo=[2, 2, 2],
    )
    path = config_file(
        tmp_path,
        {"path": "net", "activation": "none", "arguments": {"channels": 3}},
        input={"normalize": {"subtract": 9}},
        patch={"crop": [1, 2, 2]},
        output={"reduce": "argmax"},
    )
    loaded = load_config(path)
    origin = ORIGIN.format(package=package)
    assert [warning.partition(": ")[2] for warning in loaded.warnings()] == [
        f"model.activation: none is used; {origin} says sigmoid",
        f"output.threshold: is left out, since output.reduce or output.threshold is set; {origin} "
        "says 0.5",
        f"patch.crop: [1, 2, 2] is used; {origin} says [2, 2, 2]",
        f"input.normalize: is used; {origin} asks for zero_mean_unit_variance (eps: 1e-06) with "
        "statistics of each sample, which differ from patch to patch, which is left out",
    ]
    assert loaded.config.model.arguments == {"channels": 3}
    assert plain_values(loaded) == {
        "normalize": {"subtract": 9.0, "divide": 1.0, "clip": None},
        "activation": "none",
        "threshold": None,
        "reduce": "argmax",
        "crop": (1, 2, 2),
        "channels": 2,
    }
    assert problems_of(config_file(tmp_path, {"path": "net", "out_channels": 4}))[1:] == [
        f"model.out_channels: 4 contradicts {origin}, which says 2; remove it"
    ]


def test_steps_before_one_that_is_left_out_are_done(tmp_path: Path, zoo: None) -> None:
    after = [{"id": "sigmoid"}, {"id": "scale_linear", "kwargs": {"gain": 255}}]
    package = points_package(tmp_path / "net", after=after)
    loaded = load_config(config_file(tmp_path, {"path": "net"}, output={"threshold": 0.5}))
    assert loaded.config.model.activation == "sigmoid"
    assert [warning.partition(": ")[2] for warning in loaded.warnings()] == [
        f"output.threshold: is used; {ORIGIN.format(package=package)} asks for scale_linear (gain: "
        "255.0, offset: 0.0), which is left out"
    ]


def test_fixed_patch_is_taken_from_the_package(tmp_path: Path, zoo: None) -> None:
    package = points_package(tmp_path / "net", size=32)
    path = config_file(tmp_path, {"path": "net"})
    values = yaml.safe_load(path.read_text())
    del values["patch"]
    path.write_text(yaml.safe_dump(values))
    loaded = load_config(path)
    assert loaded.config.patch.shape == (32, 32, 32)
    assert "it expects uint8 voxels of 10 x 10 x 10 nanometer (zyx)" in loaded.notes[0]
    (problem,) = problems_of(config_file(tmp_path, {"path": "net"}))
    assert problem == (
        f"patch.shape: [16, 24, 24] does not fit the bioimage.io package {package}/rdf.yaml: "
        "z = 32, y = 32, x = 32; the nearest is [32, 32, 32]"
    )
