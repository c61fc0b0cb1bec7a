"""Windows against the formulas written out, and their sums against whole volumes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.geometry.blending import FLOOR, shares, window
from tests.reference import window as naive_window
from tests.reference import window_axis

NAMES = ["bump", "gaussian", "hann", "uniform"]
names = st.sampled_from(NAMES)


@given(names, st.integers(1, 300))
def test_window_is_positive_symmetric_float32_with_maximum_one(name: str, length: int) -> None:
    weights = window(name, length)
    assert weights.dtype == np.float32 and weights.shape == (length,)
    assert weights.min() >= np.float32(FLOOR) > 0 and weights.max() == 1
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-6)


@given(names, st.integers(1, 300))
def test_window_is_its_formula(name: str, length: int) -> None:
    np.testing.assert_allclose(window(name, length), window_axis(name, length), rtol=2e-7)


@pytest.mark.parametrize("name", NAMES)
def test_window_rises_to_the_middle(name: str) -> None:
    half = window(name, 33)[:17]
    assert (np.diff(half) >= 0).all()
    assert name == "uniform" or half[0] < 0.01


def test_floor_holds_where_a_formula_underflows() -> None:
    # exp(-1/(1-u^2)) of the first of 2000 voxels is about 1e-217.
    assert window("bump", 2000)[0] == np.float32(FLOOR)
    assert window("gaussian", 33)[0] > np.float32(FLOOR)


def test_unknown_window_is_refused() -> None:
    with pytest.raises(KeyError):
        window("triangle", 8)


@given(names, st.integers(1, 12), st.integers(-20, 20), st.data())
def test_shares_are_weights_over_the_naive_sum(
    name: str, length: int, first: int, data: st.DataObject
) -> None:
    steps = data.draw(st.lists(st.integers(0, length), max_size=6))
    starts = [first + sum(steps[:i]) for i in range(len(steps) + 1)]
    weights = window(name, length)
    found = shares(starts, weights)
    for start, share in zip(starts, found, strict=True):
        assert share.dtype == np.float32 and share.shape == (length,) and (share > 0).all()
        for k in range(length):
            there = [float(weights[start + k - a]) for a in starts if 0 <= start + k - a < length]
            np.testing.assert_allclose(share[k], float(weights[k]) / sum(there), rtol=1e-6)


@given(names)
def test_products_of_shares_are_shares_of_products(name: str) -> None:
    shape, starts = (3, 5, 4), ([0, 2], [0, 3, 4], [0, 2, 5])
    total_zyx = np.zeros([s[-1] + n for s, n in zip(starts, shape, strict=True)])
    patches = list(product(*starts))
    for z, y, x in patches:
        total_zyx[z : z + 3, y : y + 5, x : x + 4] += naive_window(name, shape)
    by_axis = [
        dict(zip(s, shares(s, window(name, n)), strict=True))
        for s, n in zip(starts, shape, strict=True)
    ]
    for z, y, x in patches:
        share = by_axis[0][z][:, None, None] * by_axis[1][y][:, None] * by_axis[2][x]
        expected = naive_window(name, shape) / total_zyx[z : z + 3, y : y + 5, x : x + 4]
        np.testing.assert_allclose(share, expected, rtol=2e-6)
