"""What the openvino backend has of its own: its settings, its files, networks of torch in it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mpichunk.errors import DeviceError, ModelError
from tests import onnx_maker
from tests.endtoend import files_of, read_volume, start_lines, write_config
from tests.onnx_engines import BATCH, load
from tests.optional import need


def test_openvino_settings_can_be_overridden_and_are_reported(tmp_path):
    path = onnx_maker.convolution(tmp_path / "net.onnx")
    engine = load("openvino", path, changes={"threads": 2}, options={"NUM_STREAMS": 2})
    assert engine._compiled.get_property("NUM_STREAMS") == 2
    engine = load("openvino", path)
    assert engine._compiled.get_property("NUM_STREAMS") == 1
    assert engine._compiled.get_property("ENABLE_CPU_PINNING") is False
    with pytest.raises(ModelError, match="cannot be compiled by openvino") as caught:
        load("openvino", path, options={"NO_SUCH_SETTING": 1})
    assert caught.value.key == "model.options"


def test_openvino_takes_the_weights_that_an_option_names(tmp_path):
    (tmp_path / "lab_net.py").write_text(
        "from torch import nn\ndef net(): return nn.Conv3d(1, 2, 1, bias=False)\n"
    )
    weight = torch.tensor(onnx_maker.SCALES).reshape(2, 1, 1, 1, 1)
    torch.save({"state_dict": {"weight": -weight}, "ema": {"weight": weight}}, tmp_path / "w.pt")
    engine = load(
        "openvino",
        f"{tmp_path}/lab_net.py:net",
        weights=str(tmp_path / "w.pt"),
        options={"weights_key": "ema", "NUM_STREAMS": 1},
    )
    np.testing.assert_allclose(engine.infer(BATCH)[:, 1], -3 * BATCH[:, 0], rtol=1e-6)


def test_openvino_file_that_is_cut_short(tmp_path):
    need("openvino")
    import openvino

    network = openvino.Core().read_model(onnx_maker.convolution(tmp_path / "net.onnx", cut=True))
    openvino.serialize(network, tmp_path / "net.xml")
    load("openvino", tmp_path / "net.xml", changes={"crop": (1, 1, 1)})
    for name in ("net.bin", "net.xml"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match=r"net\.xml .*openvino") as caught:
            load("openvino", tmp_path / "net.xml", changes={"crop": (1, 1, 1)})
        assert caught.value.key == "model.path"
        (tmp_path / name).write_bytes(whole)


OVERLAPPING = """
import os, signal, sys
from tests.test_openvino import load
engines = [load("openvino", sys.argv[1], changes={"crop": (1, 1, 1)}) for _ in range(2)]
while engines:
    del engines[0]
signal.signal(signal.SIGUSR1, lambda number, frame: print("seen"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_is_survived_after_networks_whose_lives_overlapped(tmp_path, python):
    need("openvino")
    path = onnx_maker.convolution(tmp_path / "net.onnx", cut=True)
    done = python("-c", OVERLAPPING, path)
    assert (done.returncode, done.stdout) == (0, "seen\n"), done.stderr


def test_openvino_computes_in_bfloat16_only_where_the_cpu_can(tmp_path):
    need("openvino")
    import openvino

    path = onnx_maker.convolution(tmp_path / "net.onnx")
    changes = {"precision": "bfloat16"}
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        engine = load("openvino", path, changes=changes)
        assert engine.info.precision == "bfloat16"
        np.testing.assert_allclose(engine.infer(BATCH)[:, 0], 2 * BATCH[:, 0], rtol=1e-2)
        return
    with pytest.raises(DeviceError, match="does not support bfloat16") as caught:
        load("openvino", path, changes=changes)
    assert caught.value.key == "compute.precision"


def test_openvino_does_not_report_its_use():
    need("openvino")
    code = """
import sys
from mpichunk.backends.openvino.model import import_openvino
import_openvino()
assert sys.modules["openvino_telemetry"] is None, "it would send events"
import openvino
openvino.convert_model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- Networks of torch in openvino ---------------------------------------------------------------

NET_PY = """
import numpy as np
import torch
from torch import nn

class Half(nn.Module):
    def forward(self, x):
        small = nn.functional.avg_pool3d(x, (1, 4, 4))
        large = x + nn.functional.interpolate(small, scale_factor=(1.0, 4.0, 4.0))
        return torch.cat([large, -large], dim=1)

class Outside(nn.Module):
    def forward(self, x):
        peak = float(np.asarray(x.detach()).max())
        mean = torch.from_numpy(np.asarray(x.detach()).mean(axis=(2, 3, 4), keepdims=True))
        return torch.cat([x - mean, x / peak], dim=1)

class Unknown(nn.Module):
    def forward(self, x):
        return torch.cat([torch.special.bessel_j0(x), x], dim=1)

def pre_process(patch):
    return torch.from_numpy(patch)

InstantiatedModel = Half()
"""


def test_a_network_of_torch_is_converted(tmp_path):
    (tmp_path / "lab_net.py").write_text(NET_PY)
    engine = load("openvino", f"{tmp_path}/lab_net.py:Half")
    small = nn.functional.avg_pool3d(torch.from_numpy(BATCH), (1, 4, 4))
    large = BATCH + nn.functional.interpolate(small, scale_factor=(1.0, 4.0, 4.0)).numpy()
    np.testing.assert_allclose(engine.infer(BATCH)[:, :1], large, rtol=1e-5)
    np.testing.assert_allclose(engine.infer(BATCH[:1])[:, 1:], -large[:1], rtol=1e-5)


BAD_CONVERSIONS = [
    ("Half", {"patch_shape": (4, 10, 12)}, "patch.shape", "multiples of [1, 4, 4]"),
    ("Half", {"out_channels": 1}, "model.out_channels", "set it to 2"),
    ("Unknown", {}, "model.backend", "cannot convert the network"),
    ("InstantiatedModel", {}, "model.backend", "computes outside torch"),
    # What numpy computed while the network was traced would be the same for every patch.
    ("Outside", {}, "model.backend", "set model.backend: pytorch"),
]


@pytest.mark.parametrize(("name", "changes", "key", "words"), BAD_CONVERSIONS)
def test_a_network_that_cannot_be_converted_is_refused(tmp_path, name, changes, key, words):
    (tmp_path / "lab_net.py").write_text(NET_PY)
    with pytest.raises(ModelError) as caught:
        load("openvino", f"{tmp_path}/lab_net.py:{name}", changes=changes)
    assert caught.value.key == key, str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_rank_converts_for_all_and_the_others_import_no_torch(tmp_path, mpirun):
    need("openvino")
    (tmp_path / "lab_net.py").write_text(
        f"import os\nopen({str(tmp_path / 'imported')!r} + str(os.getpid()), 'w')\n{NET_PY}"
    )
    config = tmp_path / "config.yaml"
    write_config(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=8,48,48"},
        model={"backend": "openvino", "path": "lab_net.py:Half", "out_channels": 2},
        patch={"shape": [4, 16, 16]},
        block={"shape": [8, 24, 24]},
        output={"volume": "out.zarr"},
        compute={"threads": 1},
    )
    done = mpirun(3, "-m", "mpichunk", "run", config)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("imported*"))) == 1
    engine = start_lines(tmp_path / "runs" / "config")[0]["engine"]
    assert (engine["backend"], engine["precision"], engine["threads"]) == ("openvino", "float32", 1)
    # The same on one rank: what was broadcast is what is converted.
    alone = tmp_path / "alone"
    done = mpirun(1, "-m", "mpichunk", "run", config, "--set", f"output.volume={alone}.zarr",
                  "--set", f"run_dir={alone}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out.zarr") == files_of(tmp_path / "alone.zarr")
    assert read_volume(tmp_path / "out.zarr").std() > 0.1
