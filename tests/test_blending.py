"""Windows against the formulas written out, and their sums against whole volumes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.geometry.blending import FLOOR, sum_of_windows, window
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


@given(
    names,
    st.integers(1, 12),
    st.lists(st.integers(-20, 30), max_size=8),
    st.integers(-20, 20),
    st.integers(1, 30),
)
def test_sum_of_windows_is_the_naive_sum(
    name: str, length: int, starts: list[int], start: int, num: int
) -> None:
    weights = window(name, length)
    expected = [
        sum(float(weights[p - a]) for a in starts if a <= p < a + length)
        for p in range(start, start + num)
    ]
    total = sum_of_windows(starts, weights, start, start + num)
    assert total.dtype == np.float32
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@given(names)
def test_sum_of_weights_is_a_product_of_three_vectors(name: str) -> None:
    shape, starts = (3, 5, 4), ([0, 2], [0, 3, 4], [0, 2, 5])
    extents = [s[-1] + n for s, n in zip(starts, shape, strict=True)]
    volume_zyx = np.zeros(extents)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                volume_zyx[z : z + 3, y : y + 5, x : x + 4] += naive_window(name, shape)
    sums = [
        sum_of_windows(s, window(name, n), 0, extent)
        for s, n, extent in zip(starts, shape, extents, strict=True)
    ]
    product_zyx = sums[0][:, None, None] * sums[1][:, None] * sums[2]
    np.testing.assert_allclose(product_zyx, volume_zyx, rtol=2e-6)
