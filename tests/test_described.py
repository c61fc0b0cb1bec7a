"""Networks named by a package that describes them: the same run as the config in full."""

import json
import shutil
import stat
import sys
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.cli import main
from mpichunk.config.described.scaling import Scale
from mpichunk.config.file import LoadedConfig, load_config
from mpichunk.errors import ConfigError
from mpichunk.filehash import file_hash
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.verbs.run import run_on
from tests.endtoend import assert_same_files, read_volume, trap, write_config
from tests.launch import Launch
from tests.packages import (
    BY_255,
    FLOAT,
    METADATA,
    POINTS,
    UNET,
    description,
    em_package,
    points_package,
    write_bundle,
    write_package,
)

SIGMOID = [{"_target_": "Activationsd", "sigmoid": True}]
VOLUME = {"volume": "synthetic://membranes?shape=16,32,40&seed=3"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def need(package: str, extra: str) -> None:
    """Skip where a package is not installed; in CI that is a failure."""
    pytest.importorskip(package, reason=f"no {package}: pip install 'mpichunk[{extra}]'")


@pytest.fixture
def zoo() -> None:
    need("bioimageio.spec", "bioimageio")


@pytest.fixture
def monai() -> None:
    need("monai", "monai")


def config_file(folder: Path, model: Any, *, name: str = "config.yaml", **sections: Any) -> Path:
    """Write a config around a model; what a section lacks has a default."""
    config: dict[str, Any] = {
        "input": VOLUME,
        "model": {"backend": "pytorch"} | model,
        "patch": {"shape": [16, 24, 24]},
        "block": {"shape": [16, 24, 24]},
        "output": {"volume": f"{Path(name).stem}.zarr", "chunk_shape": [8, 24, 24]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    return write_config(folder, name=name, **config)


def run(path: Path) -> Path:
    """Run a config; return where its output is."""
    assert run_on(SerialCommunicator(), path) == 0
    return path.with_suffix(".zarr")


def fingerprint(path: Path) -> dict[str, Any]:
    text = (path.parent / "runs" / path.stem / journal.NAME).read_text()
    parts: dict[str, Any] = json.loads(text.splitlines()[0])["fingerprint"]["parts"]
    return {key: value for key, value in parts.items() if key != "output.volume"}


def assert_same_runs(found: Path, plain: Path) -> None:
    """Run two configs: they must be one run in all that counts, and write the same bytes."""
    assert_same_files(run(found), run(plain))
    assert fingerprint(found) == fingerprint(plain)


def problems_of(path: Path) -> list[str]:
    """Return what is wrong with a config, without its file and line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.partition(": ")[2] for line in caught.value.lines]


def plain_values(loaded: LoadedConfig) -> dict[str, Any]:
    model, config = loaded.config.model, loaded.config
    return {
        "normalize": config.input.normalize and config.input.normalize.model_dump(),
        "activation": model.activation,
        "threshold": config.output.threshold,
        "reduce": config.output.reduce,
        "crop": config.patch.crop,
        "channels": model.out_channels,
    }


# ---- bioimage.io -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torchscript", "pytorch_state_dict"])
def test_package_runs_as_the_plain_config(
    tmp_path: Path, form: str, zoo: None, capsys: pytest.CaptureFixture[str]
) -> None:
    package = em_package(tmp_path / "net", form, halo=[2, 4, 4])
    plain: dict[str, Any] = {"out_channels": 3, "path": "net/net.ts.pt"}
    if form == "pytorch_state_dict":
        plain["path"] = "net/net.py:EmAffinityResUNet"
        plain |= {"weights": "net/weights.pt", "arguments": {"padding": "same"}}
    normalize = {"subtract": 0, "divide": 255}
    assert_same_runs(
        config_file(tmp_path, {"path": "net"}),
        config_file(
            tmp_path,
            plain,
            name="plain.yaml",
            input={"normalize": normalize},
            patch={"crop": [2, 4, 4]},
        ),
    )
    assert f"the bioimage.io package {package}/rdf.yaml: model.path: " in capsys.readouterr().err
    path = str(tmp_path / "config.yaml")
    for verb in (["verify"], ["status", "--check"]):
        assert main([*verb, path]) == 0
    # The run's own config names no package, and starts the same run.
    effective = tmp_path / "runs/config/config.yaml"
    (package / "rdf.yaml").unlink()
    assert load_config(effective).config.patch.crop == (2, 4, 4)
    assert "rdf.yaml" not in effective.read_text()


def test_network_that_loses_its_border(tmp_path: Path, zoo: None) -> None:
    package = em_package(
        tmp_path / "net", "torchscript", padding="valid", size={"min": 46, "step": 4}, offset=-42
    )
    # The description itself may be named, too.
    geometry = {"shape": [58, 58, 66], "overlap": [0, 0, 0]}
    found = config_file(tmp_path, {"path": str(package / "rdf.yaml")}, patch=geometry)
    plain = config_file(
        tmp_path,
        {"path": "net/net.ts.pt", "out_channels": 3},
        name="plain.yaml",
        input={"normalize": {"divide": 255}},
        patch=geometry | {"crop": [21, 21, 21]},
    )
    assert_same_runs(found, plain)
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [48, 50, 53]})
    (problem,) = problems_of(path)
    assert problem == (
        f"patch.shape: [48, 50, 53] does not fit the bioimage.io package {package}/rdf.yaml: "
        "z = 46 + n * 4, y = 46 + n * 4, x = 46 + n * 4; the nearest is [46, 50, 54]"
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_take_what_they_can_of_a_package(tmp_path: Path, backend: str, zoo: None) -> None:
    need(backend, backend)
    points_package(tmp_path / "net", before=BY_255, after=[{"id": "sigmoid"}])
    torch_path = run(config_file(tmp_path, {"path": "net"}, name="torch.yaml"))
    path = config_file(tmp_path, {"path": "net", "backend": backend})
    assert load_config(path).config.model.path == str(tmp_path / "net/net.onnx")
    expected = read_volume(torch_path)
    np.testing.assert_allclose(read_volume(run(path)), expected, atol=1e-4)
    assert expected.std() > 0.05


def test_zipped_package(tmp_path: Path, zoo: None) -> None:
    package = em_package(tmp_path / "net", "pytorch_state_dict")
    shutil.make_archive(str(tmp_path / "net"), "zip", package)
    zipped = config_file(tmp_path, {"path": "net.zip"})
    plain = config_file(tmp_path, {"path": "net"}, name="plain.yaml")
    expected = load_config(plain).config.model
    shutil.rmtree(package)
    model = load_config(zipped).config.model
    folder = Path(str(model.weights)).parent
    assert folder.parent == tmp_path / "runs/config"
    assert model.model_dump() == expected.model_dump() | {
        "path": f"{folder}/net.py:EmAffinityResUNet",
        "weights": f"{folder}/weights.pt",
    }
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(zipped)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.glob("model-*")] == [folder.name]
    # Where the archive was unpacked is no part of what was computed; which archive it was, is.
    parts = fingerprint(zipped)
    assert parts["model.path"] == f"{folder.name}/net.py:EmAffinityResUNet"
    assert parts["model.weights"] == f"{folder.name}/weights.pt"
    run(config_file(tmp_path, {"path": "net.zip"}, name="elsewhere.yaml"))
    assert fingerprint(tmp_path / "elsewhere.yaml") == parts


@pytest.mark.parametrize("form", ["folder", "archive", "bundle"])
def test_verbs_that_look_at_a_run_read_no_package(
    tmp_path: Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not before the run has started, and not when it is there no more."""
    patch = {"shape": [16, 32, 32]}
    name = "net.zip" if form == "archive" else "net"
    path = config_file(tmp_path, {"path": name}, patch=patch)
    if form == "bundle":
        package = points_bundle(tmp_path / "net", inference={"postprocessing": SIGMOID})
    else:
        need("bioimageio.spec", "bioimageio")
        package = points_package(tmp_path / "net", before=BY_255, after=[{"id": "sigmoid"}])
        shutil.make_archive(str(tmp_path / "net"), "zip", package)

    def told(verb: str, *more: str) -> tuple[int, str]:
        code = main([*verb.split(), str(path), *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    for verb in ("status", "stop", "verify"):
        code, said = told(verb)
        assert code == 2 and "this config has not been run yet" in said
    code, said = told("status --check")
    assert code == 75 and "nothing is done yet" in said
    assert not (tmp_path / "runs").exists()
    run(path)
    capsys.readouterr()

    shutil.rmtree(package)
    (tmp_path / "net.zip").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "bioimageio", None)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for verb, expected in (
        ("status --check", "state    complete"),
        ("stop", "nothing to stop: complete"),
        ("verify", "complete and as it was written"),
    ):
        code, said = told(verb)
        assert code == 0 and expected in said, said
    for key, value in (
        ("input.normalize", "{divide: 7}"),
        ("model.out_channels", "3"),
        ("model.path", "another"),
    ):
        for verb in ("status", "verify"):
            code, said = told(verb, "--set", f"{key}={value}")
            assert code == 2 and key in said, said
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before

    (tmp_path / "runs/config/config.yaml").write_bytes(b"\xff")
    code, said = told("stop")
    assert code == 2 and "runs/config/config.yaml cannot be read" in said


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/tmp/mpichunk-escaped.txt", "a/../../b", "link"]
)
def test_archive_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.writestr("rdf.yaml", "type: model")
        member = zipfile.ZipInfo(name)
        if name == "link":
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    (problem,) = problems_of(config_file(tmp_path, {"path": "net.zip"}))
    assert f"has a member {name!r}" in problem and "it is not unpacked" in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "net.zip"]


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
    expected, scale = raw, Scale()

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
ONCE = "by the numbers of each sample, which differ from patch to patch; mpichunk scales by fixed"


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
        f"model.path: {ORIGIN} is for images of two dimensions; has image with the axes batch, "
        "channel, y, x; mpichunk runs networks with batch, channel, z, y, x; wrap it",
    ),
    "two inputs": (
        {"inputs": [changed()["inputs"][0], TENSOR]},
        f"model.path: {ORIGIN} describes 2 inputs (image, other); mpichunk runs networks with one",
    ),
    "another grid": (
        {"outputs__0__axes__2__scale": 20},
        f"patch.crop: {ORIGIN} asks for an output whose z axis is not the input's, less as much on "
        "each side; mpichunk runs networks whose output lies on the grid of their input",
    ),
    "halo besides a border": (
        {
            "outputs__0__axes__2__size__offset": -4,
            "outputs__0__axes__3__halo": 3,
        },
        f"patch.crop: {ORIGIN} asks for a halo of [0, 3, 0] besides the [2, 0, 0] voxels a side "
        "that the network cuts off; mpichunk cuts either; `patch.crop: [2, 0, 0]` runs it",
    ),
    "weights of TensorFlow": (
        {"weights": TENSORFLOW},
        "model.backend: {package} has weights as tensorflow_js, but the pytorch backend takes "
        "torchscript, pytorch_state_dict; none is read by mpichunk",
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
        "model.path: {package}/weights.pt is not the file that its description means: the SHA-256",
    ),
    "no description": (
        {"inputs": []},
        "model.path: {package}/rdf.yaml is no valid description of bioimage.io: ",
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
        f"input.normalize: is used; {origin} asks for zero_mean_unit_variance (eps: 1e-06) by the "
        "numbers of each sample, which differ from patch to patch, which is left out",
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
        f"model.out_channels: 4 contradicts {origin}, which says 2; take it out"
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


# ---- MONAI -------------------------------------------------------------------------------------


def unet_bundle(folder: Path, **how: Any) -> Path:
    """Write a bundle of a small random U-Net, made by MONAI as its users make it."""
    from monai.bundle import ConfigParser

    write_bundle(folder, **how)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    torch.manual_seed(3)
    network = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), folder / "models/model.pt")
    torch.jit.script(network).save(str(folder / "models/model.ts"))
    return folder


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


def network(**arguments: Any) -> dict[str, Any]:
    return {"network_def": {"_target_": "scripts.net.Points"} | arguments}


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
        network(channels="$1 + 1"),
        METADATA,
        f"model.arguments.channels: {BUNDLE} asks for the network's argument `channels` as $1 + 1; "
        "mpichunk executes nothing of a bundle's config; write its value here",
    ),
    "argument that is an object": (
        network(channels={"_target_": "Thing"}),
        METADATA,
        f"model.arguments.channels: {BUNDLE} asks for the network's argument `channels` as "
        "{{_target_: Thing}}; mpichunk executes nothing",
    ),
    "no channels": (
        {},
        None,
        f"model.out_channels: {BUNDLE} asks for a number of output channels that it does not tell; "
        "write how many the network returns",
    ),
    "two dimensions": (
        network(spatial_dims=2),
        METADATA,
        f"model.path: {BUNDLE} is for images of two dimensions; mpichunk runs networks over",
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


def points_bundle(folder: Path, **how: Any) -> Path:
    """Write a bundle whose network needs no MONAI."""
    how["inference"] = (
        network() | {"preprocessing": None, "postprocessing": None} | how["inference"]
    )
    write_bundle(folder, **how)
    (folder / "scripts").mkdir()
    (folder / "scripts/net.py").write_text(POINTS)
    torch.save({"w.weight": torch.ones(2, 1, 1, 1, 1)}, folder / "models/model.pt")
    return folder


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
        inference=network(channels="$1 + 1", spatial_dims="@dims")
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
    assert f"which is what the {backend} backend takes of a bundle" in problem


# ---- All ---------------------------------------------------------------------------------------


def test_missing_packages_are_told_with_their_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points_package(tmp_path / "zoo")
    write_bundle(tmp_path / "bundle")
    torch.save({}, tmp_path / "bundle/models/model.pt")
    for name, package, extra in (
        ("zoo", "bioimageio.spec", "bioimageio"),
        ("bundle", "monai", "monai"),
    ):
        monkeypatch.setitem(sys.modules, extra, None)
        path = config_file(tmp_path, {"path": name}, patch={"shape": [16, 32, 32]})
        (problem,) = problems_of(path)
        assert f"needs the package {package}, which is not installed: pip install " in problem
        assert f"'mpichunk[{extra}]'" in problem


def test_plan_starts_neither_torch_nor_mpi(
    tmp_path: Path, python: Launch, zoo: None, monai: None
) -> None:
    points_package(tmp_path / "zoo")
    unet_bundle(tmp_path / "bundle")
    (tmp_path / "bundle/models/model.ts").unlink()
    environment = trap(tmp_path / "trap", "torch", "mpi4py")
    for name in ("zoo", "bundle"):
        path = config_file(tmp_path, {"path": name}, patch={"shape": [16, 32, 32]})
        done = python("-W", "error", "-m", "mpichunk", "plan", path, env=environment)
        assert done.returncode == 0, done.stderr
        assert "model.out_channels: 2" in done.stderr
        assert not (tmp_path / "runs").exists()


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    """A folder that is no package, and backends with folders of their own."""
    (tmp_path / "net").mkdir()
    for backend in ("pytorch", "pznet"):
        loaded = load_config(config_file(tmp_path, {"path": "net", "backend": backend}))
        assert loaded.config.model.path == str(tmp_path / "net") and loaded.notes == ()
    write_bundle(tmp_path / "net")
    loaded = load_config(config_file(tmp_path, {"path": "net", "backend": "identity"}))
    assert loaded.config.model.path == str(tmp_path / "net")


def test_nothing_of_a_bundle_is_executed_before_the_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    evil = f"$open({str(trace)!r}, 'w')"
    bundle = points_bundle(
        tmp_path / "net",
        inference=deepcopy(network(channels=evil)) | {"preprocessing": evil, "bundle_root": evil},
    )
    (bundle / "scripts/net.py").write_text(f"open({str(trace)!r}, 'w')\n")
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [16, 32, 32]})
    assert len(problems_of(path)) == 2
    assert not trace.exists()
