"""Kernels on the CPU: what they change, what they must not, and what is refused.

What only an accelerator can do stands in test_device.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.block.inference import check_engine
from mpichunk.config.checks import check
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.errors import ModelError
from mpichunk.job.startup import fingerprint_of, prepare
from mpichunk.plan.fingerprint import differences
from tests.endtoend import write_config
from tests.engines import make_request
from tests.launch import REPOSITORY
from tests.realnets import EM_CODE
from tests.torchnet import BATCH, forms, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- Compiling -----------------------------------------------------------------------------------

COMPILE = """
import sys, torch
from torch import nn
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.errors import ModelError
from tests.engines import make_request
from tests.torchnet import BATCH
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


def compile_in_process(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        cwd=REPOSITORY,
        env={
            "HOME": str(home),
            "TORCHINDUCTOR_CACHE_DIR": str(home),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_compiled_network_is_the_same(tmp_path, inductor):
    path = str(Path(shutil.which("g++")).parent)
    done = compile_in_process(tmp_path, PATH=path, **inductor)
    assert (done.returncode, done.stdout) == (0, "('compile',)\n"), done.stderr


def test_without_a_compiler_one_message_says_so(tmp_path):
    done = compile_in_process(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("compute.compile: torch ")
    assert "it requires a C++ compiler" in last and "compute.compile: false" in last


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
