"""Lattices of one axis against the rule written as a loop."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.geometry.lattice import AxisLattice, axis_lattice
from tests.reference import lattice as naive_lattice


@st.composite
def intervals(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """Draw a volume, an interval in it, a patch and a stride."""
    low = draw(st.integers(-30, 30))
    high = low + draw(st.integers(1, 60))
    start = draw(st.integers(low, high - 1))
    stop = draw(st.integers(start + 1, high))
    patch = draw(st.integers(1, 20))
    stride = draw(st.integers(1, patch))
    return low, high, start, stop, patch, stride


Interval = tuple[int, int, int, int, int, int]


def lattice_of(interval: Interval) -> AxisLattice:
    low, _, start, stop, patch, stride = interval
    return axis_lattice(start, stop, low=low, patch=patch, stride=stride)


@given(intervals())
def test_lattice_is_the_naive_one(interval: Interval) -> None:
    low, _, start, stop, patch, stride = interval
    lattice = lattice_of(interval)
    starts = [lattice[i] for i in range(len(lattice))]
    assert starts == naive_lattice(start, stop, low, patch, stride)


@given(intervals())
def test_lattice_covers_its_interval_with_steps_of_at_most_a_stride(interval: Interval) -> None:
    _, _, start, stop, patch, stride = interval
    lattice = lattice_of(interval)
    starts = [lattice[i] for i in range(len(lattice))]
    assert starts[0] <= start and starts[-1] + patch >= stop
    assert all(0 < b - a <= stride for a, b in pairwise(starts))


@given(intervals())
def test_patches_lie_inside_a_volume_that_holds_one(interval: Interval) -> None:
    low, high, _, _, patch, _ = interval
    lattice = lattice_of(interval)
    if high - low >= patch:
        assert low <= lattice.first and lattice.last + patch <= high
    else:
        assert lattice.first == lattice.last == low


@given(intervals(), st.integers(-50, 120), st.integers(1, 40))
def test_touching_finds_every_patch_that_shares_a_voxel(
    interval: Interval, start: int, length: int
) -> None:
    patch, stop = interval[4], start + length
    lattice = lattice_of(interval)
    starts = [lattice[i] for i in range(len(lattice))]
    expected = [i for i, a in enumerate(starts) if a < stop and a + patch > start]
    assert list(lattice.touching(start, stop)) == expected


def test_index_outside_is_refused() -> None:
    lattice = axis_lattice(0, 30, low=0, patch=10, stride=8)
    assert [lattice[i] for i in range(len(lattice))] == [0, 8, 16, 20]
    for index in (-1, 4):
        with pytest.raises(IndexError, match="lattice of 4"):
            lattice[index]


def test_lattice_of_a_petavoxel_line_costs_nothing() -> None:
    started = time.perf_counter()
    for _ in range(1000):
        lattice = axis_lattice(-5, 10**15, low=-5, patch=100, stride=77)
        assert lattice[0] == -5 and lattice[len(lattice) - 1] == 10**15 - 100
        middle = 5 * 10**14
        assert all(lattice[i] < middle + 50 for i in lattice.touching(middle, middle + 50))
    assert time.perf_counter() - started < 1
