"""Half precision on the CPU: what it changes, and where it is refused.

What only an accelerator can do stands in test_device.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpichunk.backends import get_backend
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.run import run_on
from tests.endtoend import read_volume, start_lines, write_config
from tests.engines import make_request
from tests.realnets import EM_MODEL
from tests.torchnet import BATCH, export, forms, make_net

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = {"bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference allowed, of values in [0, 1]."""


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
    for net, why in ((Twice(), "no convolution"), (traced, "traced TorchScript")):
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
        "model": EM_MODEL,
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
