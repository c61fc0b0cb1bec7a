"""The reference itself, on volumes whose output is known without it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpichunk.geometry.box import Box, Triple
from tests.geometries import make_config, make_plan
from tests.reference import ReferenceMask, quantise, reference

Array = npt.NDArray[Any]

PATCH, BLOCK = (6, 7, 8), (9, 8, 10)
DOMAIN = Box.from_shape((-4, 3, 100), (20, 17, 23))
STITCHES = pytest.mark.parametrize("stitch", ["crop", "seamless"])


def noise(dtype: str = "uint8") -> Array:
    """Return (1, z, y, x) over DOMAIN, nowhere zero."""
    return np.random.default_rng(7).integers(1, 255, (1, *DOMAIN.shape)).astype(dtype)


def identity(patch_czyx: Array) -> Array:
    return patch_czyx


def blurred(patch_czyx: Array) -> Array:
    """Return the mean of each voxel and its six neighbours, zero beyond the patch."""
    padded_czyx = np.pad(patch_czyx.astype(np.float64), [(0, 0), (1, 1), (1, 1), (1, 1)])
    near = [np.roll(padded_czyx, step, axis) for axis in (1, 2, 3) for step in (-1, 1)]
    return np.asarray(np.mean([padded_czyx, *near], axis=0)[:, 1:-1, 1:-1, 1:-1])


@STITCHES
@pytest.mark.parametrize("crop", [(0, 0, 0), (1, 2, 3)])
@pytest.mark.parametrize("window", ["bump", "gaussian", "hann", "uniform"])
def test_identity_gives_the_input_back(stitch: str, crop: Triple, window: str) -> None:
    patch = PATCH[0] + 2 * crop[0], PATCH[1] + 2 * crop[1], PATCH[2] + 2 * crop[2]
    config = make_config(
        patch,
        BLOCK,
        patch_crop=crop,
        patch_window=window,
        block_stitch=stitch,
        output_dtype="uint8",
    )
    found = reference(noise(), DOMAIN, identity, config)
    np.testing.assert_allclose(found.values_czyx, noise() / 255, atol=1e-7)
    np.testing.assert_array_equal(found.output_czyx, noise())
    plan = make_plan(config, DOMAIN)
    assert found.num_blocks == len(plan)
    assert found.num_patches == sum(block.num_patches for block in plan)


def test_one_patch_over_the_volume_is_the_network() -> None:
    config = make_config(DOMAIN.shape, DOMAIN.shape, model_activation="sigmoid")
    found = reference(noise("float32"), DOMAIN, blurred, config)
    expected = 1 / (1 + np.exp(-blurred(noise("float32"))))
    np.testing.assert_allclose(found.values_czyx, expected, atol=1e-12)


@STITCHES
def test_crop_serves_both_kinds_of_networks(stitch: str) -> None:
    config = make_config(PATCH, BLOCK, patch_crop=(1, 1, 1), block_stitch=stitch)
    same = reference(noise(), DOMAIN, blurred, config)
    valid = reference(noise(), DOMAIN, lambda p: blurred(p)[:, 1:-1, 1:-1, 1:-1], config)
    np.testing.assert_array_equal(same.values_czyx, valid.values_czyx)
    # With enough border the patches leave no trace: the network over the mirrored volume.
    mirrored = np.pad(noise() / 255, [(0, 0), (1, 1), (1, 1), (1, 1)], mode="reflect")
    expected = blurred(mirrored)[:, 1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(same.values_czyx, expected, atol=1e-7)


def test_seamless_does_not_depend_on_the_block_and_crop_does() -> None:
    for stitch, is_equal in (("seamless", True), ("crop", False)):
        found = [
            reference(noise(), DOMAIN, blurred, make_config(PATCH, block, block_stitch=stitch))
            for block in (BLOCK, (20, 17, 23), (5, 17, 4))
        ]
        differences = [np.abs(found[0].values_czyx - f.values_czyx).max() for f in found]
        assert (max(differences) < 1e-12) == is_equal


@STITCHES
def test_roi_is_a_part_of_the_whole(stitch: str) -> None:
    roi = Box(start=(-1, 5, 103), stop=(15, 18, 120))
    more = {"block_stitch": stitch, "roi": {"start": roi.start, "stop": roi.stop}}
    whole = reference(noise(), DOMAIN, blurred, make_config(PATCH, BLOCK, block_stitch=stitch))
    part = reference(noise(), DOMAIN, blurred, make_config(PATCH, BLOCK, **more))
    inside = (slice(None), *roi.slices(DOMAIN.start))
    np.testing.assert_allclose(part.values_czyx[inside], whole.values_czyx[inside], atol=1e-12)
    assert part.values_czyx.sum() == pytest.approx(part.values_czyx[inside].sum())
    alone = reference(
        noise(), DOMAIN, blurred, make_config(PATCH, BLOCK, output_domain="roi", **more)
    )
    assert alone.domain == roi and alone.values_czyx.shape == (1, *roi.shape)


@STITCHES
def test_mask_zeroes_and_saves_patches(stitch: str) -> None:
    """A mask of voxels twice as long, which lies over a part of the volume only."""
    mask_zyx = np.zeros((6, 6, 6), dtype=np.uint8)
    mask_zyx[1:3, 2:4, 1:5] = 1
    mask_domain = Box.from_shape((-2, 1, 52), (6, 6, 6))
    config = make_config(PATCH, BLOCK, block_stitch=stitch)
    whole = reference(noise(), DOMAIN, blurred, config)
    wanted = np.zeros(DOMAIN.shape, dtype=np.bool_)
    wanted[Box(start=(-2, 6, 106), stop=(2, 10, 114)).slices(DOMAIN.start)] = True
    for invert in (False, True):
        mask = ReferenceMask(
            mask_zyx=mask_zyx,
            domain=mask_domain,
            voxel_size=(80, 8, 8),
            output_voxel_size=(40, 4, 4),
            invert=invert,
        )
        found = reference(noise(), DOMAIN, blurred, config, mask=mask)
        expected = np.where(wanted != invert, whole.values_czyx, 0)
        np.testing.assert_allclose(found.values_czyx, expected, atol=1e-12)
        assert invert or 0 < found.num_patches < whole.num_patches


def test_blank_patches_count_with_their_weight_and_are_not_run() -> None:
    volume = noise()
    volume[:, :, :, 12:] = 0
    found = [
        reference(volume, DOMAIN, lambda p: p + 1, make_config(PATCH, BLOCK, model_skip_blank=skip))
        for skip in (False, True)
    ]
    assert found[1].num_patches < found[0].num_patches
    assert (found[0].values_czyx[..., 22] == 1).all()
    assert (found[1].values_czyx[..., 22] == 0).all()


@pytest.mark.parametrize("pad", ["reflect", "edge", "zero"])
def test_volume_smaller_than_a_patch(pad: str) -> None:
    config = make_config((30, 20, 40), BLOCK, input_pad=pad, patch_crop=(1, 1, 1))
    found = reference(noise(), DOMAIN, identity, config)
    np.testing.assert_allclose(found.values_czyx, noise() / 255, atol=1e-7)


def test_quantisation_rounds_half_to_even_after_clipping() -> None:
    values = np.array([-0.5, 0.0, 0.5, 1.5, 2.5, 254.9, 300.0]) / 255
    assert quantise(values, "uint8").tolist() == [0, 0, 0, 2, 2, 255, 255]
    assert quantise(values[[0, -1]], "int8").tolist() == [0, 127]
    assert quantise(values, "float32").dtype == np.float32
