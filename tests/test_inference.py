"""Blocks as they are inferred, against blending by brute force."""

import itertools

import numpy as np
import pytest
import torch

from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.block.blank import is_blank
from mpichunk.block.inference import BlockInference, check_engine, scaling_for
from mpichunk.block.slab import parts
from mpichunk.config.scaling import Scaling
from mpichunk.config.schema import Normalize
from mpichunk.errors import BlockError, ModelError, UserError
from mpichunk.geometry.box import Box
from tests.blockinference import (
    ENGINES,
    FLOAT32,
    Records,
    brute_force,
    each_engine,
    make_inference,
    make_plan,
    make_request,
    make_source,
)


@each_engine
@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize("window_name", ["bump", "gaussian", "hann", "uniform"])
def test_blocks_equal_brute_force(name, stitch, window_name):
    plan = make_plan(stitch=stitch, margin=(1, 2, 0))
    inference = make_inference(plan, name, window_name=window_name)
    assert len(plan) == 8
    for block in plan:
        source_czyx = make_source(block, seed=block.index)
        before = source_czyx.copy()
        found = inference.run(block, source_czyx, None, FLOAT32)
        expected, num_run = brute_force(
            block, source_czyx, ENGINES[name][1], window_name=window_name
        )
        assert found.core().dtype == FLOAT32 and found.core().flags.c_contiguous
        np.testing.assert_allclose(found.core(), expected, rtol=0, atol=2e-6)
        assert found.num_patches == num_run == block.num_patches
        np.testing.assert_array_equal(source_czyx, before)


@each_engine
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_activation_acts_on_each_patch_before_weighting(name, activation):
    plan = make_plan()
    block = plan[5]
    source_czyx = make_source(block)
    inference = make_inference(plan, name, activation=activation, scaling=Scaling(divide=20.0))
    found = inference.run(block, source_czyx, None, FLOAT32)
    expected, _ = brute_force(
        block, source_czyx, ENGINES[name][1], activation=activation, divide=20
    )
    np.testing.assert_allclose(found.core(), expected, rtol=0, atol=2e-6)


@each_engine
def test_mask_skips_patches_and_zeroes_voxels(name):
    plan = make_plan()
    block = plan[0]
    source_czyx = make_source(block)
    mask = np.zeros(block.output_box.shape, dtype=bool)
    mask[2:6, 3:9, 4:12] = True
    found = make_inference(plan, name).run(block, source_czyx, mask, FLOAT32)
    expected, num_run = brute_force(block, source_czyx, ENGINES[name][1], mask=mask)
    assert 0 < found.num_patches == num_run < block.num_patches
    np.testing.assert_allclose(found.core(), expected, rtol=0, atol=2e-6)
    outside = np.broadcast_to(~mask[block.core.slices(block.output_box.start)], expected.shape)
    assert not found.core()[outside].any()


@each_engine
def test_blank_patches_are_not_run_but_keep_their_weight(name):
    plan = make_plan()
    block = plan[0]
    source_czyx = make_source(block)
    source_czyx[:, :, :14] = 0
    inference = make_inference(plan, name, activation="sigmoid")
    found = inference.run(block, source_czyx, None, FLOAT32)
    expected, num_run = brute_force(block, source_czyx, ENGINES[name][1], activation="sigmoid")
    assert 0 < found.num_patches == num_run < block.num_patches
    # A blank patch contributes 0 and not sigmoid(0): where only blank ones are, the result is 0.
    assert not expected[:, :, 0].any()
    np.testing.assert_allclose(found.core(), expected, rtol=0, atol=2e-6)

    inference = make_inference(plan, name, activation="sigmoid", skip_blank=False)
    found = inference.run(block, source_czyx, None, FLOAT32)
    assert found.num_patches == block.num_patches
    np.testing.assert_allclose(found.core()[:, :, 0], 0.5)


@each_engine
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_wholly_blank_block_is_zero(name, dtype):
    plan = make_plan()
    block = plan[0]
    source_czyx = np.zeros((2, *block.input_box.shape), np.uint8)
    found = make_inference(plan, name).run(block, source_czyx, None, np.dtype(dtype))
    assert found.num_patches == 0
    assert found.core().shape == (3, *block.core.shape) and found.core().dtype == dtype
    assert not found.core().any()


@each_engine
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16"])
def test_quantised_after_the_division(name, dtype):
    plan = make_plan()
    inference = make_inference(plan, name)
    earlier = None
    for block in (plan[0], plan[7], plan[2]):
        source_czyx = make_source(block, seed=block.index)
        exact = inference.run(block, source_czyx, None, FLOAT32).core()
        found = inference.run(block, source_czyx, None, np.dtype(dtype)).core()
        expected = exact
        if np.dtype(dtype).kind in "ui":
            expected = np.rint(np.clip(exact, 0, 1) * np.float32(np.iinfo(dtype).max))
        np.testing.assert_array_equal(found, expected.astype(dtype))
        # What an earlier block returned may still be on its way to the disk.
        if earlier is not None:
            np.testing.assert_array_equal(*earlier)
        earlier = found, found.copy()


@each_engine
@pytest.mark.parametrize("value", [7e4, -7e4])
def test_what_float16_cannot_hold_fails_the_block(name, value):
    plan = make_plan()
    block = plan[3]
    source_czyx = np.full((2, *block.input_box.shape), 100, np.float32)
    core = block.core.slices(block.input_box.start)
    source_czyx[(slice(None), *core)][0, -1, -1, -1] = value
    inference = make_inference(plan, name, scaling=Scaling())
    assert np.isfinite(inference.run(block, source_czyx, None, FLOAT32).core()).all()
    with pytest.raises(BlockError, match="above 65504, which float16 cannot store: 1 of"):
        inference.run(block, source_czyx, None, np.dtype(np.float16)).core()
    source_czyx[source_czyx == value] = value * 0.9
    found = inference.run(block, source_czyx, None, np.dtype(np.float16)).core()
    assert abs(found[0]).max() > 6e4


def test_identity_is_exact_for_uint8():
    plan = make_plan(stitch="crop", margin=(1, 1, 1))
    inference = make_inference(plan)
    for block in plan:
        source_czyx = make_source(block, seed=block.index)
        found = inference.run(block, source_czyx, None, np.dtype(np.uint8)).core()
        core = block.core.slices(block.input_box.start)
        np.testing.assert_array_equal(found, source_czyx[[0, 1, 0]][(slice(None), *core)])


def test_batches_hold_the_blocks_patches_in_lattice_order_and_a_padded_tail():
    plan = make_plan()
    block = plan[0]
    assert block.num_patches % 5
    request = make_request(plan, batch_size=5)
    net = Records()
    inference = BlockInference(
        TorchEngine(net, request),
        request,
        scaling=Scaling(),
        window_name="bump",
        activation="none",
        skip_blank=True,
    )
    source_czyx = make_source(block)
    inference.run(block, source_czyx, None, FLOAT32)
    seen = torch.cat(net.batches).numpy()
    assert all(len(batch) == 5 for batch in net.batches)
    origin = block.input_box.start
    boxes = [
        Box.from_shape(start, plan.output_patch_shape).grow(plan.crop)
        for start in itertools.product(*block.starts)
    ]
    for patch, box in zip(seen, boxes, strict=False):
        np.testing.assert_array_equal(patch, source_czyx[(slice(None), *box.slices(origin))])
    assert not seen[len(boxes) :].any()


@each_engine
def test_batch_size_does_not_change_the_bytes(name):
    plan = make_plan()
    block = plan[5]
    source_czyx = make_source(block)
    results = [
        make_inference(plan, name, request={"batch_size": n})
        .run(block, source_czyx, None, FLOAT32)
        .core()
        for n in (1, 3, 64)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_small_slabs_change_nothing(monkeypatch):
    plan = make_plan()
    block = plan[0]
    source_czyx = make_source(block)
    mask = np.random.default_rng(1).random(block.output_box.shape) > 0.3
    for name in ENGINES:
        inference = make_inference(plan, name)
        expected = inference.run(block, source_czyx, mask, np.dtype(np.uint8)).core()
        monkeypatch.setattr(type(inference._engine.arrays), "finish_nbytes", 1000)
        found = inference.run(block, source_czyx, mask, np.dtype(np.uint8)).core()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(3, 7, 16, 14), (1, 1, 1, 1), (2, 9, 5, 1000)])
@pytest.mark.parametrize("nbytes", [1, 1000, 4000, 30_000, 10**9])
def test_slabs_cover_a_core_once_and_are_small(shape, nbytes):
    count = np.zeros(shape[1:], int)
    for slab in parts(shape, nbytes):
        count[slab.slices()] += 1
        one_row = slab.shape[0] == slab.shape[1] == 1
        assert one_row or slab.num_voxels * shape[0] * 4 <= nbytes
    assert (count == 1).all()


def test_is_blank_finds_any_single_voxel():
    patch_czyx = np.zeros((2, 5, 9, 11), np.uint16)
    assert is_blank(patch_czyx)
    for index in ((0, 0, 0, 0), (1, 4, 8, 10), (1, 2, 3, 5)):
        patch_czyx[index] = 1
        assert not is_blank(patch_czyx)
        patch_czyx[index] = 0
    assert is_blank(-patch_czyx.astype(np.float32))
    assert not is_blank(np.full((1, 2, 2, 2), np.nan))


@pytest.mark.parametrize(
    ("dtype", "normalize", "expected"),
    [
        ("uint8", None, Scaling(divide=255.0)),
        ("int16", None, Scaling(divide=32767.0)),
        ("uint32", None, Scaling(divide=4294967295.0)),
        ("bool", None, Scaling()),
        ("float16", None, Scaling()),
        ("float64", None, Scaling()),
        (
            "uint8",
            Normalize(subtract=128, divide=33, clip=(1, 250)),
            Scaling(clip=(1, 250), subtract=128, divide=33),
        ),
        ("float32", Normalize(divide=4), Scaling(divide=4)),
    ],
)
def test_scaling_for(dtype, normalize, expected):
    assert scaling_for(np.dtype(dtype), normalize) == expected


def test_scaling_refuses_what_is_no_number():
    with pytest.raises(UserError, match="complex64") as caught:
        scaling_for(np.dtype(np.complex64), None)
    assert caught.value.key == "input.volume"


def test_check_engine_sees_one_full_textured_batch():
    plan = make_plan()
    request = make_request(plan)
    net = Records()
    check_engine(TorchEngine(net, request), request)
    (batch,) = net.batches
    assert tuple(batch.shape) == (3, 2, *plan.patch_shape)
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.2
    again = Records()
    check_engine(TorchEngine(again, request), request)
    assert torch.equal(batch, again.batches[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_engine_refuses_nan_in_what_is_kept(bad):
    plan = make_plan()
    request = make_request(plan)

    class Broken(Records):
        def __init__(self, z):
            super().__init__()
            self.z = z

        def forward(self, batch):
            out = super().forward(batch)
            out[-1, -1, self.z] = bad
            return out

    check_engine(TorchEngine(Broken(0), request), request)  # cropped away
    with pytest.raises(ModelError, match="NaN or inf") as caught:
        check_engine(TorchEngine(Broken(1), request), request)
    assert caught.value.key == "model.weights"
