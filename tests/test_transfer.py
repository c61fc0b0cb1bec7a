"""Copies beside the computing, on a made-up accelerator whose streams may lag behind the host."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpichunk.backends.pytorch import transfer
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.backends.pytorch.transfer import (
    ENOUGH_BATCHES_AHEAD,
    MOST_BATCHES_AHEAD,
    Transfer,
)
from mpichunk.block.inference import BlockInference
from mpichunk.config.scaling import Scaling
from mpichunk.geometry.box import Box
from tests.blockinference import (
    RAW_DTYPES,
    Mix,
    make_inference,
    make_plan,
    make_request,
    make_source,
    raw_values,
)
from tests.lagging import (
    ComputingStream,
    LaggingEvent,
    LaggingModule,
    LaggingStream,
    lagging_arrays,
)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_an_accelerator_that_lags_gives_the_same_bytes(dtype, batch_size):
    plan = make_plan()
    request = make_request(plan, batch_size=batch_size)
    expected = make_inference(plan, "pytorch", request={"batch_size": batch_size})
    lagging = make_inference(plan, "pytorch", request={"batch_size": batch_size})
    engine = TorchEngine(Mix().eval(), request)
    engine._arrays = lagging_arrays()
    lagging = type(lagging)(
        engine,
        request,
        scaling=lagging._scaling,
        window_name="bump",
        activation="sigmoid",
        skip_blank=True,
    )
    expected._activation = "sigmoid"
    mask = np.random.default_rng(3).random((100, 100, 100)) > 0.2
    earlier = []
    for block in [*plan, *plan]:
        source_czyx = make_source(block, seed=block.index)
        mask_zyx = mask[tuple(slice(n) for n in block.output_box.shape)]
        found = lagging.run(block, source_czyx, mask_zyx, np.dtype(dtype))
        wanted = expected.run(block, source_czyx, mask_zyx, np.dtype(dtype)).core()
        earlier.append((found, wanted.copy()))
        # Two blocks are on their way while a third is computed, as in a run.
        if len(earlier) > 2:
            done, wanted = earlier.pop(0)
            np.testing.assert_array_equal(done.core(), wanted)
            done.release()
    for done, wanted in earlier:
        np.testing.assert_array_equal(done.core(), wanted)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_no_copy_under_way(monkeypatch, error):
    """Else the memory of its core would be written to when it is another block's."""
    plan = make_plan(block_shape=(11, 22, 28))
    block, request = plan[0], make_request(plan)
    arrays = lagging_arrays()
    streams = [arrays._transfer._inward, arrays._transfer._outward]
    monkeypatch.setattr(arrays, "wait", lambda: [stream.run() for stream in streams])
    engine = TorchEngine(Mix().eval(), request)
    engine._arrays, infer, num_batches = arrays, engine.infer, 0

    def fail(batch_nczyx):
        nonlocal num_batches
        num_batches += 1
        if num_batches == block.num_patches // request.batch_size:
            assert any(stream.tasks for stream in streams)
            raise error("misaligned address")
        return infer(batch_nczyx)

    engine.infer = fail
    inference = type(make_inference(plan))(
        engine,
        request,
        scaling=make_inference(plan)._scaling,
        window_name="bump",
        activation="none",
        skip_blank=False,
    )
    with pytest.raises(error):
        inference.run(block, make_source(block), None, np.dtype("uint8"))
    assert not any(stream.tasks for stream in streams)


def test_the_test_sees_a_copy_that_nobody_waits_for(monkeypatch):
    arrays = lagging_arrays()
    monkeypatch.setattr(ComputingStream, "wait_event", lambda self, event: None)
    source_czyx = np.full((1, 2, 2, 2), 7, np.uint8)
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(arrays.feed(source_czyx), whole, patch_shape=(2, 2, 2), batch_size=1)
    assert not bool((staged.patches_nczyx[0] == 7).all())


@pytest.fixture
def waiting():
    """Return arrays whose device begins with nothing until somebody waits, and `ask`.

    `ask` asks for one batch, and returns how many the device has not begun with.
    """
    module = LaggingModule()
    module.computing = module.current = LaggingStream()
    device = torch.device("cpu")
    arrays = TorchArrays(device, Transfer(device, module, LaggingEvent, is_pinned=False))
    feed = arrays.feed(np.zeros((1, 2, 2, 2), np.uint8))
    num_asked = num_begun = 0

    def begin():
        nonlocal num_begun
        num_begun += 1

    def ask():
        nonlocal num_asked
        num_asked += 1
        whole = [(slice(None), slice(None), slice(None))]
        arrays.stage(feed, whole, patch_shape=(2, 2, 2), batch_size=1)
        module.computing.tasks.append(begin)
        return num_asked - num_begun

    return ask


@pytest.fixture
def clock(monkeypatch):
    """Return the time as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(transfer, "monotonic", lambda: now[0])
    return now


def test_the_host_runs_some_batches_ahead(waiting, clock):
    found = [waiting() for _ in range(3 * MOST_BATCHES_AHEAD)]
    # One more than the device has not begun with: that which it computes.
    assert found[:MOST_BATCHES_AHEAD] == list(range(1, MOST_BATCHES_AHEAD + 1))
    assert set(found[MOST_BATCHES_AHEAD:]) == {MOST_BATCHES_AHEAD + 1}


def test_the_host_runs_few_batches_ahead_where_they_take_long(waiting, clock):
    for _ in range(MOST_BATCHES_AHEAD):
        waiting()
    for _ in range(5):
        clock[0] += 1
        assert waiting() == ENOUGH_BATCHES_AHEAD + 1


@pytest.mark.parametrize("num_layers", [3, 30])
def test_buffers_do_not_grow_with_the_block(num_layers):
    length = 2 + 3 * num_layers
    domain = Box(start=(0, 0, 0), stop=(length, 22, 28))
    plan = make_plan(
        volume=domain, roi=domain, output_domain=domain, block_shape=(length, 16, 14), crop=(0,) * 3
    )
    request = make_request(plan)
    engine = TorchEngine(Mix().eval(), request)
    engine._arrays = arrays = lagging_arrays()
    inference = BlockInference(
        engine,
        request,
        scaling=Scaling(divide=255.0),
        window_name="bump",
        activation="none",
        skip_blank=False,
    )
    block = plan[0]
    assert len(block.starts[0]) == num_layers
    inference.run(block, make_source(block), None, np.dtype(np.uint8)).core()
    voxels = {name: buffer.numel() for name, buffer in arrays._buffers.items()}
    q = 5
    assert voxels["total"] == 3 * q * 16 * 14
    assert voxels["batch"] == voxels["raw"] == 3 * 2 * q * 8 * 9
    slots = [*arrays._transfer._in_slots, *arrays._transfer._out_slots]
    assert max(slot.memory.numel() for slot in slots if slot.memory is not None) < 3 * q * 22 * 28


@pytest.mark.parametrize("dtype", RAW_DTYPES)
@pytest.mark.parametrize("divide", [255.0, 65535.0, 33.3])
def test_dividing_raw_values_at_once_is_the_same(dtype, divide):
    source_czyx = raw_values((2, 4, 50, 60), dtype)
    slices = [(slice(0, 4), slice(0, 50), slice(x, x + 40)) for x in (0, 7)]
    found = []
    for arrays in (lagging_arrays(), TorchArrays(torch.device("cpu"))):
        staged = arrays.stage(
            arrays.feed(source_czyx), slices, patch_shape=(4, 50, 40), batch_size=3
        )
        found.append(arrays.gather(staged, scaling=Scaling(divide=divide)).numpy())
    np.testing.assert_array_equal(*found)


def test_the_peak_is_that_of_the_accelerators_own_allocator(monkeypatch):
    device = torch.device("meta")
    arrays = TorchArrays(device, lagging_arrays()._transfer)
    modules = iter([SimpleNamespace(max_memory_allocated={device: 7}.get), SimpleNamespace()])
    monkeypatch.setattr(torch, "get_device_module", lambda device: next(modules))
    assert [arrays.most_nbytes(), arrays.most_nbytes()] == [7, None]
    assert lagging_arrays().most_nbytes() is None
