"""Padding of a part equals numpy.pad of the whole, wherever the box lies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.geometry.box import Box, triple
from mpichunk.geometry.padding import pad, source_box

MODES = ("reflect", "edge", "zero")
NUMPY_MODES = {"reflect": "reflect", "edge": "edge", "zero": "constant"}


def volume_of(domain: Box, channels: int = 2) -> np.ndarray:
    shape = (channels, *domain.shape)
    return np.random.default_rng(0).integers(1, 255, shape).astype(np.uint8)


def padded_whole(whole_czyx: np.ndarray, domain: Box, wanted: Box, mode: str) -> np.ndarray:
    """Pad the whole volume as far as needed, then cut: the specification."""
    before = [max(0, d - w) for d, w in zip(domain.start, wanted.start, strict=True)]
    after = [max(0, w - d) for d, w in zip(domain.stop, wanted.stop, strict=True)]
    widths = [(0, 0), *zip(before, after, strict=True)]
    big = np.pad(whole_czyx, widths, mode=NUMPY_MODES[mode])
    origin = triple([d - b for d, b in zip(domain.start, before, strict=True)])
    return big[(slice(None), *wanted.slices(origin))]


def padded_part(whole_czyx: np.ndarray, domain: Box, wanted: Box, mode: str) -> np.ndarray:
    inside = source_box(wanted, domain)
    assert domain.contains(inside) and not inside.is_empty
    part = whole_czyx[(slice(None), *inside.slices(domain.start))]
    return pad(part, inside, wanted, domain, mode)


axis = st.tuples(
    st.integers(-9, 9), st.integers(1, 7), st.integers(-12, 12), st.integers(1, 25)
)  # start and length of the domain, start relative to it and length of the box


@given(axis, axis, axis, st.sampled_from(MODES))
def test_a_padded_part_equals_the_padded_whole(z, y, x, mode):
    axes = (z, y, x)
    domain = Box.from_shape(triple([a[0] for a in axes]), triple([a[1] for a in axes]))
    wanted = Box.from_shape(triple([a[0] + a[2] for a in axes]), triple([a[3] for a in axes]))
    whole = volume_of(domain)
    found = padded_part(whole, domain, wanted, mode)
    np.testing.assert_array_equal(found, padded_whole(whole, domain, wanted, mode))
    assert found.flags.c_contiguous or found.base is whole or wanted == source_box(wanted, domain)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_missing_gives_the_same_array(mode):
    domain = Box.from_shape((-5, 0, 7), (6, 7, 8))
    wanted = Box(start=(-4, 1, 8), stop=(0, 5, 12))
    assert source_box(wanted, domain) == wanted
    part = np.ones((1, *wanted.shape), np.float32)
    assert pad(part, wanted, wanted, domain, mode) is part


def test_a_thin_axis_repeats_its_voxel():
    domain = Box.from_shape((0, 0, 0), (1, 2, 3))
    wanted = domain.grow((4, 0, 0))
    whole = volume_of(domain)
    found = padded_part(whole, domain, wanted, "reflect")
    np.testing.assert_array_equal(found, np.repeat(whole, 9, axis=1))


def test_a_wider_source_serves_too():
    domain = Box.from_shape((0, 0, 0), (9, 9, 9))
    wanted = Box(start=(2, -3, 1), stop=(5, 4, 12))
    whole = volume_of(domain)
    for mode in MODES:
        found = pad(whole, domain, wanted, domain, mode)
        np.testing.assert_array_equal(found, padded_whole(whole, domain, wanted, mode))


def test_little_is_read_beyond_the_box():
    domain = Box.from_shape((0, 0, 0), (1000, 1000, 1000))
    assert source_box(Box(start=(-5, 10, 990), stop=(50, 20, 1010)), domain) == Box(
        start=(0, 10, 989), stop=(50, 20, 1000)
    )
    assert source_box(Box(start=(5, 5, 5), stop=(5, 9, 9)), domain).is_empty
