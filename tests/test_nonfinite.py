"""A result that is not finite: the message names voxels, channel and patch, as brute force does."""

import numpy as np
import pytest
import torch
from torch import nn

from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.backends.reduction import Reduction
from mpichunk.block.inference import BlockInference
from mpichunk.config.scaling import Scaling
from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box
from tests.blockinference import (
    FLOAT32,
    each_engine,
    make_inference,
    make_plan,
    make_request,
    make_source,
)
from tests.lagging import lagging_arrays


class NaNAbove(nn.Module):
    """Three channels of two; channel 1 is NaN where channel 0 is above what input ever is."""

    def forward(self, batch):
        bad = torch.where(batch[:, 0] > 300, torch.nan, batch[:, 1])
        return torch.stack([batch[:, 1], bad, batch[:, 1]], dim=1)


def infer(*arguments, **how):
    """Return the message with which a block fails."""
    return attempt(*arguments, **how)[0]


def attempt(
    plan,
    block,
    source_czyx,
    dtype="float32",
    *,
    is_accelerator=False,
    net=None,
    reduction=None,
    **how,
):
    """Return the message with which a block fails, and how many batches were run."""
    request = make_request(plan, **how)
    engine = TorchEngine((net or NaNAbove()).eval(), request)
    if is_accelerator:
        engine._arrays = lagging_arrays()
    inference = BlockInference(
        engine,
        request,
        scaling=Scaling(),
        window_name="bump",
        activation="none",
        skip_blank=True,
        reduction=reduction,
    )
    with pytest.raises(BlockError) as caught:
        inference.run(block, inference.hold(source_czyx), None, np.dtype(dtype)).core()
    return str(caught.value), inference.num_batches


def seen_by(block, voxel):
    """Return the output patches of a block that hold a voxel."""
    return [box for box in block.patches() if box.contains(Box.from_shape(voxel, (1, 1, 1)))]


@pytest.mark.parametrize("is_accelerator", [False, True])
@pytest.mark.parametrize("finish_nbytes", [1, 3000, 10**9])
def test_the_first_voxel_its_channel_and_all_that_are_bad_are_told(
    monkeypatch, is_accelerator, finish_nbytes
):
    arrays = (
        lagging_arrays()
        if is_accelerator
        else TorchEngine(NaNAbove(), make_request(make_plan())).arrays
    )
    monkeypatch.setattr(type(arrays), "finish_nbytes", finish_nbytes)
    plan = make_plan()
    rng = np.random.default_rng(2)
    for block in plan:
        source_czyx = make_source(block, dtype=np.float32)
        core = source_czyx[(slice(None), *block.core.slices(block.input_box.start))]
        is_bad = rng.random(core.shape[1:]) > 0.99
        is_bad[tuple(rng.integers(is_bad.shape))] = True
        core[0][is_bad] = 1000
        first = [int(i) + n for i, n in zip(np.argwhere(is_bad)[0], block.core.start, strict=True)]
        message = infer(plan, block, source_czyx, is_accelerator=is_accelerator)
        assert (
            f"the result holds NaN or inf: {is_bad.sum()} of {is_bad.size} voxels, the first at "
            f"z, y, x = {first} in channel 1, from"
        ) in message
        assert any(str(box) in message for box in seen_by(block, tuple(first)))
        assert "whose input is finite" in message


class NaNFromCorner(nn.Module):
    """The whole output is NaN where the first voxel that the network sees is above 300."""

    def forward(self, batch):
        is_bad = (batch[:, 0, 0, 0, 0] > 300)[:, None, None, None, None]
        return torch.where(is_bad, torch.nan, batch[:, [0, 1, 0]])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_on_a_host_the_patch_is_found_by_running_it_again(dtype):
    plan = make_plan(overlap=(2, 3, 4))
    block = plan[0]
    for box in list(block.patches())[1::3]:
        source_czyx = make_source(block, dtype=np.float32)
        z, y, x = (a - o for a, o in zip(box.start, block.output_box.start, strict=True))
        source_czyx[0, z, y, x] = 1000
        message = infer(plan, block, source_czyx, dtype, net=NaNFromCorner())
        inside = box.intersect(block.core)
        assert f"{inside.num_voxels} of {block.core.num_voxels} voxels" in message
        assert f"the first at z, y, x = {list(inside.start)} in channel 0" in message
        assert len(seen_by(block, inside.start)) > 1 or box == next(block.patches())
        assert f"from the output patch {box}, whose input is finite" in message


class NaNAtEnds(nn.Module):
    """NaN at the end of each patch; at its start, too, where the first voxel seen is above 300."""

    def forward(self, batch):
        output = batch[:, [0, 1, 0]].clone()
        output[:, :, -2, -1, -3] = torch.nan
        output[batch[:, 0, 0, 0, 0] > 300, :, 1, 0, 2] = torch.nan
        return output


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_patch_that_is_not_finite_elsewhere_is_not_blamed(batch_size):
    plan = make_plan(overlap=(2, 3, 4))
    block = plan[0]
    other, guilty = list(block.patches())[:2]
    source_czyx = make_source(block, dtype=np.float32)
    z, y, x = (a - o for a, o in zip(guilty.start, block.output_box.start, strict=True))
    source_czyx[0, z, y, x] = 1000
    message = infer(plan, block, source_czyx, net=NaNAtEnds(), batch_size=batch_size)
    assert f"the first at z, y, x = {list(guilty.start)} in channel" in message
    assert seen_by(block, guilty.start) == [other, guilty]
    assert f"from the output patch {guilty}, whose input is finite" in message


class Huge(nn.Module):
    """Values that float16 does not hold."""

    def forward(self, batch):
        return batch[:, [0, 1, 0]] * 1e6


def test_nothing_runs_again_where_no_patch_is_to_blame():
    plan = make_plan(overlap=(2, 3, 4))
    block = plan[7]
    source_czyx = make_source(block, dtype=np.float32)
    message, num_batches = attempt(plan, block, source_czyx, "float16", net=Huge())
    assert "which float16 cannot store" in message
    assert num_batches == -(-len(list(block.patches())) // make_request(plan).batch_size)


def test_an_accelerator_that_writes_integers_names_the_place_only():
    plan = make_plan()
    block = plan[3]
    source_czyx = make_source(block, dtype=np.float32)
    source_czyx[0] = 1000
    message = infer(plan, block, source_czyx, "uint8", is_accelerator=True)
    assert message.startswith("the result holds NaN or inf near [") and "check the input" in message


@pytest.mark.parametrize("is_accelerator", [False, True])
def test_what_a_gate_has_set_to_zero_is_not_taken_for_finite(is_accelerator):
    plan = make_plan()
    block = plan[7]
    source_czyx = make_source(block, dtype=np.float32)
    core = source_czyx[(slice(None), *block.core.slices(block.input_box.start))]
    core[0] = 1
    core[0][[0, -1], [0, -1], [0, -1]] = 1000
    core[1] = 0.2
    core[1][0, 0, 0] = 0.9  # where the gate is shut
    gated = Reduction(channels=(0, 1, 2), gate=(0, 0.5))
    message = infer(plan, block, source_czyx, is_accelerator=is_accelerator, reduction=gated)
    place = list(block.core.start)
    if is_accelerator:
        assert message.startswith("the result holds NaN or inf near [")
    else:
        assert f"2 of {block.core.num_voxels} voxels, the first at z, y, x = {place}" in message


@each_engine
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_the_result_fails_the_block_and_names_the_place(name, bad):
    plan = make_plan()
    block = plan[3]
    source_czyx = make_source(block, dtype=np.float32)
    core = block.core.slices(block.input_box.start)
    view = source_czyx[(slice(None), *core)]
    view[0, -1, -1, -1] = bad
    inference = make_inference(plan, name, scaling=Scaling())
    with pytest.raises(BlockError) as caught, np.errstate(invalid="ignore"):
        inference.run(block, source_czyx, None, np.dtype(np.uint8)).core()
    message = str(caught.value)
    assert "the result holds NaN or inf: " in message
    assert "whose input holds NaN or inf, too: fix the input there" in message

    # What the mask excludes is not the user's concern.
    mask = np.ones(block.output_box.shape, bool)
    mask[tuple(slice(n - 6, None) for n in mask.shape)] = False
    with np.errstate(invalid="ignore"):
        found = inference.run(block, source_czyx, mask, FLOAT32)
    assert np.isfinite(found.core()).all()
