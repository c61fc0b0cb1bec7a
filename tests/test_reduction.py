"""What is made of blended channels: every voxel against a rule written out as a loop."""

from itertools import product
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.backends.reduction import runs, shut, store
from mpichunk.config.reduction import Reduction
from mpichunk.config.schema import Config
from tests.geometries import make_config

ARRAYS: dict[str, Any] = {
    "numpy": NumpyArrays,
    "torch": lambda: TorchArrays(torch.device("cpu")),
}
DTYPES = ["uint8", "int8", "uint16", "int16", "float16", "float32"]
VALUES = [0.0, -0.0, 0.2, 0.5, 0.5000001, 1.0, -1.0, 3.0]
"""Few, so that many are equal, zero, or at a threshold."""


@st.composite
def reductions(draw: st.DrawFn, num_channels: int) -> Reduction:
    channels = draw(st.lists(st.integers(0, num_channels - 1), unique=True, min_size=1))
    gate = st.tuples(st.integers(0, num_channels - 1), st.sampled_from(VALUES))
    return Reduction(
        channels=tuple(channels),
        gate=draw(st.none() | gate),
        kind=draw(st.sampled_from(["values", "argmax", "vote", "threshold"])),
        threshold=draw(st.sampled_from([0.0, 0.2, 0.5])),
    )


def reduce_voxel(values: list[float], reduction: Reduction) -> list[float]:
    """Return what is written of one voxel, before it is quantised."""
    used = [values[channel] for channel in reduction.channels]
    if reduction.gate is not None:
        gate, below = reduction.gate
        if not values[gate] < np.float32(below):
            used = [v if c == gate else 0.0 for c, v in zip(reduction.channels, used, strict=True)]
    if reduction.kind == "threshold":
        return [float(value > np.float32(reduction.threshold)) for value in used]
    if reduction.kind == "values":
        return used
    best = used.index(max(used))
    if reduction.kind == "argmax":
        return [best]
    return [best + 1 if any(used) else 0]


@given(st.data(), st.sampled_from(sorted(ARRAYS)), st.integers(1, 4), st.sampled_from(DTYPES))
def test_every_voxel(data: st.DataObject, kind: str, num_channels: int, dtype: str) -> None:
    reduction = data.draw(reductions(num_channels))
    seed = data.draw(st.integers(0, 1000))
    shape = (2, 3, 5)
    random = np.random.default_rng(seed)
    total = random.choice(np.array(VALUES, np.float32), (num_channels, *shape))
    expected = np.zeros((reduction.num_channels, *shape), np.float32)
    for z, y, x in product(*map(range, shape)):
        expected[:, z, y, x] = reduce_voxel(total[:, z, y, x].tolist(), reduction)
    if reduction.kind == "values" and np.dtype(dtype).kind in "ui":
        expected = np.rint(np.clip(expected, 0, 1) * np.float32(np.iinfo(dtype).max))

    arrays = ARRAYS[kind]()
    device_total = arrays.upload(total.copy())
    found = np.empty(expected.shape, dtype)
    out = arrays.outgoing(found)
    shut(reduction, arrays, device_total)
    store(reduction, arrays, device_total, out)
    arrays.send(out, found)
    np.testing.assert_array_equal(found, expected.astype(dtype))


@given(st.data(), st.integers(1, 4), st.sampled_from(["argmax", "vote", "threshold", "values"]))
def test_zero_stays_zero(data: st.DataObject, num_channels: int, kind: Any) -> None:
    """So that a blank block, which is never computed, is what its voxels are elsewhere."""
    reduction = data.draw(reductions(num_channels))
    arrays = NumpyArrays()
    total = np.zeros((num_channels, 2, 2, 2), np.float32)
    out = np.ones((reduction.num_channels, 2, 2, 2), np.uint8)
    shut(reduction, arrays, total)
    store(reduction, arrays, total, out)
    assert not out.any()


def test_channels_that_follow_one_another_are_one_run() -> None:
    found = list(runs((0, 1, 2, 5, 4, 6, 7)))
    assert [(s.start, s.stop) for s, _ in found] == [(0, 3), (5, 6), (4, 5), (6, 8)]
    assert [(t.start, t.stop) for _, t in found] == [(0, 3), (3, 4), (4, 5), (5, 7)]


def of(out_channels: int, **output: Any) -> tuple[Config, Reduction]:
    more = {f"output_{key}": value for key, value in output.items()}
    config = make_config((8, 8, 8), (8, 8, 8), model_out_channels=out_channels, **more)
    return config, Reduction.of(config)


def test_config_to_reduction() -> None:
    config, reduction = of(4, gate={"channel": 3, "below": 0.2})
    assert reduction == Reduction(channels=(0, 1, 2), gate=(3, 0.2))
    assert (config.num_written_channels, config.output.dtype) == (3, "float32")

    config, reduction = of(4, gate={"channel": 0, "below": 0.5}, reduce="vote")
    assert reduction == Reduction(channels=(1, 2, 3), gate=(0, 0.5), kind="vote")
    assert (config.num_written_channels, config.output.dtype) == (1, "uint8")

    config, reduction = of(4, channels=[2, 0], threshold=0.25)
    assert reduction == Reduction(channels=(2, 0), kind="threshold", threshold=0.25)
    assert (config.num_written_channels, config.output.dtype) == (2, "uint8")

    config, reduction = of(3, reduce="argmax", dtype="uint16")
    assert reduction == Reduction(channels=(0, 1, 2), kind="argmax")
    assert (config.num_written_channels, config.output.dtype) == (1, "uint16")
    assert config.with_defaults() == Config.model_validate(config.with_defaults().model_dump())
