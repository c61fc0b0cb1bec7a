"""Predictions of turned patches, brought back: against a reference that follows every edge."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.config.scaling import Scaling
from mpichunk.geometry.box import Box, Triple
from mpichunk.geometry.symmetry import (
    NAMES,
    STRAIGHT,
    Augmentation,
    Offsets,
    PatchTurn,
    partner,
    turns_of,
)

Net = Callable[[np.ndarray], np.ndarray]
OPERATIONS: dict[str, Net] = {
    "flip_z": lambda a: a[..., ::-1, :, :],
    "flip_y": lambda a: a[..., ::-1, :],
    "flip_x": lambda a: a[..., ::-1],
    "rot90": lambda a: np.rot90(a, axes=(-2, -1)),
}
AFFINITIES: Offsets = {0: (-1, 0, 0), 1: (0, -1, 0), 2: (0, 0, -1)}
ARRAYS: dict[str, Callable[[], Any]] = {
    "numpy": NumpyArrays,
    "torch": lambda: TorchArrays(torch.device("cpu")),
}
each_arrays = pytest.mark.parametrize("kind", ARRAYS)
groups = st.lists(st.sampled_from(NAMES), unique=True)
every_group = [list(names) for n in range(5) for names in combinations(NAMES, n)]


def turned_ways(names: Iterable[str]) -> list[list[str]]:
    """Return a sequence of operations for each turn of the group, found by trying."""
    index = np.arange(3 * 4 * 4).reshape(3, 4, 4)
    found: dict[bytes, list[str]] = {index.tobytes(): []}
    todo: list[list[str]] = [[]]
    while todo:
        way = todo.pop()
        for name in names:
            longer = [*way, name]
            key = np.ascontiguousarray(do(longer, index)).tobytes()
            if key not in found:
                found[key] = longer
                todo.append(longer)
    return list(found.values())


def do(way: list[str], array: np.ndarray) -> np.ndarray:
    for name in way:
        array = OPERATIONS[name](array)
    return array


def edge_mean(net: Net, patch_czyx: np.ndarray, names: list[str], offsets: Offsets) -> np.ndarray:
    """Average what the network says of each voxel, or of each pair of voxels, over all turns."""
    said: dict[Any, list[float]] = defaultdict(list)
    straight = net(patch_czyx)
    places = np.stack(np.meshgrid(*map(np.arange, straight.shape[1:]), indexing="ij"))
    for way in turned_ways(names):
        output = net(np.ascontiguousarray(do(way, patch_czyx)))
        # Where each turned voxel was; what lies past the border follows from the steps inside.
        origin = do(way, places)
        corner = origin[:, 0, 0, 0]
        steps = [
            np.moveaxis(origin, axis + 1, 1)[:, 1, 0, 0] - corner
            if origin.shape[axis + 1] > 1
            else np.zeros(3, int)
            for axis in range(3)
        ]
        for channel, *voxel in product(range(len(output)), *map(range, output.shape[1:])):
            here = corner + sum(n * step for n, step in zip(voxel, steps, strict=True))
            key: Any = (channel, tuple(here))
            if channel in offsets:
                there = here + sum(
                    n * step for n, step in zip(offsets[channel], steps, strict=True)
                )
                key = frozenset({tuple(here), tuple(there)})
            said[key].append(float(output[(channel, *voxel)]))
    mean = np.zeros(straight.shape)
    for channel, *voxel in product(range(len(mean)), *map(range, mean.shape[1:])):
        key = (channel, tuple(voxel))
        if channel in offsets:
            key = frozenset({tuple(voxel), tuple(np.add(voxel, offsets[channel]))})
        mean[(channel, *voxel)] = np.mean(said[key])
    return mean


def mean_of(kind: str, net: Net, batch_nczyx: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Do what inference does with a batch, through the arrays of a device."""
    arrays = ARRAYS[kind]()
    total = None
    num, num_in, *shape = batch_nczyx.shape
    # The patches lie side by side along z.
    source = np.concatenate(batch_nczyx, axis=1)
    where = [Box.from_shape((i * shape[0], 0, 0), tuple(shape)).slices() for i in range(num)]
    for turn, moves in zip(augmentation.turns, augmentation.moves, strict=True):
        staged = arrays.stage(arrays.feed(source), where, patch_shape=tuple(shape), batch_size=num)
        turned = arrays.gather(staged, scaling=Scaling(), turn=turn)
        assert tuple(turned.shape) == (num, num_in, *shape)
        output = np.stack([net(np.array(patch)) for patch in arrays.download(turned)])
        if total is None:
            total = arrays.sums(output.shape)
        arrays.add_turned(total, arrays.upload(output.astype(np.float32)), turn, moves)
    for share in augmentation.shares:
        arrays.multiply(total[(slice(None), share.channels, *share.part)], share.factor)
    return np.array(arrays.download(total))


def convolution(num_out: int, seed: int = 0, crop: int = 0) -> Net:
    """Return a network that prefers directions: a random kernel, zeros beyond the patch."""
    kernels = np.random.default_rng(seed).normal(size=(num_out, 3, 3, 3))

    def net(patch_czyx: np.ndarray) -> np.ndarray:
        padded = np.pad(patch_czyx.sum(axis=0), 1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3))
        out = np.einsum("zyxabc,kabc->kzyx", windows, kernels)
        inner = slice(crop, -crop or None)
        return out[:, inner, inner, inner]

    return net


@pytest.mark.parametrize("names", every_group)
def test_groups_are_those_found_by_trying(names: list[str]) -> None:
    turns = turns_of(names)
    assert turns[0] == STRAIGHT
    assert turns == turns_of(reversed(names))
    patch = np.random.default_rng(0).random((3, 4, 4))
    made = {turned(patch, turn).tobytes() for turn in turns}
    tried = {np.ascontiguousarray(do(way, patch)).tobytes() for way in turned_ways(names)}
    assert made == tried and len(made) == len(turns)


def turned(array: np.ndarray, turn: PatchTurn) -> np.ndarray:
    flipped = np.flip(array, turn.flipped)
    return np.ascontiguousarray(flipped.swapaxes(-2, -1) if turn.swaps_yx else flipped)


def test_sizes_of_groups() -> None:
    sizes = {tuple(names): len(turns_of(names)) for names in every_group}
    assert sizes[()] == 1 and sizes[("flip_z",)] == 2 and sizes[("rot90",)] == 4
    assert sizes[("flip_y", "flip_x")] == 4 and sizes[("flip_x", "rot90")] == 8
    assert sizes[("flip_y", "flip_x", "rot90")] == 8 and sizes[NAMES] == 16


turns = st.sampled_from(turns_of(NAMES))


@given(turns, turns, st.tuples(*3 * [st.integers(-3, 3)]))
def test_turns_compose(a: PatchTurn, b: PatchTurn, offset: Triple) -> None:
    patch = np.random.default_rng(1).random((3, 4, 4))
    np.testing.assert_array_equal(turned(patch, a.then(b)), turned(turned(patch, a), b))
    assert a.then(b).of(offset) == b.of(a.of(offset))
    assert sorted(map(abs, a.of(offset)[1:])) == sorted(map(abs, offset[1:]))


@each_arrays
@pytest.mark.parametrize("names", every_group)
def test_mean_equals_that_of_all_edges(kind: str, names: list[str]) -> None:
    """Three affinities, between an ordinary channel and another one."""
    offsets = {channel + 1: offset for channel, offset in AFFINITIES.items()}
    net = convolution(5)
    batch = np.random.default_rng(2).random((2, 2, 3, 4, 4)).astype(np.float32)
    augmentation = Augmentation.make(names, num_channels=5, offsets=offsets, shape=(3, 4, 4))
    found = mean_of(kind, net, batch, augmentation)
    for patch, mean in zip(batch, found, strict=True):
        np.testing.assert_allclose(mean, edge_mean(net, patch, names, offsets), atol=1e-5)


LONG_RANGE: list[Offsets] = [
    {0: (1, 0, 0), 1: (0, 1, 0), 2: (0, 0, 1)},  # to the voxel after
    {2: (-1, 0, 0), 1: (0, -1, 0), 0: (0, 0, -1)},  # in another order
    {0: (0, -2, 0), 1: (0, 0, 2), 2: (-3, 0, 0), 3: (-1, 0, 0)},
    {0: (0, -2, -1), 1: (0, -1, 2), 2: (0, 1, 2), 3: (0, 2, -1)},  # oblique
    {0: (-9, 0, 0)},  # further than the patch
]


@settings(max_examples=40)
@given(st.sampled_from(LONG_RANGE), groups, st.sampled_from(sorted(ARRAYS)), st.integers(0, 99))
def test_other_offsets(offsets: Offsets, names: list[str], kind: str, seed: int) -> None:
    net = convolution(5, seed)
    batch = np.random.default_rng(seed).random((1, 1, 4, 5, 5)).astype(np.float32)
    augmentation = Augmentation.make(names, num_channels=5, offsets=offsets, shape=(4, 5, 5))
    found = mean_of(kind, net, batch, augmentation)
    np.testing.assert_allclose(found[0], edge_mean(net, batch[0], names, offsets), atol=1e-5)


def contrast(patch_czyx: np.ndarray) -> np.ndarray:
    """Return an equivariant prediction, affinities and a median; a voxel is lost a side."""
    image = patch_czyx[0]
    inner = tuple(slice(1, -1) for _ in range(3))
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3, 3))
    affinities = [np.abs(image - np.roll(image, 1, axis))[inner] for axis in range(3)]
    return np.stack([*affinities, np.sort(windows.reshape(*windows.shape[:3], 27))[..., 13]])


@each_arrays
@pytest.mark.parametrize("names", every_group)
def test_equivariant_network_is_unchanged(kind: str, names: list[str]) -> None:
    batch = np.random.default_rng(3).random((2, 1, 5, 6, 6)).astype(np.float32)
    augmentation = Augmentation.make(names, num_channels=4, offsets=AFFINITIES, shape=(3, 4, 4))
    found = mean_of(kind, contrast, batch, augmentation)
    straight = np.stack([contrast(patch) for patch in batch])
    np.testing.assert_allclose(found, straight, rtol=3e-7)
    # To treat affinities as they lie would have moved them by a voxel.
    if names:
        naive = Augmentation.make(names, num_channels=4, offsets={}, shape=(3, 4, 4))
        assert np.abs(mean_of(kind, contrast, batch, naive) - straight).max() > 0.1


def test_first_voxel_has_no_answer_from_a_flip() -> None:
    """Worked by hand: 2 along z; what the flipped patch says of the edge (0, 1) is at its end."""
    augmentation = Augmentation.make(
        ["flip_z"], num_channels=1, offsets={0: (-1, 0, 0)}, shape=(3, 1, 1)
    )
    answers = iter([np.array([10.0, 11.0, 12.0]), np.array([20.0, 21.0, 22.0])])
    batch = np.zeros((1, 1, 3, 1, 1), np.float32)
    found = mean_of("numpy", lambda _: next(answers).reshape(1, 3, 1, 1), batch, augmentation)
    # Edge (0,1): 11 straight; the flipped patch's voxel 2 is voxel 0, joined to 1: 22.
    # Edge (1,2): 12 and 21. Edge (-1,0): 10 alone.
    np.testing.assert_array_equal(found.ravel(), [10, (11 + 22) / 2, (12 + 21) / 2])


def test_partner_must_exist() -> None:
    rotation = next(turn for turn in turns_of(["rot90"]) if turn.swaps_yx)
    with pytest.raises(ValueError, match=r"no channel has the offset \[0, 0, -?1\] or"):
        partner(rotation, 0, {0: (0, -1, 0)})
    flip = turns_of(["flip_y"])[1]
    with pytest.raises(ValueError, match="no channel"):
        partner(flip, 0, {0: (0, -1, -1)})
    assert partner(flip, 0, {0: (0, -1, 0)}) == (0, True)


def test_channels_that_go_one_way_go_together() -> None:
    augmentation = Augmentation.make(
        ["flip_z"], num_channels=7, offsets={3: (-1, 0, 0), 4: (0, -1, 0)}, shape=(4, 4, 4)
    )
    straight, flipped = augmentation.moves
    assert [move.target for move in straight] == [slice(0, 7)]
    assert [move.target for move in flipped] == [slice(0, 3), slice(3, 4), slice(4, 7)]
