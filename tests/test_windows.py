"""Blending windows that are kept: the right one for each patch, and no more than a plan counts."""

from typing import Any

import numpy as np
import pytest
import torch

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.block.windows import Windows
from mpichunk.geometry import buffers
from mpichunk.geometry.blending import shares, window
from mpichunk.geometry.box import Box
from mpichunk.geometry.buffers import most_windows
from mpichunk.plan.plan import Plan
from tests.blockinference import make_plan
from tests.lagging import lagging_arrays

SHAPE = 5, 8, 9
Z, Y, X = (window("bump", length) for length in SHAPE)


class Counting:
    """Arrays that note what is asked of them."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.num_windows = self.num_new = self.num_vectors = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def vector(self, host: Any) -> Any:
        self.num_vectors += 1
        return self._inner.vector(host)

    def window(self, z: Any, y: Any, x: Any, used: Any = None) -> Any:
        self.num_windows += 1
        self.num_new += used is None
        return self._inner.window(z, y, x, used)


def plan_of_long_blocks(width: int = 54) -> Plan:
    """Return blocks that are as wide as the volume, which 51 voxels make a whole lattice."""
    domain = Box(start=(0, 0, 0), stop=(23, 53, width))
    return make_plan(
        volume=domain,
        roi=domain,
        output_domain=domain,
        block_shape=(14, 28, width),
        overlap=(2, 3, 3),
    )


def check_all_patches(windows: Windows, plan: Plan) -> None:
    """Assert that each patch of each block gets its own shares."""
    for block in plan:
        windows.begin(block)
        by_axis = [
            dict(zip(starts, shares(starts, weights), strict=True))
            for starts, weights in zip(block.starts, (Z, Y, X), strict=True)
        ]
        for box in block.patches():
            z, y, x = (by[start] for by, start in zip(by_axis, box.start, strict=True))
            found = windows.of(box)
            if isinstance(found, tuple):
                found = found[0][:, None, None] * found[1]
            expected = z[:, None, None] * np.multiply.outer(y, x)
            np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    "make", [NumpyArrays, lambda: TorchArrays(torch.device("cpu")), lagging_arrays]
)
@pytest.mark.parametrize("kept", [1, 2, 5, 1000])
def test_each_patch_gets_its_shares(make: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "WINDOWS_NBYTES", kept * 4 * 5 * 8 * 9)
    check_all_patches(Windows(make(), (Z, Y, X)), plan_of_long_blocks())


def test_an_accelerator_makes_each_window_once() -> None:
    arrays, plan = Counting(lagging_arrays()), plan_of_long_blocks(width=51)
    windows = Windows(arrays, (Z, Y, X))
    for _ in range(3):
        windows.begin(plan[0])
        for box in plan[0].patches():
            windows.of(box)
    assert arrays.num_windows == arrays.num_new == 27 < plan[0].num_patches
    # The first, the last, or neither along each axis.
    assert arrays.num_vectors == 9
    windows.clear()
    windows.of(next(plan[0].patches()))
    assert (arrays.num_windows, arrays.num_vectors) == (28, 12)


def test_no_more_are_kept_than_a_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in (1, 4, 1000):
        monkeypatch.setattr(buffers, "WINDOWS_NBYTES", kept * 4 * 5 * 8 * 9)
        arrays, plan = Counting(lagging_arrays()), plan_of_long_blocks()
        check_all_patches(Windows(arrays, (Z, Y, X)), plan)
        most = max(block.num_patches for block in plan)
        assert arrays.num_new <= most_windows(SHAPE, most) <= kept


def test_a_host_keeps_one() -> None:
    arrays = Counting(NumpyArrays())
    check_all_patches(Windows(arrays, (Z, Y, X)), plan_of_long_blocks())
    assert arrays.num_new == 1


def test_how_many() -> None:
    assert most_windows((10, 10, 10), 1) == 1
    assert most_windows((10, 10, 10), 8) == 8
    assert most_windows((20, 256, 256), 1000) == 27
    assert most_windows((192, 192, 192), 1000) == 9
    assert most_windows((512, 512, 512), 1000) == 1
