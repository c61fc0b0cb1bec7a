"""Precision and kernels on the CPU: what they change, what they must not, and what is refused.

What only an accelerator can do stands in test_device.
"""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpichunk.backends import get_backend
from mpichunk.backends.torch_engine import TorchEngine
from mpichunk.backends.torch_network import load_network
from mpichunk.block.inference import check_engine
from mpichunk.config.checks import check
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config, Model
from mpichunk.errors import DeviceError, ModelError
from mpichunk.job.startup import fingerprint_of, prepare
from mpichunk.plan.fingerprint import differences
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.run import run_on
from tests.endtoend import read_volume, start_lines, write_config
from tests.engines import make_request
from tests.launch import REPOSITORY
from tests.realnets import EM_CODE, EM_WEIGHTS, NETS, PATCHES, network, scaled
from tests.test_torch_forms import export, make_net

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = {"bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference allowed, of values in [0, 1]."""


BATCH = torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def forms(folder: Path) -> dict[str, nn.Module]:
    """Return one network as all that torch loads."""
    net = make_net()
    model = Model(backend="pytorch", path=str(export(net, folder / "net.pt2")), out_channels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Through a file: what was scripted in one process shares its graph, which runs alter.
        torch.jit.script(nn.Sequential(*make_net().children())).save(folder / "net.ts")
        script = torch.jit.load(folder / "net.ts").eval()
    return {"module": net, "script": script, "exported": load_network(model, make_request())}


# ---- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", HALVES)
def test_halves_act_on_every_form_and_come_out_as_float32(tmp_path, precision):
    with torch.no_grad():
        expected = make_net()(BATCH)
    for name, net in forms(tmp_path).items():
        engine = TorchEngine(net, make_request(precision=precision))
        found = engine.infer(BATCH)
        assert found.dtype == torch.float32, name
        assert not torch.equal(found, expected), name
        torch.testing.assert_close(found, expected, atol=HALVES[precision], rtol=0)
        assert torch.equal(found, engine.infer(BATCH)), name
        assert engine.info.precision == precision


def test_half_precision_without_effect_is_refused():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, 2 * x], 1)

    assert TorchEngine(Twice(), make_request()).info.precision == "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(make_net(), BATCH)
    for net, why in ((Twice(), "no convolution"), (traced, "made by tracing")):
        with pytest.raises(ModelError, match=f"computes in bfloat16 on cpu: .*{why}") as caught:
            TorchEngine(net, make_request(precision="bfloat16"))
        assert caught.value.key == "compute.precision"


def test_values_that_float16_cannot_hold_are_told_as_such():
    class Large(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + 1e6 * super().forward(x)

    net = Large(1, 2, 1).eval()
    asked = make_request(precision="float16")
    with pytest.raises(ModelError, match="above 65504") as caught:
        check_engine(TorchEngine(net, asked), asked)
    assert caught.value.key == "compute.precision"


def test_engines_of_two_precisions_in_one_process_do_not_meet():
    exact, half = (
        TorchEngine(make_net(), make_request(precision=name)) for name in ("float32", "bfloat16")
    )
    first = exact.infer(BATCH).clone()
    half.infer(BATCH)
    assert torch.equal(exact.infer(BATCH), first)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"precision": "tf32"}, "compute.precision"),
        ({"kernels": ("cuda_graphs",)}, "compute.cuda_graphs"),
    ],
)
def test_what_only_nvidia_devices_have_is_refused_on_a_cpu(tmp_path, changes, key):
    path = export(make_net(), tmp_path / "net.pt2")
    model = Model(backend="pytorch", path=str(path), out_channels=2)
    with pytest.raises(DeviceError, match="NVIDIA") as caught:
        get_backend("pytorch").load(model, make_request(**changes))
    assert caught.value.key == key


def test_threads_are_those_that_torch_has():
    engine = TorchEngine(make_net(), make_request(threads=2))
    torch.set_num_threads(1)
    assert engine.info.threads == 2


def test_a_run_in_half_precision(tmp_path):
    sections = {
        "input": {"volume": "synthetic://membranes?shape=16,40,40&seed=3"},
        "model": {
            "backend": "pytorch",
            "path": f"{EM_CODE}:EmAffinityResUNet",
            "weights": str(EM_WEIGHTS),
            "out_channels": 3,
        },
        "patch": {"shape": [16, 32, 32], "overlap": [4, 8, 8]},
        "block": {"shape": [16, 40, 40]},
    }
    outputs = {}
    for precision in ("float32", "bfloat16"):
        path = write_config(
            tmp_path,
            name=f"{precision}.yaml",
            **sections,
            output={"volume": f"{precision}.zarr"},
            compute={"precision": precision, "threads": 1, "device": "cpu"},
        )
        assert run_on(SerialCommunicator(), path) == 0
        outputs[precision] = read_volume(tmp_path / f"{precision}.zarr")
    assert outputs["bfloat16"].dtype == np.float32
    difference = np.abs(outputs["bfloat16"] - outputs["float32"])
    assert 0 < difference.mean() < 5e-3
    assert difference.max() < 0.1
    (start,) = start_lines(tmp_path / "runs/bfloat16")
    assert (start["engine"]["precision"], start["engine"]["threads"]) == ("bfloat16", 1)


# ---- Memory layout -------------------------------------------------------------------------------


def test_channels_last_gives_the_same_values(tmp_path):
    with torch.no_grad():
        expected = make_net()(BATCH)
    asked = make_request(kernels=("channels_last",))
    for net in forms(tmp_path).values():
        engine = TorchEngine(net, asked)
        found = engine.infer(BATCH)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert engine.arrays.download(found).flags.c_contiguous
        assert engine.info.kernels == ("channels_last",)
        check_engine(engine, asked)


def test_channels_last_without_effect_is_refused():
    with pytest.raises(ModelError, match="no 3D convolution") as caught:
        TorchEngine(nn.Sequential(nn.ReLU()), make_request(kernels=("channels_last",)))
    assert caught.value.key == "compute.channels_last"


# ---- Folding -------------------------------------------------------------------------------------


def norms_of(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm3d) for module in network.modules())


def fold(network: nn.Module, **changes) -> TorchEngine:
    return TorchEngine(network, make_request(kernels=("fold_batch_norm",), **changes))


@pytest.mark.parametrize("form", ["module", "script"])
def test_folding_changes_nothing_but_rounding(tmp_path, form):
    net = forms(tmp_path)[form]
    with torch.no_grad():
        expected = make_net()(BATCH)
    torch.testing.assert_close(fold(net).infer(BATCH), expected, atol=1e-5, rtol=0)
    if form == "module":
        assert norms_of(net) == 0


@pytest.mark.parametrize(
    ("name", "num_left"),
    [
        ("em_affinity_resunet_same", 0),
        ("em_affinity_resunet_valid", 0),
        # The others follow a sum, which no convolution can take in.
        ("synapse_unet_microns1", 7),
    ],
)
@pytest.mark.parametrize("form", ["module", "script"])
def test_published_networks_are_the_same_when_folded(real_data, name, num_left, form):
    nets = real_data / "nets"
    with np.load(nets / "expected_io.npz") as stored:
        image, expected = scaled(stored, name)

    def make() -> nn.Module:
        path = nets / f"{name}.ts.pt"
        return torch.jit.load(path).eval() if form == "script" else network(name, nets)

    asked = {
        "patch_shape": PATCHES[name][1:],
        "crop": (NETS[name][3],) * 3,
        "batch_size": 1,
        "out_channels": len(expected),
    }
    batch_nczyx = torch.from_numpy(image)
    plain = TorchEngine(make(), make_request(**asked)).infer(batch_nczyx)
    net = make()
    found = fold(net, **asked).infer(batch_nczyx)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    if form == "module":
        assert norms_of(net) == num_left


class Branch(nn.Module):
    """Looks at values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.max() > 0 else x


class Twice(nn.Module):
    """Uses what a convolution returns twice: it must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm3d(2)
        self.norm.running_var *= 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Hidden(nn.Module):
    """Takes another way while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net.norm(self.net.first(x))
        return y if isinstance(x, torch.fx.Proxy) else y + self.net.first(x)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Branch(), "torch.fx cannot follow"),
        (Twice(), "follows a convolution directly"),
        (nn.Conv3d(1, 2, 3, padding=1), "follows a convolution directly"),
        (Hidden(), "differs by"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(network, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        fold(network.eval())
    assert caught.value.key == "compute.fold_batch_norm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Conv3d(1, 2, 3, padding=1).eval(), BATCH)
    with pytest.raises(ModelError, match="no batch norm"):
        fold(script)


def test_an_exported_network_is_not_folded(tmp_path):
    with pytest.raises(ModelError, match="list of operations"):
        fold(forms(tmp_path)["exported"])


def test_a_network_that_does_not_run_is_explained_though_it_is_to_be_folded():
    with pytest.raises(ModelError, match="takes 1 input channels, but the input has 2"):
        fold(make_net(), in_channels=2)


# ---- Compiling -----------------------------------------------------------------------------------

COMPILE = """
import sys, torch
from torch import nn
from mpichunk.backends.torch_engine import TorchEngine
from mpichunk.errors import ModelError
from tests.engines import make_request
from tests.test_kernels import BATCH
net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Sigmoid()).eval()
engine = TorchEngine(net, make_request(kernels=("compile",)))
try:
    found = engine.infer(BATCH).clone()
    with torch.no_grad():
        torch.testing.assert_close(found, net(BATCH), atol=1e-5, rtol=0)
    assert torch.equal(found, engine.infer(BATCH))
except ModelError as error:
    sys.exit(f"{error.key}: {error}")
print(engine.info.kernels)
"""


def compile_in_process(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        cwd=REPOSITORY,
        env={
            "HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            # Pays for many kernels; here there is one.
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_compiled_network_is_the_same(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no compiler and headers of Python: no g++")
    done = compile_in_process(tmp_path, PATH=str(Path(shutil.which("g++")).parent))
    assert (done.returncode, done.stdout) == (0, "('compile',)\n"), done.stderr


def test_without_a_compiler_one_message_says_so(tmp_path):
    done = compile_in_process(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("compute.compile: torch ")
    assert "it needs a C++ compiler" in last and "compute.compile: false" in last


def test_what_torch_compile_would_leave_as_it_is_is_refused(tmp_path):
    with pytest.raises(ModelError, match="TorchScript") as caught:
        TorchEngine(forms(tmp_path)["script"], make_request(kernels=("compile",)))
    assert caught.value.key == "compute.compile"


# ---- Config --------------------------------------------------------------------------------------


def config(backend: str = "pytorch", path: str | None = "net.py:Net", **compute) -> Config | list:
    options = compute.pop("options", {})
    return check(
        {
            "input": {"volume": "in.zarr"},
            "model": {"backend": backend, "path": path, "options": options},
            "patch": {"shape": [8, 8, 8]},
            "block": {"shape": [16, 16, 16]},
            "output": {"volume": "out.zarr"},
            "compute": compute,
            "run_dir": "run",
        }
    )


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_what_may_be_asked_for(device):
    names = {"compile": True, "channels_last": True, "fold_batch_norm": True, "cuda_graphs": True}
    found = config(precision="tf32", device=device, **names)
    assert isinstance(found, Config)
    assert found.compute.kernels == tuple(names)
    assert isinstance(config("openvino", "net.onnx", precision="bfloat16"), Config)
    same = config(
        "openvino",
        "net.onnx",
        precision="bfloat16",
        options={"INFERENCE_PRECISION_HINT": "bf16"},
    )
    assert isinstance(same, Config)


@pytest.mark.parametrize(
    ("key", "words", "asked"),
    [
        ("compute.precision", "float32 only", {"backend": "identity", "precision": "bfloat16"}),
        ("compute.precision", "float32 only", {"backend": "pznet", "precision": "float16"}),
        ("compute.precision", "ONNX file", {"backend": "onnxruntime", "precision": "bfloat16"}),
        ("compute.precision", "runs on the CPU", {"backend": "openvino", "precision": "tf32"}),
        ("compute.precision", "NVIDIA", {"precision": "tf32", "device": "cpu"}),
        ("compute.precision", "NVIDIA", {"precision": "tf32", "device": "xpu:0"}),
        ("compute.cuda_graphs", "NVIDIA", {"cuda_graphs": True, "device": "cpu"}),
        ("compute.compile", "pytorch backend only", {"backend": "openvino", "compile": True}),
        ("compute.channels_last", "only", {"backend": "onnxruntime", "channels_last": True}),
        ("compute.cuda_graphs", "only", {"backend": "identity", "cuda_graphs": True}),
        ("compute.fold_batch_norm", "only", {"backend": "pznet", "fold_batch_norm": True}),
        ("compute.fold_batch_norm", "operations", {"path": "net.pt2", "fold_batch_norm": True}),
        ("model.options", "compute.channels_last", {"options": {"channels_last": True}}),
        (
            "model.options",
            "set compute.precision: bfloat16",
            {"backend": "openvino", "options": {"INFERENCE_PRECISION_HINT": "bf16"}},
        ),
        (
            "model.options",
            "contradicts compute.precision 'bfloat16'",
            {
                "backend": "openvino",
                "precision": "bfloat16",
                "options": {"INFERENCE_PRECISION_HINT": "f32"},
            },
        ),
    ],
)
def test_what_names_alone_tell_to_be_impossible_is_refused_by_the_config(key, words, asked):
    paths = {"identity": None, "onnxruntime": "net.onnx", "pznet": "net"}
    found = config(**{"path": paths.get(asked.get("backend"), "net.py:Net")} | asked)
    assert isinstance(found, list)
    assert [problem.key for problem in found] == [key]
    assert words in found[0].message


@pytest.mark.parametrize("name", ["compile", "channels_last", "fold_batch_norm", "cuda_graphs"])
def test_what_changes_bytes_enters_the_fingerprint_and_defaults_leave_it_as_it_was(tmp_path, name):
    sections = {
        "input": {"volume": "synthetic://membranes?shape=16,16,16&seed=3"},
        "model": {"backend": "pytorch", "path": f"{EM_CODE}:EmAffinityResUNet"},
        "patch": {"shape": [8, 8, 8]},
        "block": {"shape": [16, 16, 16]},
        "output": {"volume": "out.zarr"},
    }
    path = write_config(tmp_path, **sections)

    def parts(*overrides: str):
        job = prepare(load_config(path, overrides).config)
        return fingerprint_of(job, device_kinds=["cpu"], threads=1)

    plain = parts()
    assert {key for key in plain if key.startswith("compute.")} == {
        "compute.device_kind",
        "compute.precision",
        "compute.threads",
        "compute.deterministic",
    }
    assert parts(f"compute.{name}=false") == plain
    assert differences(plain, parts(f"compute.{name}=true")) == [
        f"compute.{name}: default then, true now"
    ]
    assert differences(plain, parts("compute.precision=bfloat16")) == [
        'compute.precision: "float32" then, "bfloat16" now'
    ]
