"""Boxes and grids against sets of voxels."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.geometry.box import Box, Grid, Triple, ceil_div
from tests.geometries import boxes, triples


def voxels(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(boxes(), boxes())
def test_box_relations_are_those_of_sets(a: Box, b: Box) -> None:
    assert voxels(a.intersect(b)) == voxels(a) & voxels(b)
    assert a.contains(b) == (voxels(b) <= voxels(a))


@given(boxes())
def test_box_counts_its_voxels(box: Box) -> None:
    assert box.num_voxels == len(voxels(box))
    assert box.is_empty == (not voxels(box))


def test_reversed_box_is_empty() -> None:
    box = Box(start=(5, 0, 0), stop=(3, 2, 2))
    assert box.is_empty and box.shape == (0, 2, 2) and box.num_voxels == 0


@given(boxes(), triples(-5, 5))
def test_translate_moves_every_voxel(box: Box, offset: Triple) -> None:
    z, y, x = offset
    assert voxels(box.translate(offset)) == {(a + z, b + y, c + x) for a, b, c in voxels(box)}


@given(boxes(), triples(0, 3))
def test_grow_and_shrink_cancel(box: Box, width: Triple) -> None:
    grown = box.grow(width)
    assert grown.contains(box)
    assert grown.grow((-width[0], -width[1], -width[2])) == box


@given(boxes(low=0), triples(-4, 0))
def test_slices_index_an_array_of_absolute_coordinates(box: Box, origin: Triple) -> None:
    array_zyx = np.zeros((25, 25, 25), dtype=np.uint8)
    array_zyx[box.slices(origin)] = 1
    found = {tuple(int(i) for i in v) for v in np.argwhere(array_zyx) + np.array(origin)}
    assert found == voxels(box)


@given(triples(-9, 9), triples(1, 5), boxes())
def test_grid_tiles_its_bounds_exactly_once(origin: Triple, step: Triple, bounds: Box) -> None:
    grid = Grid(origin=origin, step=step, bounds=bounds)
    cells = list(grid)
    assert len(cells) == len(grid)
    assert not any(cell.is_empty for cell in cells)
    assert sum(cell.num_voxels for cell in cells) == bounds.num_voxels
    assert set().union(*map(voxels, cells)) == voxels(bounds)


@given(triples(-9, 9), triples(1, 5), boxes())
def test_grid_cells_are_anchored_and_in_order(origin: Triple, step: Triple, bounds: Box) -> None:
    cells = list(Grid(origin=origin, step=step, bounds=bounds))
    assert [cell.start for cell in cells] == sorted(cell.start for cell in cells)
    for cell in cells:
        for o, s, a, b, low, high in zip(
            origin, step, cell.start, cell.stop, bounds.start, bounds.stop, strict=True
        ):
            assert (a - o) % s == 0 or a == low
            assert (b - o) % s == 0 or b == high
            assert (a - o) // s == (b - 1 - o) // s


def test_grid_refuses_what_is_not_in_it() -> None:
    grid = Grid(origin=(0, 0, 0), step=(2, 2, 2), bounds=Box.from_shape((0, 0, 0), (4, 4, 4)))
    for index in (-1, 8):
        with pytest.raises(IndexError, match="grid of 8"):
            grid[index]


def test_grid_of_a_petavoxel_costs_nothing() -> None:
    bounds = Box.from_shape((-7, 3, 0), (10**5, 10**5, 10**5))
    grid = Grid(origin=(-7, 3, 0), step=(3, 5, 7), bounds=bounds)
    started = time.perf_counter()
    for _ in range(1000):
        assert grid[0].start == bounds.start
        assert grid[len(grid) - 1].stop == bounds.stop
    assert time.perf_counter() - started < 1


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**15))
def test_ceil_div(a: int, b: int) -> None:
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b
