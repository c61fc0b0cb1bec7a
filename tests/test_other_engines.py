"""The onnxruntime and openvino backends: values, settings, files, and bad networks in words.

Networks of real data stand in test_network_forms.
"""

import os
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mpichunk.backends import get_backend
from mpichunk.backends.files.onnx import onnx_files
from mpichunk.block.inference import check_engine
from mpichunk.config.rules import CPU_BACKENDS
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from mpichunk.job.startup import library_versions
from tests import onnx_maker
from tests.endtoend import trap, write_config
from tests.launch import REPOSITORY
from tests.onnx_engines import BATCH, load, make_request
from tests.optional import need

BOTH = ["onnxruntime", "openvino"]
both = pytest.mark.parametrize("backend", BOTH)


def onnx_config(folder, backend, **sections):
    """Write a network and the config of a run of it."""
    onnx_maker.convolution(folder / "net.onnx")
    return write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=8,48,48"},
        model={"backend": backend, "path": "net.onnx", "out_channels": 2},
        patch={"shape": [4, 16, 16]},
        block={"shape": [8, 24, 24]},
        output={"volume": "out.zarr"},
        **sections,
    )


@both
def test_values_and_smaller_batches(tmp_path, backend):
    engine = load(backend, onnx_maker.convolution(tmp_path / "net.onnx"))
    check_engine(engine, make_request())
    for n in (2, 1):  # one, after memory has become scarce
        found = np.array(engine.infer(BATCH[:n]))
        np.testing.assert_allclose(found[:, 0], 2 * BATCH[:n, 0], rtol=1e-6)
        np.testing.assert_allclose(found[:, 1], -3 * BATCH[:n, 0], rtol=1e-6)
        assert found.dtype == np.float32
    info = engine.info
    assert (info.backend, info.device, info.precision) == (backend, "cpu", "float32")
    assert info.version.startswith(f"{backend} 20" if backend == "openvino" else f"{backend} 1.")
    assert info.device_kind.startswith("cpu ")


@both
def test_a_network_that_has_cut_its_border(tmp_path, backend):
    path = onnx_maker.convolution(tmp_path / "net.onnx", cut=True)
    engine = load(backend, path, changes={"crop": (1, 1, 1)})
    np.testing.assert_allclose(
        engine.infer(BATCH)[:, 0], 2 * BATCH[:, 0, 1:-1, 1:-1, 1:-1], rtol=1e-6
    )


@both
def test_threads_are_those_asked_for(tmp_path, backend):
    path = onnx_maker.convolution(tmp_path / "net.onnx")
    engine = load(backend, path, changes={"threads": 2})
    assert engine.info.threads == 2
    np.testing.assert_allclose(engine.infer(BATCH)[:, 0], 2 * BATCH[:, 0], rtol=1e-6)


@both
def test_weights_beside_the_onnx_file_are_part_of_the_network(tmp_path, backend):
    path = onnx_maker.external(tmp_path / "net.onnx")
    assert onnx_files(Model(backend=backend, path=str(path))) == [path, tmp_path / "net.onnx.data"]
    found = load(backend, path).infer(BATCH)
    np.testing.assert_allclose(found[:, 1], -3 * BATCH[:, 0], rtol=1e-6)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"net\.onnx\.data does not exist"):
        load(backend, path)


# ---- Bad networks --------------------------------------------------------------------------------


def cut_short(path: Path) -> Path:
    data = onnx_maker.convolution(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def text(path: Path) -> Path:
    path.write_text("this is not an ONNX file, whatever its name says")
    return path


def fixed(path: Path) -> Path:
    return onnx_maker.convolution(path, inputs=(2, 1, 4, 16, 12))


def fixed_batch(path: Path) -> Path:
    return onnx_maker.convolution(path, inputs=(1, 1, "z", "y", "x"))


def flat(path: Path) -> Path:
    return onnx_maker.convolution(path, inputs=("n", 1, "y", "x"))


BAD = [
    # network, request, key, words
    (cut_short, {}, "model.path", ["net.onnx", "cut short"]),
    (text, {}, "model.path", ["net.onnx is not an ONNX file"]),
    (fixed, {}, "patch.shape", ["for patches of [4, 16, 12] only", "dynamic axes"]),
    (
        onnx_maker.convolution,
        {"in_channels": 2},
        "model.path",
        ["takes 1 input channel, but the input has 2"],
    ),
    (
        onnx_maker.convolution,
        {"out_channels": 3},
        "model.out_channels",
        ["returned 2 channels", "set it to 2"],
    ),
    (
        lambda path: onnx_maker.convolution(path, cut=True),
        {},
        "patch.crop",
        ["returned (2, 6, 10)", "set patch.crop: [1, 1, 1]"],
    ),
    (
        onnx_maker.pooling,
        {"patch_shape": (4, 10, 12), "out_channels": 1},
        "patch.shape",
        ["multiples of [1, 4, 4]", "[4, 8, 12] or [4, 12, 12]"],
    ),
    (onnx_maker.not_a_number, {}, "model.weights", ["NaN or inf"]),
]


@both
@pytest.mark.parametrize(("make", "changes", "key", "words"), BAD)
def test_bad_network_is_one_message_with_its_key(tmp_path, backend, make, changes, key, words):
    path = make(tmp_path / "net.onnx")
    with pytest.raises(ModelError) as caught:
        check_engine(load(backend, path, changes=changes), make_request(**changes))
    message = str(caught.value)
    assert caught.value.key == key, message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_fixed_batch_names_itself_where_it_cannot_be_changed(tmp_path):
    path = fixed_batch(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"set patch\.batch_size: 1") as caught:
        load("onnxruntime", path)
    assert caught.value.key == "patch.batch_size"
    load("onnxruntime", path, changes={"batch_size": 1}).infer(BATCH[:1])
    np.testing.assert_allclose(load("openvino", path).infer(BATCH)[:, 0], 2 * BATCH[:, 0])


@both
def test_networks_of_another_shape_altogether(tmp_path, backend):
    with pytest.raises(ModelError, match=r"returns 2 (outputs|tensors).* expected one"):
        load(backend, onnx_maker.two_outputs(tmp_path / "two.onnx"), changes={"out_channels": 1})
    with pytest.raises(ModelError):
        load(backend, flat(tmp_path / "flat.onnx"))


@both
@pytest.mark.parametrize(
    ("location", "words"), [("../secret", "outside its own folder"), ("/etc/passwd", "outside")]
)
def test_weights_elsewhere_are_refused(tmp_path, backend, location, words):
    path = onnx_maker.external(tmp_path / "net.onnx", location=location)
    with pytest.raises(ModelError, match=words):
        load(backend, path)


def test_a_file_that_is_not_there_and_one_of_another_kind(tmp_path):
    for backend, name, words in (
        ("onnxruntime", "absent.onnx", "absent.onnx does not exist; expected an .onnx file"),
        ("openvino", "absent.onnx", "does not exist"),
        ("openvino", "absent.xml", "does not exist"),
        ("openvino", "absent.pt", "does not exist; expected a torch.export file"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            get_backend(backend).model_files(Model(backend=backend, path=str(tmp_path / name)))
        assert caught.value.key == "model.path"
    (tmp_path / "net.xml").write_text("<net/>")
    with pytest.raises(ModelError, match=r"net\.bin does not exist"):
        load("openvino", tmp_path / "net.xml")
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"net\.xml cannot be read by openvino") as caught:
        load("openvino", tmp_path / "net.xml")
    assert "\n" not in str(caught.value)


# ---- Settings ------------------------------------------------------------------------------------


def test_onnxruntime_options_are_session_entries(tmp_path):
    path = onnx_maker.convolution(tmp_path / "net.onnx")
    options = {
        "session.set_denormal_as_zero": True,
        "session.use_env_allocators": False,
        "session.intra_op.allow_spinning": 1,
    }
    engine = load("onnxruntime", path, options=options)
    engine.infer(BATCH)
    entry = engine._session.get_session_options().get_session_config_entry
    assert [entry(key) for key in options] == ["1", "0", "1"]
    for key in ("set_denormal_as_zero", "Session.set_denormal_as_zero", "inter_op_num_threads"):
        with pytest.raises(ModelError, match=f"no session entry '{key}'") as caught:
            load("onnxruntime", path, options={key: "1"})
        assert caught.value.key == "model.options"


def test_onnxruntime_refuses_a_device_that_it_cannot_use(tmp_path):
    need("onnxruntime")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is built for CUDA here")
    path = onnx_maker.convolution(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeviceError, match="cannot use the device 'cuda:0'"):
            load("onnxruntime", path, changes={"device": "cuda:0"})
    probe = get_backend("onnxruntime").probe("auto")
    assert probe.accelerators == () and "onnxruntime-gpu" in probe.note


def test_every_backend_of_the_config_is_there():
    names = get_args(Model.model_fields["backend"].annotation)
    assert {name for name in names if get_backend(name).cpu_only} == set(CPU_BACKENDS)


# ---- Packages ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ModuleNotFoundError('none', name=__name__)", "not installed: pip install 'mpich"),
        (
            "import no_such_package",
            "cannot be imported: No module named 'no_such_package'; install",
        ),
    ],
)
def test_a_package_that_is_missing_is_one_message(tmp_path, python, backend, code, words):
    """A package that is broken is not called missing."""
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / f"{backend}.py").write_text(code + "\n")
    config = onnx_config(tmp_path, backend, compute={"device": "cpu"})
    env = {"PYTHONPATH": f"{tmp_path / 'traps'}{os.pathsep}{REPOSITORY}"}
    done = python("-m", "mpichunk", "run", config, env=env)
    assert done.returncode == 2, done.stderr
    assert "model.backend" in done.stderr and words in done.stderr
    assert f"mpichunk[{backend}]" in done.stderr
    assert "Traceback" not in done.stderr


@both
def test_plan_starts_no_framework(tmp_path, python, backend):
    config = onnx_config(tmp_path, backend)
    env = trap(tmp_path / "traps", "torch", "onnxruntime", "openvino", "mpi4py")
    done = python("-m", "mpichunk", "plan", config, env=env)
    assert done.returncode == 0, done.stderr


def test_versions_are_recorded():
    need(*BOTH)
    assert {"onnxruntime", "openvino"} <= library_versions().keys()
