"""Precision and kernels on an NVIDIA device, against the CPU and against plain forwards on it.

Left out where there is no such device. What a CPU can show stands in test_precision, test_folding
and test_kernels.
"""

import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.backends.pytorch.engine import SWITCH_SECONDS, TorchEngine, prepare_torch
from mpichunk.block.inference import BlockInference, Inferred, check_engine
from mpichunk.config.scaling import Scaling
from mpichunk.errors import ModelError
from mpichunk.job.forward_probe import probe_engine
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.run import run_on
from tests import blockinference
from tests.blockinference import RAW_DTYPES, make_plan, make_source, raw_values
from tests.endtoend import read_volume, start_lines, write_config
from tests.engines import make_request
from tests.realnets import EM_MODEL, em_network
from tests.torchnet import export

if not torch.cuda.is_available():
    pytest.skip("no accelerator: torch sees no CUDA device", allow_module_level=True)

DEVICE = "cuda:0"
SHAPE = 16, 64, 64
SIZE = 4

TOLERANCES = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest difference from the CPU's float32, of values in [0, 1]."""

KERNELS = ["channels_last", "fold_batch_norm", "cuda_graphs"]


def request(*kernels: str, **changes: Any) -> EngineRequest:
    values = {"patch_shape": SHAPE, "batch_size": SIZE, "out_channels": 3, "device": DEVICE}
    return make_request(kernels=kernels, **values | changes)


def engine(*kernels: str, net: nn.Module | None = None, **changes: object) -> TorchEngine:
    asked = request(*kernels, **changes)
    prepare_torch(asked)
    return TorchEngine((em_network() if net is None else net).to(DEVICE), asked)


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return torch.rand(SIZE, 1, *SHAPE, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture(scope="module")
def expected(batch: Tensor) -> Tensor:
    with torch.no_grad():
        return em_network()(batch.cpu())


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).abs().max())


# ---- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCES)
def test_precision_is_within_its_tolerance_and_repeatable(batch, expected, precision):
    one = engine(precision=precision)
    found = one.infer(batch).clone()
    assert found.dtype == torch.float32
    assert largest(found, expected) < TOLERANCES[precision]
    assert torch.equal(found, one.infer(batch))
    assert torch.equal(found, engine(precision=precision).infer(batch))
    assert one.info.precision == precision
    check_engine(one, request(precision=precision))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_precision_changes_something(batch, precision):
    torch.manual_seed(0)
    # As wide as tensor cores like it.
    wide = nn.Sequential(
        nn.Conv3d(1, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1), nn.Conv3d(32, 3, 1)
    ).eval()
    exact = engine(net=wide).infer(batch).clone()
    found = engine(net=wide, precision=precision).infer(batch)
    assert 0 < largest(found, exact) < 0.1


def test_engines_of_several_precisions_in_one_process_do_not_meet(batch):
    engines = {name: engine(precision=name) for name in TOLERANCES}
    first = {name: one.infer(batch).clone() for name, one in engines.items()}
    for name, one in reversed(engines.items()):
        assert torch.equal(one.infer(batch), first[name]), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_halves_act_on_torchscript_and_exported_programs(batch, expected, tmp_path, precision):
    from mpichunk.backends.pytorch.exported import load_exported

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(em_network()).save(tmp_path / "net.ts")
        torch.jit.trace(em_network(), batch.cpu()).save(tmp_path / "traced.ts")
    path = export(em_network(), tmp_path / "net.pt2", (SIZE, 1, *SHAPE), axes=())
    forms = {
        "script": torch.jit.load(tmp_path / "net.ts").eval(),
        "traced": torch.jit.load(tmp_path / "traced.ts").eval(),
        "exported": load_exported(path, request(), trust_pickle=False),
    }
    for name, net in forms.items():
        found = engine(net=net, precision=precision).infer(batch)
        assert 0 < largest(found, expected) < TOLERANCES[precision], name


# ---- Kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_gives_the_values_of_the_plain_forward(batch, expected, kernel, precision):
    plain = engine(precision=precision).infer(batch).clone()
    one = engine(kernel, precision=precision)
    found = one.infer(batch).clone()
    close = 5e-5 if precision == "float32" else TOLERANCES[precision]
    assert largest(found, plain) < close
    assert largest(found, expected) < 2 * TOLERANCES[precision]
    assert torch.equal(found, one.infer(batch))
    assert torch.equal(found, engine(kernel, precision=precision).infer(batch))
    assert one.info.kernels == (kernel,)


def test_all_kernels_together(batch, expected):
    one = engine(*KERNELS, precision="bfloat16")
    found = one.infer(batch).clone()
    assert largest(found, expected) < TOLERANCES["bfloat16"]
    assert torch.equal(found, one.infer(batch))


@pytest.mark.parametrize("others", [(), ("cuda_graphs",), ("channels_last",)])
def test_compiled(batch, expected, others):
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no compiler and headers of Python: triton needs a C compiler")
    pytest.importorskip("triton", reason="no compiler and headers of Python: no triton")
    one = engine("compile", *others)
    found = one.infer(batch).clone()
    assert largest(found, expected) < 1e-4
    assert torch.equal(found, one.infer(batch))


# ---- CUDA graphs ---------------------------------------------------------------------------------


def test_graph_of_new_values_and_of_smaller_batches(batch):
    plain, graphed = engine(), engine("cuda_graphs")
    others = batch.flip(0) * 0.5
    for size in (SIZE, SIZE // 2, 1, SIZE):
        for values in (batch, others, batch):
            found = graphed.infer(values[:size])
            expected = plain.infer(values[:size])
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_what_a_graph_keeps_is_the_memory_of_its_forwards(batch):
    found = {}
    for kernels in ((), ("cuda_graphs",)):
        one, asked = engine(*kernels), request(*kernels)
        one.infer(batch)
        found[kernels] = probe_engine(one, asked).nbytes
        # Once more it is the same, and so it is with a batch that was smaller meanwhile.
        one.infer(batch[:1])
        one.infer(batch)
        again = probe_engine(one, asked).nbytes
        assert again == pytest.approx(found[kernels], rel=0.1)
        del one
    plain, graphed = found.values()
    assert plain > 0
    # A pool of its own, rounded up, and its copy of the batch.
    assert 0.8 * plain <= graphed <= 2 * plain + batch.nbytes + (64 << 20)


def test_graph_replays_in_another_thread_behind_work_on_its_stream(batch):
    plain, graphed = engine(), engine("cuda_graphs")
    graphed.infer(batch)
    expected = plain.infer(batch * 0.25).clone()
    outcome: list[Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # Long enough to still run when the replay is asked for.
            torch.cuda._sleep(200_000_000)
            later = batch * 0.25
            outcome.append(graphed.infer(later).clone())
        stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.testing.assert_close(outcome[0], expected, atol=1e-6, rtol=0)


def test_forward_does_not_wait_for_the_device(batch):
    for kernels in ((), ("cuda_graphs",)):
        one = engine(*kernels)
        one.infer(batch)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            # torch calls it a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            one.infer(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_network_that_leaves_the_device_is_refused_as_a_graph(batch):
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = em_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * float(x.sum().item() > 0)

    one = engine("cuda_graphs", net=Asks().eval())
    with pytest.raises(ModelError, match="not as a CUDA graph") as caught:
        one.infer(batch)
    assert caught.value.key == "compute.cuda_graphs"
    # The device goes on.
    assert torch.isfinite(engine().infer(batch)).all()


# ---- Blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("kernels", [(), ("cuda_graphs",)])
def test_a_block_is_only_asked_for(kernels, out_dtype):
    plan = make_plan()
    asked = blockinference.make_request(plan, device=DEVICE, kernels=kernels)
    prepare_torch(asked)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    net = nn.Conv3d(2, 3, 3, padding=1).eval().to(DEVICE)
    inference = BlockInference(
        TorchEngine(net, asked),
        asked,
        scaling=Scaling(divide=255.0),
        window_name="bump",
        activation="sigmoid",
        skip_blank=True,
    )
    block, dtype = plan[0], np.dtype(out_dtype)

    def run() -> Inferred:
        return inference.run(block, inference.hold(make_source(block)), None, dtype)

    warm = run()
    expected = warm.core().copy()
    warm.release()
    with warnings.catch_warnings():
        # torch calls it a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        # Events that it paces itself by are waited for, and are no such thing.
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(found.core(), expected)


@pytest.mark.parametrize("dtype", RAW_DTYPES)
def test_raw_values_become_what_they_are_on_a_cpu(dtype):
    source_czyx = raw_values((2, 8, 50, 60), dtype)
    for starts in ((0, 0), (0, 4)):  # of one layer, and of two
        where = [(slice(z, z + 4), slice(0, 50), slice(3, 43)) for z in starts]
        found = []
        for device in ("cpu", DEVICE):
            arrays = TorchArrays(torch.device(device))
            staged = arrays.stage(
                arrays.feed(source_czyx), where, patch_shape=(4, 50, 40), batch_size=3
            )
            batch_nczyx = arrays.gather(staged, scaling=Scaling(divide=255.0))
            found.append(arrays.download(batch_nczyx).copy())
        np.testing.assert_array_equal(*found)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave 300 MiB beside what is allocated now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    share = (torch.cuda.memory_reserved() + (300 << 20)) / total
    torch.cuda.set_per_process_memory_fraction(share)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("kernels", [(), ("cuda_graphs",)])
def test_a_smaller_batch_goes_on_where_a_large_one_has_no_memory(batch, little_memory, kernels):
    large = batch.repeat(32, 1, 1, 1, 1)
    one = engine(*kernels, batch_size=len(large))
    with pytest.raises(Exception) as caught:
        one.infer(large)
    assert one.is_out_of_memory(caught.value)
    del caught
    one.arrays.release()
    found = one.infer(batch)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, engine().infer(batch), atol=1e-6, rtol=0)


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        {"precision": "tf32"},
        {"precision": "bfloat16", "channels_last": True, "cuda_graphs": True},
        {"precision": "float16", "fold_batch_norm": True},
        {"cuda_graphs": True},
    ],
)
def test_a_run_gives_the_same_bytes_twice_and_the_values_of_the_cpu(tmp_path, compute):
    outputs = {}
    for name, settings in {
        "cpu": {"device": "cpu"},
        "first": {"device": "cuda"} | compute,
        "second": {"device": "cuda"} | compute,
    }.items():
        path = write_config(
            tmp_path,
            name=f"{name}.yaml",
            input={"volume": "synthetic://membranes?shape=24,80,80&seed=3"},
            model=EM_MODEL,
            patch={"shape": [16, 32, 32], "overlap": [4, 8, 8], "batch_size": 3},
            block={"shape": [24, 40, 40]},
            output={"volume": f"{name}.zarr"},
            compute={"threads": 1} | settings,
        )
        assert run_on(SerialCommunicator(), path) == 0
        outputs[name] = read_volume(tmp_path / f"{name}.zarr")
    assert np.array_equal(outputs["first"], outputs["second"])
    tolerance = TOLERANCES[compute.get("precision", "float32")]
    assert np.abs(outputs["first"] - outputs["cpu"]).max() < tolerance
    (start,) = start_lines(tmp_path / "runs/first")
    kernels = [name for name in compute if name != "precision"]
    assert start["engine"]["kernels"] == kernels
