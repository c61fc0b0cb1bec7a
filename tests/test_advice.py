"""Advice about geometry, against what it promises."""

import re

import pytest
from hypothesis import given

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box, Triple, triple
from tests.geometries import estimate_of, make_config, triples


def advice_of(config: Config, domain: Box | Triple) -> dict[str, str]:
    return {advice.key: advice.message for advice in estimate_of(config, domain).advice}


def test_good_geometry_needs_no_advice() -> None:
    config = make_config((20, 256, 256), (128, 1152, 1152), patch_overlap=(4, 64, 64))
    assert advice_of(config, (1280, 11520, 11520)) == {}
    # One block takes the whole axis: the stride does not matter.
    assert advice_of(make_config((20, 20, 20), (64, 64, 64)), (64, 64, 64)) == {}


def suggested_shape(message: str) -> Triple:
    match = re.search(r"fits: block\.shape \((\d+), (\d+), (\d+)\)", message)
    assert match, message
    return triple([int(n) for n in match.groups()])


def test_misfit_names_the_nearest_block_that_fits_and_its_saving() -> None:
    config = make_config((20, 256, 256), (128, 1024, 1024), patch_overlap=(4, 64, 64))
    domain = Box.from_shape((0, 0, 0), (1280, 23040, 23040))
    message = advice_of(config, domain)["block.shape"]
    assert "on y and x" in message
    shape = suggested_shape(message)
    assert shape == (128, 960, 960)
    better = make_config((20, 256, 256), shape, patch_overlap=(4, 64, 64))
    now = estimate_of(config, domain).work.num_patches
    then = estimate_of(better, domain).work.num_patches
    assert f"{1 - then / now:.1%} fewer patches ({then:,})" in message


@given(triples(6, 40), triples(8, 100), triples(0, 20), triples(1, 8))
def test_suggested_blocks_fit_stride_and_write_unit(
    patch: Triple, block: Triple, overlap: Triple, unit: Triple
) -> None:
    overlap = triple([min(o, q - 2) for o, q in zip(overlap, patch, strict=True)])
    block = triple([max(1, n // u) * u for n, u in zip(block, unit, strict=True)])
    config = make_config(patch, block, patch_overlap=overlap, output_chunk_shape=unit)
    message = advice_of(config, (1000, 1000, 1000)).get("block.shape", "")
    if "fits: block.shape" not in message:
        return
    shape = suggested_shape(message)
    changed_overlap = re.search(r"patch\.overlap \((\d+), (\d+), (\d+)\)", message)
    if changed_overlap:
        overlap = triple([int(n) for n in changed_overlap.groups()])
    stride = triple([q - o for q, o in zip(patch, overlap, strict=True)])
    for axis in range(3):
        assert shape[axis] % unit[axis] == 0
        assert block[axis] <= 2 * shape[axis] <= 4 * block[axis]
        is_misfit = block[axis] % (patch[axis] - config.overlap[axis]) != 0
        if is_misfit and (shape[axis] != block[axis] or overlap[axis] != config.overlap[axis]):
            assert shape[axis] % stride[axis] == 0


def test_where_no_block_fits_an_overlap_is_named() -> None:
    # The stride 47 and the shard 64 meet at 3008 voxels only; overlap 32 has a stride of 32.
    config = make_config(
        (64, 64, 64),
        (64, 64, 64),
        patch_overlap=(16, 16, 17),
        output_chunk_shape=(32, 32, 64),
        output_volume="file:///out/|zarr3:",
    )
    message = advice_of(config, (640, 640, 640))["block.shape"]
    assert "block.shape (96, 96, 64) with patch.overlap (16, 16, 32)" in message


def test_seamless_cost_names_larger_blocks() -> None:
    config = make_config((20, 64, 64), (16, 64, 64), block_stitch="seamless")
    message = advice_of(config, (200, 2000, 2000))["block.shape"]
    assert "(32, 128, 128)" in message and "fewer patches" in message


@pytest.mark.parametrize(
    ("margin", "words"), [((0, 0, 0), "less than half"), ((4, 4, 4), "more than half")]
)
def test_unusual_margins_are_weighed(margin: Triple, words: str) -> None:
    config = make_config((8, 8, 8), (24, 24, 24), block_margin=margin)
    assert words in advice_of(config, (96, 96, 96))["block.margin"]


def test_thin_last_layer() -> None:
    config = make_config((16, 16, 16), (48, 48, 48), patch_overlap=(4, 4, 4))
    message = advice_of(config, (48 * 3 + 3, 96, 96))["block.shape"]
    assert "the last layer of blocks on z is only 3 voxels thick" in message
    assert "stop at 144" in message


def test_batches_that_do_not_fill() -> None:
    config = make_config((8, 8, 8), (12, 12, 12), patch_batch_size=16)
    message = advice_of(config, (96, 96, 96))["patch.batch_size"]
    assert "8 patches" in message and "8 fits" in message


def test_small_volume_and_missing_overlap() -> None:
    config = make_config((8, 8, 8), (8, 8, 8), patch_overlap=(0, 0, 0))
    found = advice_of(config, (5, 64, 64))
    assert "on z: the network sees padding" in found["patch.shape"]
    assert "no overlap on y and x" in found["patch.overlap"]


def test_too_many_files() -> None:
    config = make_config((64, 64, 64), (192, 192, 192), patch_overlap=(16, 16, 16))
    assert (
        "shard_shape (192, 192, 192)" in advice_of(config, (9600, 9600, 9600))["output.shard_shape"]
    )


def test_tiny_chunks() -> None:
    # Primes, of which only the first is below 64.
    message = advice_of(make_config((16, 32, 32), (61, 101, 103)), (200, 300, 300))["block.shape"]
    assert "chunks of (61, 1, 1) are tiny: a block is stored in 10,403 of them" in message
    assert "(64, 128, 128) would be whole chunks" in message
    chosen = make_config((16, 32, 32), (64, 64, 64), output_chunk_shape=(4, 4, 4))
    assert "of them; 32 to 128" in advice_of(chosen, (200, 300, 300))["output.chunk_shape"]
    small = make_config((8, 8, 8), (16, 16, 16), output_chunk_shape=(4, 4, 4))
    assert "output.chunk_shape" not in advice_of(small, (32, 32, 32))
