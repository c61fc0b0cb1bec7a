"""The pznet backend against a stand-in that harms its process as the real engine does.

A real net is not here: `MPICHUNK_PZNET_NET=/folder` (and `MPICHUNK_PZNET_REFERENCE=/output.npy`)
runs one. Nets are loaded in processes of their own: a process can load only one.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mpichunk.backends import get_backend
from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.pznet.backend import try_net
from mpichunk.backends.pznet.net import needed_python, write_resolver
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from tests.endtoend import read_volume, write_config

SOURCE = Path(__file__).with_name("pznet_standin.c")
WEIGHTS = np.array([2, -0.5, 3], np.float32)
SQUARE = "float square(float x) { return x * x; }"
LIBRARY = "conv_Any_{batch}_3.so"  # layer, then ARCH, BN and OFM: the keys in order


def compiler() -> tuple[str, str]:
    """Return the C compiler and the folder of Python's headers, or skip."""
    found = shutil.which("cc") or shutil.which("gcc")
    headers = sysconfig.get_paths()["include"]
    if found is None or not (Path(headers) / "Python.h").exists():
        pytest.skip("no compiler and headers of Python")
    return found, headers


def build(folder: Path, *, shape=(1, 1, 4, 8, 8), lost=0) -> Path:
    """Compile a stand-in for patches of this shape; `lost` voxels are cut off each side."""
    cc, headers = compiler()
    (folder / "weights").mkdir(parents=True)
    (folder / "lib").mkdir()
    batch, _, *patch = shape
    out = batch, 3, *(n - 2 * lost for n in patch)
    shapes = [f"-D{k}_SHAPE={','.join(map(str, s))}" for k, s in (("IN", shape), ("OUT", out))]
    WEIGHTS.tofile(folder / "weights" / "scale.data")
    square = folder / "lib" / LIBRARY.format(batch=batch)
    command = [cc, "-shared", "-fPIC", "-O1", "-x", "c", "-o", square, "-"]
    subprocess.run(command, input=SQUARE, text=True, check=True)
    command = [cc, "-shared", "-fPIC", "-O1", f"-I{headers}", *shapes, SOURCE]
    subprocess.run([*command, "-o", folder / "znet.so", "-ldl", "-lpthread"], check=True)
    return folder


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Return the folder of a stand-in for batches of 2; its path has a space."""
    return build(tmp_path_factory.mktemp("compiled nets") / "net", shape=(2, 1, 4, 8, 8))


@pytest.fixture
def copy(standin, tmp_path):
    """Return a copy that a test may spoil."""
    return shutil.copytree(standin, tmp_path / "net")


REQUEST = {
    "patch_shape": (4, 8, 8),
    "crop": (0, 0, 0),
    "batch_size": 3,
    "in_channels": 1,
    "out_channels": 3,
    "threads": 1,
    "precision": "float32",
    "device": "cpu",
    "deterministic": True,
}

PRELUDE = """
import json, os, sys, threading
import numpy as np
from mpichunk.backends import get_backend
from mpichunk.config.schema import Model
from mpichunk.backends.engine import EngineRequest
from mpichunk.block.inference import check_engine
folder, given = sys.argv[1], json.loads(sys.argv[2])
request = EngineRequest(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
backend = get_backend("pznet")
model = Model(backend="pznet", path=folder, out_channels=request.out_channels)
"""


def run_code(code: str, folder: Path, **changes: object) -> str:
    """Return what a process prints that has a backend, a model and a request."""
    arguments = [str(folder), json.dumps({k: v for k, v in (REQUEST | changes).items()})]
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_batches_threads_and_output(standin):
    """Also: what the net prints goes to standard error, and no thread stays bound."""
    out = run_code(
        """
mask = os.sched_getaffinity(0)
seen = []
class Spy(threading.Thread):  # loading may not disturb threads that are there already
    def run(self): stop.wait(); seen.append(os.sched_getaffinity(0))
stop = threading.Event(); spy = Spy(); spy.start()
engine = backend.load(model, request, backend.prepare(model, request))
assert os.environ["PYTHONUNBUFFERED"] == "1" and "ZNNPHI_PATH" not in os.environ
check_engine(engine, request)
x = np.random.default_rng(0).random((3, 1, 4, 8, 8), dtype=np.float32)
for n in (1, 2, 3):
    found = engine.infer(x[:n])
    np.testing.assert_allclose(found[:, 1], -0.5 * x[:n, 0] ** 2 + 1, rtol=1e-6)
    np.testing.assert_allclose(found[:, 2], 3 * x[:n, 0] ** 2 + 2, rtol=1e-6)
    assert found.dtype == np.float32 and found.flags.owndata or found.base is not None
masks = {}
def other():
    engine.infer(x); masks["other"] = os.sched_getaffinity(0)
thread = threading.Thread(target=other); thread.start(); thread.join()
stop.set(); spy.join()
assert masks["other"] == mask and seen == [mask], (masks, seen)
tasks = {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}
assert all(cores == mask for cores in tasks.values()), tasks
assert engine.info.threads == 3, engine.info  # two that it started, and the caller
print(engine.info.backend)
""",
        standin,
    )
    assert out == "pznet\n"


def test_a_net_that_has_cut_its_border(tmp_path):
    folder = build(tmp_path / "net", shape=(1, 1, 6, 8, 8), lost=2)
    run_code(
        """
engine = backend.load(model, request)
x = np.random.default_rng(0).random((3, 1, 6, 8, 8), dtype=np.float32)
found = engine.infer(x)
np.testing.assert_allclose(found[:, 0], 2 * x[:, 0, 2:-2, 2:-2, 2:-2] ** 2, rtol=1e-6)
""",
        folder,
        patch_shape=(6, 8, 8),
        crop=(2, 2, 2),
    )


def test_one_net_for_each_process(standin, copy):
    run_code(
        f"""
from mpichunk.errors import ModelError
backend.load(model, request)
backend.load(model, request)  # the same one again, as after the loss of a rank
other = Model(backend="pznet", path={str(copy)!r}, out_channels=3)
try:
    backend.load(other, request)
except ModelError as error:
    assert "one for each process" in str(error), error
else:
    raise AssertionError("aborts in the real engine")
""",
        standin,
    )


def request(**changes):
    return EngineRequest(**REQUEST | changes)


def model(folder):
    return Model(backend="pznet", path=str(folder), out_channels=3)


def test_files_are_found_and_nothing_is_loaded(standin):
    files = get_backend("pznet").model_files(model(standin))
    names = [str(file.relative_to(standin)) for file in files]
    assert names == ["znet.so", "weights/scale.data", "lib/conv_Any_2_3.so"]
    assert "znet" not in sys.modules


SPOILED = [
    # what is done to the folder, words of the message
    (shutil.rmtree, ["is not a folder", "znet.so, weights/*.data"]),
    (lambda f: (f / "znet.so").unlink(), ["has no znet.so"]),
    (lambda f: (f / "weights/scale.data").unlink(), ["no weights/*.data", "incomplete"]),
    (lambda f: (f / "weights/scale.data").write_bytes(b""), ["is empty"]),
    (lambda f: shutil.rmtree(f / "lib"), ["no lib/*.so"]),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILED)
def test_files_that_are_not_whole_are_found_before_any_call(copy, spoil, words):
    spoil(copy)
    with pytest.raises(ModelError) as caught:
        get_backend("pznet").model_files(model(copy))
    assert caught.value.key == "model.path"
    assert all(word in str(caught.value) for word in words), str(caught.value)


ENDS = [
    # What the engine ends its process for is found in a process of its own.
    (
        lambda f: (f / "weights/scale.data").rename(f / "weights/other.data"),
        ["ends its process with exit code 1", "cannot open", "weights/scale.data"],
    ),
    (
        lambda f: (f / "weights/scale.data").write_bytes(b"\0\0\0\0"),
        ["ends its process with exit code 1", "too short: "],
    ),
    (
        lambda f: (f / "lib/conv_Any_2_3.so").rename(f / "lib/conv_Any_2_4.so"),
        ["exit code 1", "the net needs", "lib/conv_Any_2_3.so, which is not there"],
    ),
    (lambda f: (f / "znet.so").write_bytes(b"libpython3.6m.so"), ["for Python 3.6, and this is"]),
]


@pytest.mark.parametrize(("spoil", "words"), ENDS)
def test_what_ends_the_process_is_tried_in_another(copy, spoil, words):
    spoil(copy)
    with pytest.raises(ModelError) as caught:
        get_backend("pznet").prepare(model(copy), request())
    assert caught.value.key == "model.path"
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"patch_shape": (4, 8, 16)}, "patch.shape", ["compiled for patches of [4, 8, 8] only"]),
        ({"in_channels": 2}, "model.path", ["takes 1 input channel, but the input has 2"]),
    ],
)
def test_another_shape_is_refused_before_the_net_is_loaded(standin, changes, key, words):
    prepared = json.dumps(try_net(standin)).encode()
    for call in (
        lambda: get_backend("pznet").prepare(model(standin), request(**changes)),
        lambda: get_backend("pznet").load(model(standin), request(**changes), prepared),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        assert caught.value.key == key
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "znet" not in sys.modules


def test_a_trial_that_is_killed_leaves_no_folder(standin, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    program = f"""
import os, tempfile
folder = tempfile.mkdtemp()
open({str(tmp_path / "seen")!r}, "w").write(folder)
os.kill(os.getpid(), 9)
"""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{program}")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError):
        try_net(standin)
    assert Path((tmp_path / "seen").read_text()).is_relative_to(scratch)
    assert not list(scratch.iterdir())


def test_a_real_znnphi_path_wins_and_must_be_one(standin, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("ZNNPHI_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"which has no cpp/include/znn/jit/jit\.py"):
        try_net(standin)
    # One that finds the library elsewhere.
    (copy / "lib/conv_Any_2_3.so").rename(tmp_path / "mine.so")
    (copy / "lib/other.so").write_bytes(b"x")
    script = tmp_path / "nothing/cpp/include/znn/jit/jit.py"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\necho {tmp_path}/mine.so\n")
    script.chmod(0o755)
    assert try_net(copy)["input"] == [2, 1, 4, 8, 8]


def test_the_resolver_names_the_library_in_the_order_of_lower_cased_keys(tmp_path):
    script = write_resolver(tmp_path)
    arguments = ["LAYER=conv", "LIB_FOLDER=/lib dir", "OUT_padd=0", "OFM=28", "bn=1", "ARCH=AVX512"]
    for command in ([script], [sys.executable, script]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout == "/lib dir/conv_AVX512_1_28_0.so\n"
        assert "which is not there" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"x libpython3.5m.so.1.0 y", "compiled for Python 3.5, and this is Python 3."),
        (b"libboost_python38.so", "compiled for Python 3.8"),
        (b"libboost_python-py36.so", "compiled for Python 3.6"),
        (b"nothing", "bound to the minor version of Python"),
    ],
)
def test_the_python_that_is_needed_is_named(tmp_path, text, words):
    (tmp_path / "znet.so").write_bytes(text)
    assert words in needed_python(tmp_path / "znet.so")


def test_whole_run_on_two_ranks(tmp_path, standin, mpirun):
    """Blocks of several patches, at ranks that each load the net."""
    config = write_config(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=8,24,24&seed=1"},
        model={"backend": "pznet", "path": str(standin), "out_channels": 3},
        patch={"shape": [4, 8, 8], "overlap": [0, 0, 0], "batch_size": 3, "window": "uniform"},
        block={"shape": [8, 16, 16], "margin": [0, 0, 0]},
        output={"volume": "out.zarr"},
    )
    done = mpirun(2, "-m", "mpichunk", "run", config)
    assert done.returncode == 0, done.stderr
    image = read_volume("synthetic://membranes?shape=8,24,24&seed=1")[0].astype(np.float32) / 255
    found = read_volume(tmp_path / "out.zarr")
    np.testing.assert_allclose(found[0], 2 * image**2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], 3 * image**2 + 2, rtol=1e-5, atol=1e-6)


# ---- A real net ------------------------------------------------------------------------------

REAL_NET = os.environ.get("MPICHUNK_PZNET_NET")


def test_real_net():
    """Shapes, determinism, affinity, and a reference where there is one, of a compiled pznet."""
    if REAL_NET is None:
        pytest.skip("no real pznet (MPICHUNK_PZNET_NET names the folder of one)")
    shapes = try_net(Path(REAL_NET))
    _, channels, *patch = shapes["input"]
    crop = [(a - b) // 2 for a, b in zip(patch, shapes["output"][2:], strict=True)]
    out = run_code(
        """
mask = os.sched_getaffinity(0)
engine = backend.load(model, request)
x = np.random.default_rng(0).random((1, request.in_channels, *request.patch_shape), np.float32)
first, second = (np.array(engine.infer(x)) for _ in range(2))
np.testing.assert_array_equal(first, second)
assert all(os.sched_getaffinity(int(t)) == mask for t in os.listdir("/proc/self/task"))
reference = os.environ.get("MPICHUNK_PZNET_REFERENCE")
if reference:
    np.testing.assert_allclose(first[0], np.load(reference).reshape(first[0].shape), atol=1e-4)
print(first.shape)
""",
        Path(REAL_NET),
        patch_shape=patch,
        crop=crop,
        batch_size=1,
        in_channels=channels,
        out_channels=shapes["output"][1],
    )
    print(out)
