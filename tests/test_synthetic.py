"""The computed volume: the same voxel in every box, EM-like, URLs understood or refused."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, triple
from mpichunk.volume import synthetic
from mpichunk.volume.synthetic import TILE, Membranes, parse_synthetic
from tests.metrics import auc

URL = "synthetic://membranes?shape=64,512,512"


# ---- The same voxel in every box


@st.composite
def box_and_part(draw: st.DrawFn) -> tuple[Box, Box]:
    """A box somewhere in a petabyte, some tiles large, and a part of it."""
    start = triple([draw(st.integers(-(2**41), 2**41)) for _ in range(3)])
    shape = triple([draw(st.integers(1, n + 10)) for n in TILE])
    low = triple([draw(st.integers(0, n - 1)) for n in shape])
    part = triple([draw(st.integers(1, n - a)) for a, n in zip(low, shape, strict=True)])
    whole = Box.from_shape(start, shape)
    return whole, Box.from_shape(low, part).translate(start)


@settings(max_examples=25)
@given(box_and_part(), st.integers(0, 2**64 - 1))
def test_part_of_a_box_is_the_same_as_the_box_of_the_part(
    boxes: tuple[Box, Box], seed: int
) -> None:
    whole, part = boxes
    volume = Membranes(shape=(1, 1, 1), seed=seed)
    for field in (volume.image, volume.truth):
        np.testing.assert_array_equal(field(part), field(whole)[part.slices(whole.start)])


def test_offset_and_shape_choose_a_part_of_the_same_tissue() -> None:
    box = Box.from_shape((-3, 5, 9), (4, 5, 6))
    here = Membranes(shape=(9, 9, 9), seed=3).image(box)
    there = Membranes(shape=(4, 5, 6), seed=3, offset=(-3, 5, 9))
    assert there.domain == box
    np.testing.assert_array_equal(here, there.image(there.domain))


def test_seeds_and_places_differ() -> None:
    box = Box.from_shape((0, 0, 0), (8, 32, 32))
    images = [Membranes(shape=(1, 1, 1), seed=seed).image(box) for seed in (0, 1, 2**63)]
    images += [Membranes(shape=(1, 1, 1)).image(box.translate((0, 0, x))) for x in (32, 2**40)]
    assert len({image.tobytes() for image in images}) == len(images)


IMAGE_CRC = 3858804012
TRUTH_CRC = 2980288021


def test_bytes_are_the_same_on_every_machine() -> None:
    volume = Membranes(shape=(1, 1, 1), seed=7)
    box = Box.from_shape((2**40, -20, 100), (20, 40, 50))
    assert zlib.crc32(volume.image(box).tobytes()) == IMAGE_CRC
    assert zlib.crc32(np.packbits(volume.truth(box)).tobytes()) == TRUTH_CRC


def test_nearest_cells_are_those_of_a_search_without_short_cuts() -> None:
    """Every seed of many cubes around, and plain floating-point distances."""
    tile = Box.from_shape((100, -50, 7), (6, 9, 11))
    cells = synthetic._cells(tile, 5)
    position = np.stack(synthetic._position(tile, 5), axis=-1)[..., None, :].astype(np.float64)
    # The seeds of a much larger tile, moved to this one's start.
    wide = tile.grow((100, 40, 40))
    ends = [np.array([[[0]], [[n * u]]]) for n, u in zip(wide.shape, synthetic.UNITS, strict=True)]
    seeds = synthetic._seeds_near(wide, ends, 5)
    points = seeds.position - np.multiply((100, 40, 40), synthetic.UNITS)
    distance = ((position - points) ** 2).sum(-1) - seeds.weight
    order = np.argsort(distance, axis=-1)
    first, second = points[order[..., 0]], points[order[..., 1]]
    gap = np.diff(np.sort(distance, axis=-1)[..., :2], axis=-1)[..., 0]
    slope = 2 * np.linalg.norm((first - second) * np.array(synthetic.UNITS), axis=-1)
    np.testing.assert_array_equal(cells.seeds.position[cells.owner], first)
    np.testing.assert_allclose(cells.to_face, gap / slope, rtol=1e-5)


# ---- Like electron microscopy


@pytest.mark.parametrize("seed", [0, 7])
def test_darkness_alone_does_not_find_the_membranes(seed: int) -> None:
    volume = Membranes(shape=(32, 160, 160), seed=seed)
    image, truth = volume.image(volume.domain), volume.truth(volume.domain)
    assert 0.15 < truth.mean() < 0.35
    assert 0.6 < auc(255 - image, truth) <= 0.85
    assert image.min() > 0, "a patch must never be blank"
    # FIB-25: mean 130, deviation 33.
    assert 100 < image.mean() < 150
    assert 20 < image.std() < 45


def test_every_cell_property_is_there() -> None:
    volume = Membranes(shape=(32, 160, 160), seed=7)
    image, truth = volume.image(volume.domain).astype(int), volume.truth(volume.domain)
    organelles = (image < 85) & ~truth
    assert 0.02 < organelles.mean() < 0.25
    assert image[truth].mean() < image[~truth & ~organelles].mean() - 15


# ---- URLs


def test_url_with_everything() -> None:
    volume = parse_synthetic(f"{URL}&seed=7&offset=-5,0,3&voxel_size=8,8.5,4")
    assert volume == Membranes(
        shape=(64, 512, 512), seed=7, offset=(-5, 0, 3), voxel_size=(8.0, 8.5, 4.0)
    )
    assert parse_synthetic(URL) == Membranes(shape=(64, 512, 512))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("synthetic://cells?shape=1,2,3", "no such synthetic volume"),
        ("synthetic://membranes", "shape is missing"),
        ("synthetic://membranes?shape=1,2", "shape=1,2 is not 3 whole numbers from 1 to"),
        ("synthetic://membranes?shape=1,2,0", "shape=1,2,0 is not"),
        ("synthetic://membranes?shape=1,2,3.5", "shape=1,2,3.5 is not"),
        ("synthetic://membranes?shape=", "shape= is not"),
        (f"{URL}&shape=1,2,3", "shape=64,512,512,1,2,3 is not"),
        (f"{URL}&seed=-1", "seed=-1 is not 1 whole number from 0 to"),
        (f"{URL}&sed=7", "sed is unknown"),
        (f"{URL}&voxel_size=nan,1,1", "voxel_size=nan,1,1 is not 3 numbers"),
        (f"{URL}&offset=0,0,9999999999999999999", "offset=0,0,9999999999999999999 is not"),
    ],
)
def test_bad_url(url: str, found: str) -> None:
    with pytest.raises(VolumeError) as error:
        parse_synthetic(url, key="mask.volume")
    assert str(error.value).startswith(f"{url}: ")
    assert found in str(error.value)
    assert "synthetic://membranes?shape=64,512,512" in str(error.value)
    assert error.value.key == "mask.volume"
