"""Backends by name, the identity, threads, and devices as they are probed."""

import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

import mpichunk.backends.devices.probing as devices
from mpichunk.backends import get_backend
from mpichunk.backends.pytorch.engine import TorchEngine, prepare_torch
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from tests.modelfolder import make_request

RNG = np.random.default_rng(7)


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


# ---- torch ---------------------------------------------------------------------------------------


def test_a_network_that_returns_its_own_weights():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.ones(1, 1, 8, 12, 16))

        def forward(self, x):
            return self.values

    engine = TorchEngine(Constant().eval(), make_request())
    arrays = engine.arrays
    output = engine.infer(torch.zeros(1, 1, 8, 12, 16))
    assert not output.requires_grad
    total = arrays.zeros((1, 8, 12, 16))
    whole = (slice(None), slice(None), slice(None))
    ones = arrays.window(*(torch.ones(n) for n in (8, 12, 16)))
    arrays.add_weighted(total, whole, arrays.activate(output, "sigmoid")[0], whole, ones)
    assert not total.requires_grad and float(total.min()) > 0.7


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


def test_the_device_too_counts_on_other_threads(monkeypatch):
    """CUDA has one current device per thread, the first unless it is told."""
    engine = TorchEngine(nn.Identity().eval(), make_request())
    seen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda i: seen.append((i, get())))
    get, batch = threading.get_ident, torch.zeros(1, 1, 8, 12, 16)
    engine._device = torch.device("cuda:1")
    idents = []
    for _ in range(2):
        work = threading.Thread(
            target=lambda: [idents.append(get()), engine.infer(batch), engine.infer(batch)]
        )
        work.start()
        work.join()
        engine._thread = 0
    assert seen == [(1, ident) for ident in idents]


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
