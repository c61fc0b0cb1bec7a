import pickle
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpichunk.backends.devices as devices
from mpichunk.backends import get_backend
from mpichunk.backends.engine import Scaling
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.size_advice import size_advice
from mpichunk.backends.torch_arrays import TorchArrays
from mpichunk.backends.torch_engine import TorchEngine, prepare_torch
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from tests import engines

ARRAYS = [NumpyArrays, lambda: TorchArrays(torch.device("cpu"))]
ARRAY_IDS = ["numpy", "torch"]
both_arrays = pytest.mark.parametrize("make", ARRAYS, ids=ARRAY_IDS)

RNG = np.random.default_rng(7)


make_request = partial(engines.make_request, patch_shape=(8, 12, 16), batch_size=1, out_channels=1)


def pytorch(path, **changes):
    return Model(backend="pytorch", path=str(path), **changes)


def load(model, **changes):
    return get_backend("pytorch").load(model, make_request(**changes))


# ---- The array operations, numpy and torch alike ------------------------------------------------


@both_arrays
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float64"]
)
def test_gather_scales_exactly_and_pads_the_batch(make, dtype):
    source_czyx = RNG.integers(0, 100, (2, 6, 7, 8)).astype(dtype)
    scaling = Scaling(clip=(3, 90), subtract=2.5, divide=7)
    where = [(slice(0, 3), slice(1, 5), slice(2, 7)), (slice(3, 6), slice(3, 7), slice(0, 5))]
    arrays = make()
    for count in (2, 1):  # the second time, the buffer holds an old patch in place of the padding
        staged = arrays.stage(
            arrays.feed(source_czyx), where[:count], patch_shape=(3, 4, 5), batch_size=2
        )
        batch = arrays.gather(staged, scaling=scaling)
        raw = [source_czyx[(slice(None), *w)].astype(np.float32) for w in where[:count]]
        expected = [(np.clip(r, 3, 90) - np.float32(2.5)) / np.float32(7) for r in raw] + [
            np.zeros((2, 3, 4, 5), np.float32)
        ] * (2 - count)
        np.testing.assert_array_equal(arrays.download(batch), np.stack(expected))


@both_arrays
def test_gather_divides_instead_of_multiplying_by_the_reciprocal(make):
    source_czyx = np.arange(65536, dtype=np.uint16).reshape(1, 16, 64, 64)
    arrays = make()
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(arrays.feed(source_czyx), whole, patch_shape=(16, 64, 64), batch_size=1)
    batch = arrays.gather(staged, scaling=Scaling(divide=65535.0))
    expected = source_czyx.astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(arrays.download(batch)[0], expected)


@both_arrays
def test_upload_takes_what_numpy_makes(make):
    arrays = make()
    base = RNG.integers(0, 9, (1, 4, 5, 6)).astype(np.uint8)
    base.setflags(write=False)
    for view in (base, base[:, ::-1, ::2], np.asfortranarray(base)):
        np.testing.assert_array_equal(arrays.download(arrays.upload(view)), view)


@both_arrays
@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_activations(make, activation):
    batch = np.array([-1e30, -200.0, -3.0, 0.0, 0.5, 88.0, 1e30], np.float32)
    batch_nczyx = np.stack([batch, batch[::-1], RNG.normal(size=7).astype(np.float32)])
    batch_nczyx = batch_nczyx.reshape(1, 3, 1, 1, 7)
    with np.errstate(over="ignore"):
        exact = batch_nczyx.astype(np.float64)
        power = np.exp(exact - exact.max(axis=1, keepdims=True))
        expected = {
            "none": exact,
            "sigmoid": 1 / (1 + np.exp(-exact)),
            "softmax": power / power.sum(axis=1, keepdims=True),
        }[activation]
    arrays = make()
    before = batch_nczyx.copy()
    found = arrays.download(arrays.activate(arrays.upload(batch_nczyx), activation))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(batch_nczyx, before)


@both_arrays
def test_activation_of_a_view_that_repeats_channels(make):
    arrays = make()
    one = arrays.upload(RNG.normal(size=(1, 1, 2, 3, 4)).astype(np.float32))
    wide = one.expand(1, 3, 2, 3, 4) if isinstance(one, torch.Tensor) else one.repeat(3, axis=1)
    if isinstance(one, np.ndarray):
        wide = np.broadcast_to(one, (1, 3, 2, 3, 4))
    found = arrays.download(arrays.activate(wide, "sigmoid"))
    np.testing.assert_allclose(
        found[0, 2], 1 / (1 + np.exp(-arrays.download(one)[0, 0])), rtol=1e-6
    )


@both_arrays
def test_add_weighted(make):
    arrays = make()
    patch_czyx = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
    z, y, x = (RNG.uniform(0.1, 1, n).astype(np.float32) for n in (4, 5, 6))
    where = slice(1, 4), slice(0, 2), slice(3, 8)
    part = slice(1, 4), slice(3, 5), slice(0, 5)
    total = arrays.zeros((2, 5, 6, 9))
    for _ in range(2):
        made = arrays.window(*(arrays.vector(vector) for vector in (z, y, x)))
        arrays.add_weighted(total, where, arrays.upload(patch_czyx), part, made)
    weight_zyx = np.einsum("i,j,k->ijk", *(v.astype(np.float64) for v in (z, y, x)))
    expected = np.zeros((2, 5, 6, 9))
    expected[(slice(None), *where)] = 2 * (patch_czyx * weight_zyx)[(slice(None), *part)]
    np.testing.assert_allclose(arrays.download(total), expected, rtol=1e-6)

    again = arrays.zeros((1, 5, 6, 9))
    assert not arrays.download(again).any()


@both_arrays
def test_mask_overwrites_nan_and_finiteness_is_told(make):
    arrays = make()
    for bad in (np.nan, np.inf, -np.inf):
        values = np.ones((2, 2, 3, 4), np.float32)
        values[1, 1, 2, 3] = bad
        total = arrays.upload(values)
        flags = [arrays.is_finite(total)]
        mask_zyx = np.ones((2, 3, 4), bool)
        mask_zyx[1, 2, 3] = False
        arrays.apply_mask(total, mask_zyx)
        assert arrays.settle([*flags, arrays.is_finite(total)])() == [False, True]
        found = arrays.download(total)
        assert (found == mask_zyx).all()


HALVES = [
    # value * maximum: halves go to the even neighbour
    ("uint8", [0.5, 1.5, 2.5, 3.5, 253.5, 254.5], [0, 2, 2, 4, 254, 254]),
    ("int8", [0.5, 1.5, 2.5, 125.5, 126.5], [0, 2, 2, 126, 126]),
    ("uint16", [0.5, 1.5, 2.5, 65533.5, 65534.5], [0, 2, 2, 65534, 65534]),
    ("int16", [0.5, 1.5, 2.5, 32765.5, 32766.5], [0, 2, 2, 32766, 32766]),
]


@both_arrays
@pytest.mark.parametrize(("dtype", "halves", "expected"), HALVES, ids=[h[0] for h in HALVES])
def test_quantise_clips_and_rounds_half_to_even(make, dtype, halves, expected):
    largest = np.float32(np.iinfo(dtype).max)
    values = (np.array(halves) / float(largest)).astype(np.float32)
    # Only those whose float32 product is the half itself say anything about ties.
    ties = values * largest == np.array(halves, np.float32)
    assert ties.sum() >= 2
    values = np.concatenate([values[ties], [-5, -0.0, 0, 1, 1.5, 1e30]]).astype(np.float32)
    wanted = [*np.array(expected)[ties], 0, 0, 0, largest, largest, largest]
    arrays = make()
    found = np.empty((1, 1, 1, len(values)), dtype)
    out = arrays.outgoing(found)
    arrays.quantise(arrays.upload(values.reshape(1, 1, 1, -1).copy()), out)
    arrays.send(out, found)
    assert arrays.settle([])() == []
    np.testing.assert_array_equal(found.ravel(), wanted)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "float32"])
def test_quantise_is_the_same_in_numpy_and_torch(dtype):
    values = RNG.uniform(-0.2, 1.2, (2, 3, 20, 30)).astype(np.float32)
    results = []
    for make in ARRAYS:
        arrays = make()
        found = np.empty(values.shape, dtype)
        out = arrays.outgoing(found)
        arrays.quantise(arrays.upload(values.copy()), out)
        arrays.send(out, found)
        arrays.settle([])()
        results.append(found)
    np.testing.assert_array_equal(*results)
    assert results[0].dtype == dtype and results[0].flags.c_contiguous


# ---- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (1, 3), (3, 2), (2, 5), (2, 2)])
def test_identity_crops_and_repeats_channels_cyclically(num_in, num_out):
    request = make_request(crop=(1, 2, 3), in_channels=num_in, out_channels=num_out, batch_size=2)
    engine = get_backend("identity").load(Model(backend="identity"), request)
    batch = RNG.normal(size=(2, num_in, 8, 12, 16)).astype(np.float32)
    found = engine.infer(batch)
    assert found.shape == (2, num_out, 6, 8, 10)
    for c in range(num_out):
        np.testing.assert_array_equal(found[:, c], batch[:, c % num_in, 1:-1, 2:-2, 3:-3])
    check_engine(engine, request)


def test_identity_imports_no_torch():
    code = """
import sys
import numpy as np
from mpichunk.backends import get_backend
from mpichunk.config.schema import Model
from mpichunk.block.inference import BlockInference, check_engine, scaling_for
from mpichunk.backends.engine import EngineRequest
request = EngineRequest(patch_shape=(4, 4, 4), crop=(0, 0, 0), batch_size=1, in_channels=1,
    out_channels=1, threads=1, precision="float32", device="cpu", deterministic=True)
backend = get_backend("identity")
print(backend.probe("auto"))
check_engine(backend.load(Model(backend="identity"), request), request)
model = Model(backend="pytorch", path="mpichunk.nets.em_affinity_resunet:EmAffinityResUNet")
print(get_backend("pytorch").model_files(model))
assert not {"torch", "mpi4py", "tensorstore"} & set(sys.modules), "a heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "em_affinity_resunet.py" in done.stdout


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ModelError, match="identity, pytorch") as caught:
        get_backend("tensorflow")
    assert caught.value.key == "model.backend"


# ---- Real networks -------------------------------------------------------------------------------

REAL_NETS = [
    # name, input, scale, output
    ("em_affinity_resunet_same", "em_in", 255, "em_same_out", (0, 0, 0)),
    ("em_affinity_resunet_valid", "em_valid_in", 255, "em_valid_out", (21, 21, 21)),
    ("meshnet_gwm_5ch", "mri_in", 255, "meshnet_gwm_5ch_out", (0, 0, 0)),
    ("synapse_unet_microns1", "synapse_in", 255, "synapse_out", (0, 0, 0)),
    ("ffn_fib25_convstack", "ffn_in", 1, "ffn_out", (0, 0, 0)),
]


@pytest.mark.parametrize(("name", "source", "scale", "wanted", "crop"), REAL_NETS)
def test_real_torchscript_networks_give_the_expected_values(
    real_data, name, source, scale, wanted, crop
):
    stored = np.load(real_data / "nets" / "expected_io.npz")
    source_czyx = stored[source].reshape(-1, *stored[source].shape[-3:])
    expected = stored[wanted].reshape(-1, *stored[wanted].shape[-3:])
    request = make_request(
        patch_shape=source_czyx.shape[1:],
        crop=crop,
        in_channels=source_czyx.shape[0],
        out_channels=expected.shape[0],
    )
    model = pytorch(real_data / "nets" / f"{name}.ts.pt")
    assert get_backend("pytorch").model_files(model) == [Path(model.path)]
    engine = get_backend("pytorch").load(model, request)
    arrays = engine.arrays
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(
        arrays.feed(source_czyx), whole, patch_shape=request.patch_shape, batch_size=1
    )
    batch = arrays.gather(staged, scaling=Scaling(divide=float(scale)))
    found = arrays.download(engine.infer(batch))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_shipped_network_is_the_one_of_the_checkpoint(real_data):
    package = "mpichunk.nets.em_affinity_resunet:EmAffinityResUNet"
    shipped = Path(sys.modules["mpichunk"].__file__).parent / "nets"
    stored = np.load(real_data / "nets" / "expected_io.npz")
    batch = torch.from_numpy(stored["em_in"].astype(np.float32) / 255)[None, None]
    changes = {"patch_shape": (32, 40, 48), "out_channels": 3}
    for path, weights in (
        (package, shipped / "em_affinity_resunet.safetensors"),
        (
            f"{shipped / 'em_affinity_resunet.py'}:EmAffinityResUNet",
            real_data / "nets" / "em_affinity_resunet.state_dict.pt",
        ),
    ):
        model = pytorch(path, weights=str(weights), arguments={"padding": "same"})
        found = load(model, **changes).infer(batch)[0].numpy()
        np.testing.assert_allclose(found, stored["em_same_out"], rtol=1e-4, atol=1e-4)
        assert get_backend("pytorch").model_files(model) == [
            shipped / "em_affinity_resunet.py",
            weights,
        ]


# ---- Forms of weights ----------------------------------------------------------------------------

NET_PY = '''
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width=2, out=1):
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv3d(width, out, 1)
    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))

class Half(nn.Module):
    """Halves its grid twice: sizes are multiples of (1, 4, 4)."""
    def forward(self, x):
        small = nn.functional.avg_pool3d(x, (1, 4, 4))
        return x + nn.functional.interpolate(small, scale_factor=(1.0, 4.0, 4.0))

class Lossy(nn.Module):
    def __init__(self, lost=(2, 2, 2)):
        super().__init__()
        self.lost = lost
    def forward(self, x):
        z, y, x_ = self.lost
        return x[:, :, z:x.shape[2]-z or None, y:x.shape[3]-y or None, x_:x.shape[4]-x_ or None]

class Odd(nn.Module):
    def forward(self, x):
        return x[:, :, 1:]

class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
    def forward(self, x):
        if self.what == "error":
            raise KeyError("no such layer")
        return {
            "tuple": (x,), "list": [None, x], "dict": {"logits": x, "loss": None},
            "double": x.double(),
            "two": (x, x), "none": None, "flat": x[:, 0], "nan": x / 0 * 0, "text": "x",
            "stretched": x.expand(-1, 3, -1, -1, -1), "weights": x[:, [0, 0]],
        }[self.what]

def factory(width=2):
    return Tiny(width=width)

def not_a_network():
    return 5

def failing():
    raise FileNotFoundError("my_weights.bin")

ready = Half()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets")
    (path / "net.py").write_text(NET_PY)
    (path / "needs_missing.py").write_text("import numpy\n\nimport no_such_package\n")
    (path / "neighbour_net.py").write_text(
        "import sys\nfrom net import Tiny\nassert __name__ in sys.modules\nclass Mine(Tiny): pass\n"
    )
    (path / "broken.py").write_text("class Net(:\n")
    (path / "exits.py").write_text("raise SystemExit(3)\n")
    (path / "nothing.py").write_text("VALUE = 3\n")
    network = tiny(path)
    state = network.state_dict()
    torch.save(state, path / "plain.pt")
    save_file(state, path / "plain.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, path / "lightning.pt")
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in state.items()}}, path / "ddp.pt")
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path / "both.pt")
    old = {k: v for k, v in state.items() if "num_batches" not in k}
    torch.save(old, path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({k: v.half() for k, v in state.items()}, path / "half.pt")
    torch.save({"renamed.weight": state["first.weight"], **old}, path / "unexpected.pt")
    torch.save({k: v for k, v in old.items() if k != "last.bias"}, path / "missing.pt")
    torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, path / "no_tensors.pt")
    torch.save([1, 2], path / "list.pt")
    torch.save({"state_dict": state, "extra": Payload()}, path / "code.pt")
    torch.save(nn.Linear(1, 1), path / "whole_module.pt")
    (path / "plain_pickle.pt").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    (path / "text.pt").write_text("not a network at all")
    (path / "empty.pt").write_bytes(b"")
    (path / "bad.safetensors").write_text("not safetensors")
    whole = (path / "plain.pt").read_bytes()
    (path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.jit.script(network).save(path / "script.pt")
    script = (path / "script.pt").read_bytes()
    (path / "cut_script.pt").write_bytes(script[: len(script) // 2])
    program = torch.export.export(nn.Conv3d(1, 1, 1), (torch.zeros(1, 1, 4, 4, 4),))
    torch.export.save(program, path / "program.pt2")
    (path / "net.onnx").write_bytes(b"\x08\x07")
    return path


class Payload:
    """Stands for code in a pickle."""

    def __reduce__(self):
        return (print, ("a pickle ran code",))


def tiny(folder):
    torch.manual_seed(0)
    namespace = {}
    exec(compile(NET_PY, str(folder / "net.py"), "exec"), namespace)
    network = namespace["Tiny"]()
    network.norm.running_mean += 0.3
    network.norm.running_var *= 2
    # Scripting needs the source, which exec has: the file of that name was written before.
    return network.eval()


@pytest.mark.parametrize(
    "weights", ["plain.pt", "plain.safetensors", "lightning.pt", "ddp.pt", "both.pt", "old.pt"]
)
def test_weights_in_every_form(folder, weights):
    model = pytorch(f"{folder / 'net.py'}:Tiny", weights=str(folder / weights))
    batch = torch.from_numpy(RNG.normal(size=(1, 1, 8, 12, 16)).astype(np.float32))
    with torch.no_grad():
        expected = tiny(folder)(batch)
    torch.testing.assert_close(load(model).infer(batch), expected)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("net.py:factory", {}),
        ("net.py:Tiny", {"width": 2, "out": 1}),
        ("neighbour_net.py:Mine", {}),
        ("script.pt", {}),  # weights of a file replace those that TorchScript holds
    ],
)
def test_forms_of_networks(folder, path, arguments):
    model = pytorch(folder / path, weights=str(folder / "half.pt"), arguments=arguments)
    engine = load(model, batch_size=2)
    batch = torch.from_numpy(RNG.normal(size=(2, 1, 8, 12, 16)).astype(np.float32))
    with torch.no_grad():
        expected = tiny(folder)(batch)
    torch.testing.assert_close(engine.infer(batch), expected, rtol=1e-2, atol=1e-2)
    assert not list(folder.rglob("__pycache__/net*mpichunk*"))
    check_engine(engine, make_request(batch_size=2))
    assert engine.info.backend == "pytorch" and engine.info.threads == 1


def test_importable_module(folder, monkeypatch):
    package = folder / "labnets" / "inner"
    package.mkdir(parents=True)
    # A parent package that cannot be imported proves that finding the files imports nothing.
    (folder / "labnets" / "__init__.py").write_text("import os\nPARENT = 1\n")
    (package / "unet.py").write_text(NET_PY)  # in a namespace package, without __init__.py
    monkeypatch.syspath_prepend(folder)
    model = pytorch("labnets.inner.unet:Half")
    assert get_backend("pytorch").model_files(model) == [package / "unet.py"]
    assert "labnets" not in sys.modules
    check_engine(load(model), make_request())
    with pytest.raises(ModelError, match=r"no module 'labnets\.other'") as caught:
        load(pytorch("labnets.other:Net"))
    assert caught.value.key == "model.path"


# ---- Bad models: which key, which words --------------------------------------------------------

TINY = "net.py:Tiny"
BAD_MODELS = [
    # path, weights, arguments, key, words of the message
    (None, None, {}, "model.path", ["needs model.path", "TorchScript"]),
    ("absent.pt", None, {}, "model.path", ["absent.pt", "does not exist"]),
    ("absent.py:Net", None, {}, "model.path", ["absent.py", "does not exist"]),
    (".", None, {}, "model.path", ["is a directory"]),
    ("net.py", None, {}, "model.path", ["net.py:Name"]),
    ("text.pt", None, {}, "model.path", ["text.pt", "not a TorchScript file"]),
    ("empty.pt", None, {}, "model.path", ["not a TorchScript file"]),
    ("cut_script.pt", None, {}, "model.path", ["cut short"]),
    ("plain.pt", None, {}, "model.path", ["checkpoint", "model.weights"]),
    ("plain.safetensors", None, {}, "model.path", ["weights only", "model.weights"]),
    ("program.pt2", None, {}, "patch.shape", ["patches of [4, 4, 4] only", "dynamic axes"]),
    ("net.onnx", None, {}, "model.path", ["no network of torch", "onnxruntime or openvino"]),
    (
        "net.py:Tinny",
        "plain.pt",
        {},
        "model.path",
        ["no network 'Tinny'", "Tiny", "factory"],
    ),
    ("nothing.py:Net", None, {}, "model.path", ["no network 'Net'", "no class or function"]),
    ("needs_missing.py:Net", None, {}, "model.path", ["needs_missing.py:3", "no_such_package"]),
    ("broken.py:Net", None, {}, "model.path", ["broken.py:1", "SyntaxError"]),
    ("exits.py:Net", None, {}, "model.path", ["SystemExit"]),
    ("net.py:not_a_network", None, {}, "model.path", ["makes a int", "torch.nn.Module"]),
    ("net.py:failing", None, {}, "model.arguments", ["net.py:", "my_weights.bin"]),
    (TINY, "plain.pt", {"widht": 3}, "model.arguments", ["widht"]),
    (TINY, "absent.pt", {}, "model.weights", ["absent.pt", "does not exist"]),
    (TINY, "text.pt", {}, "model.weights", ["text.pt", "not a checkpoint"]),
    (TINY, "empty.pt", {}, "model.weights", ["empty.pt", "no weights that can be read"]),
    (TINY, "cut.pt", {}, "model.weights", ["cut.pt", "no weights that can be read"]),
    (TINY, "bad.safetensors", {}, "model.weights", ["bad.safetensors", "no weights"]),
    (TINY, "script.pt", {}, "model.weights", ["TorchScript belongs in model.path"]),
    (TINY, "code.pt", {}, "model.weights", ["code.pt", "would run print"]),
    (TINY, "plain_pickle.pt", {}, "model.weights", ["would run print"]),
    (TINY, "whole_module.pt", {}, "model.weights", ["would run torch.nn.modules.linear.Linear"]),
    (TINY, "missing.pt", {}, "model.weights", ["1 names", "missing, first 'last.bias'"]),
    (TINY, "unexpected.pt", {}, "model.weights", ["unknown to it, first 'renamed.weight'"]),
    (TINY, "plain.pt", {"width": 3}, "model.weights", ["'first.weight': (2, 1, 3, 3, 3), not (3,"]),
    (TINY, "no_tensors.pt", {}, "model.weights", ["keys optimizer, epoch", "state_dict"]),
    (TINY, "list.pt", {}, "model.weights", ["holds a list"]),
    ("script.pt", None, {"width": 3}, "model.arguments", ["remove model.arguments"]),
]


@pytest.mark.parametrize(("path", "weights", "arguments", "key", "words"), BAD_MODELS)
def test_bad_model_is_one_message_with_its_key(folder, capfd, path, weights, arguments, key, words):
    model = Model.model_construct(
        backend="pytorch",
        path=path and str(folder / path),
        weights=weights and str(folder / weights),
        arguments=arguments,
    )
    with pytest.raises(ModelError) as caught:
        load(model)
    message = str(caught.value)
    assert caught.value.key == key, message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "ran code" not in "".join(capfd.readouterr())


def test_a_network_without_weights_is_refused_when_its_values_are_random(folder):
    with pytest.raises(ModelError, match="are random") as caught:
        load(pytorch(folder / TINY))
    assert caught.value.key == "model.weights"
    load(pytorch(folder / "net.py:Half"))  # has none to set


def test_missing_files_are_told_before_torch_is_imported(folder):
    for model in (
        pytorch(folder / "absent.pt"),
        pytorch(folder / TINY, weights=str(folder / "absent.pt")),
    ):
        with pytest.raises(ModelError, match="does not exist"):
            get_backend("pytorch").model_files(model)


# ---- What networks return ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tuple", "list", "dict", "double"])
def test_the_only_tensor_is_taken(folder, what):
    engine = load(pytorch(folder / "net.py:Returns", arguments={"what": what}), crop=(1, 2, 3))
    batch = torch.rand(1, 1, 8, 12, 16)
    found = engine.infer(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch[:, :, 1:-1, 2:-2, 3:-3])


BAD_OUTPUTS = [
    ("Returns", {"what": "two"}, {}, "model.path", ["a tuple with 2 tensors", "wrap it"]),
    ("Returns", {"what": "none"}, {}, "model.path", ["a NoneType"]),
    ("Returns", {"what": "text"}, {}, "model.path", ["a str"]),
    ("Returns", {"what": "flat"}, {}, "model.path", ["shape (1, 8, 12, 16)", "(1, 1, z, y, x)"]),
    ("Returns", {"what": "error"}, {}, "model.path", ["net.py:", "KeyError", "no such layer"]),
    ("Returns", {"what": "nan"}, {}, "model.weights", ["NaN or inf"]),
    (
        "Returns",
        {"what": "stretched"},
        {"out_channels": 2},
        "model.out_channels",
        ["returned 3 channels", "is 2", "set it to 3"],
    ),
    ("Lossy", {}, {}, "patch.crop", ["(4, 8, 12)", "set patch.crop: [2, 2, 2]"]),
    ("Lossy", {}, {"crop": (1, 2, 2)}, "patch.crop", ["[1, 2, 2]", "set patch.crop: [2, 2, 2]"]),
    ("Odd", {}, {}, "patch.crop", ["(7, 12, 16)", "no patch.crop fits"]),
    (
        "Half",
        {},
        {"patch_shape": (5, 18, 16)},
        "patch.shape",
        ["multiples of [1, 4, 4]", "[5, 16, 16] or [5, 20, 16]"],
    ),
]


@pytest.mark.parametrize(("name", "arguments", "changes", "key", "words"), BAD_OUTPUTS)
def test_bad_output_is_found_before_any_block(folder, name, arguments, changes, key, words):
    model = pytorch(f"{folder / 'net.py'}:{name}", arguments=arguments)
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    message = str(caught.value)
    assert caught.value.key == key, message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_wrong_number_of_input_channels_is_named(folder):
    request = make_request(in_channels=2)
    for path, weights in ((TINY, str(folder / "plain.pt")), ("script.pt", None)):
        engine = load(pytorch(folder / path, weights=weights), in_channels=2)
        with pytest.raises(ModelError, match="takes 1 input channels, but the input has 2"):
            check_engine(engine, request)


def test_memory_and_determinism_have_their_own_keys():
    engine = TorchEngine(nn.Identity(), make_request())
    error = engine.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"))
    assert error.key == "patch.batch_size" and "out of memory" in str(error)
    error = engine.explain(
        RuntimeError("max_pool does not have a deterministic implementation, but you set ...")
    )
    assert error.key == "compute.deterministic"


def test_a_network_that_has_cut_its_border_is_taken_as_it_is(folder):
    engine = load(pytorch(folder / "net.py:Lossy"), crop=(2, 2, 2))
    batch = torch.rand(1, 1, 8, 12, 16)
    torch.testing.assert_close(engine.infer(batch), batch[:, :, 2:-2, 2:-2, 2:-2])


@pytest.mark.parametrize("crop", [(0, 0, 0), (21, 21, 21)])
def test_real_valid_network_names_its_crop_and_the_sizes_without_a_shift(real_data, crop):
    # Of 52 voxels it drops the last two: a crop of 22 would fit the numbers and shift the image.
    model = pytorch(real_data / "nets" / "em_affinity_resunet_valid.ts.pt")
    changes = {"patch_shape": (52, 50, 53), "out_channels": 3, "crop": crop}
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    assert caught.value.key == "patch.crop"
    assert "set patch.shape: [50, 50, 50] and patch.crop: [21, 21, 21]" in str(caught.value)


def test_real_same_network_names_its_multiples(real_data):
    model = pytorch(real_data / "nets" / "em_affinity_resunet_same.ts.pt")
    changes = {"patch_shape": (20, 30, 32), "out_channels": 3}
    with pytest.raises(ModelError) as caught:
        check_engine(load(model, **changes), make_request(**changes))
    assert caught.value.key == "patch.shape"
    assert "takes multiples of [4, 4, 4]" in str(caught.value)
    assert "[20, 28, 32] or [20, 32, 32]" in str(caught.value)


@pytest.mark.parametrize(
    ("multiples", "remainders", "shape", "words"),
    [
        ((1, 16, 16), (0, 0, 0), (20, 250, 256), "to [20, 240, 256] or [20, 256, 256]"),
        ((4, 4, 4), (2, 2, 2), (64, 66, 66), "to [62, 66, 66] or [66, 66, 66]"),
        ((8, 8, 8), (0, 0, 0), (4, 8, 8), "to [8, 8, 8]"),
        ((64, 64, 64), (0, 0, 0), (65, 65, 65), ""),
    ],
)
def test_size_advice(multiples, remainders, shape, words):
    tried = []

    def accepts(candidate):
        tried.append(candidate)
        return all(n % m == r for n, m, r in zip(candidate, multiples, remainders, strict=True))

    advice = size_advice(accepts, shape)
    if words:
        assert advice.endswith(words), advice
    assert len(tried) <= 26 and max(max(t) for t in tried) <= 64 + 7 + 32
    assert not size_advice(lambda _: False, shape)
    assert not size_advice(lambda _: True, shape)


# ---- Settings ------------------------------------------------------------------------------------


def test_threads_also_count_on_other_threads():
    before = torch.get_num_threads()
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            assert torch.is_inference_mode_enabled() and not self.training
            return x

    request = make_request(threads=2)
    try:
        prepare_torch(request)
        engine = TorchEngine(Looks().eval(), request)
        thread = threading.Thread(target=engine.infer, args=(torch.zeros(1, 1, 8, 12, 16),))
        thread.start()
        thread.join()
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_a_device_that_torch_cannot_use_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    for device in ("cuda:0", "nonsense"):
        with pytest.raises(DeviceError, match=f"cannot use the device '{device}'") as caught:
            prepare_torch(make_request(device=device))
        assert caught.value.key == "compute.device"


def test_cpu_kind_reads_the_instruction_set(tmp_path):
    cases = {
        "flags\t\t: fpu avx2 fma avx512f avx512vl avx512bw avx512dq": "cpu AVX512",
        "flags : fpu avx2 fma avx512f": "cpu AVX2",
    }
    for text, expected in cases.items():
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
        assert devices.cpu_kind(tmp_path / "cpuinfo") == expected
    assert devices.cpu_kind(tmp_path / "absent").startswith("cpu ")


def test_probe_of_this_machine():
    probe = devices.probe_devices("cpu")
    assert probe.accelerators == ()
    assert probe.cpu_kind == f"cpu {torch.backends.cpu.get_cpu_capability()}"
    assert torch.__version__ in probe.note
    assert bool(devices.probe_devices().accelerators) == torch.accelerator.is_available()


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"uuid": "a1b2-77"}, "a1b2-77"),
        ({"uuid": "00-0", "pci_domain_id": 1, "pci_bus_id": 59, "pci_device_id": 0}, "0001:3b:00"),
        ({"pci_bus_id": 2, "pci_device_id": 31}, "0000:02:1f"),
        ({}, "cuda:1"),
    ],
)
def test_physical_id_is_uuid_then_pci_address(properties, expected):
    cuda = types.SimpleNamespace(
        get_device_properties=lambda index: types.SimpleNamespace(**properties),
        get_device_name=lambda index: f"model {index}",
    )
    fake_torch = types.SimpleNamespace(cuda=cuda)
    found = devices._accelerator(fake_torch, "cuda", 1)
    assert (found.kind, found.index, found.name) == ("cuda", 1, "model 1")
    assert found.physical_id == expected
    assert devices._physical_id(fake_torch, "mps", 0) == "mps:0"
