"""The array operations, numpy and torch alike."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.config.scaling import Scaling

ARRAYS = [NumpyArrays, lambda: TorchArrays(torch.device("cpu"))]
ARRAY_IDS = ["numpy", "torch"]
both_arrays = pytest.mark.parametrize("make", ARRAYS, ids=ARRAY_IDS)

RNG = np.random.default_rng(7)


@both_arrays
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float64"]
)
def test_gather_scales_exactly_and_pads_the_batch(make, dtype):
    source_czyx = RNG.integers(0, 100, (2, 6, 7, 8)).astype(dtype)
    scaling = Scaling(clip=(3, 90), subtract=2.5, divide=7)
    where = [(slice(0, 3), slice(1, 5), slice(2, 7)), (slice(3, 6), slice(3, 7), slice(0, 5))]
    arrays = make()
    for count in (2, 1):  # the second time, the buffer holds an old patch in place of the padding
        staged = arrays.stage(
            arrays.feed(source_czyx), where[:count], patch_shape=(3, 4, 5), batch_size=2
        )
        batch = arrays.gather(staged, scaling=scaling)
        raw = [source_czyx[(slice(None), *w)].astype(np.float32) for w in where[:count]]
        expected = [(np.clip(r, 3, 90) - np.float32(2.5)) / np.float32(7) for r in raw] + [
            np.zeros((2, 3, 4, 5), np.float32)
        ] * (2 - count)
        np.testing.assert_array_equal(arrays.download(batch), np.stack(expected))


@both_arrays
def test_gather_divides_instead_of_multiplying_by_the_reciprocal(make):
    source_czyx = np.arange(65536, dtype=np.uint16).reshape(1, 16, 64, 64)
    arrays = make()
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(arrays.feed(source_czyx), whole, patch_shape=(16, 64, 64), batch_size=1)
    batch = arrays.gather(staged, scaling=Scaling(divide=65535.0))
    expected = source_czyx.astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(arrays.download(batch)[0], expected)


@both_arrays
def test_upload_takes_what_numpy_makes(make):
    arrays = make()
    base = RNG.integers(0, 9, (1, 4, 5, 6)).astype(np.uint8)
    base.setflags(write=False)
    for view in (base, base[:, ::-1, ::2], np.asfortranarray(base)):
        np.testing.assert_array_equal(arrays.download(arrays.upload(view)), view)


@both_arrays
@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_activations(make, activation):
    batch = np.array([-1e30, -200.0, -3.0, 0.0, 0.5, 88.0, 1e30], np.float32)
    batch_nczyx = np.stack([batch, batch[::-1], RNG.normal(size=7).astype(np.float32)])
    batch_nczyx = batch_nczyx.reshape(1, 3, 1, 1, 7)
    with np.errstate(over="ignore"):
        exact = batch_nczyx.astype(np.float64)
        power = np.exp(exact - exact.max(axis=1, keepdims=True))
        expected = {
            "none": exact,
            "sigmoid": 1 / (1 + np.exp(-exact)),
            "softmax": power / power.sum(axis=1, keepdims=True),
        }[activation]
    arrays = make()
    before = batch_nczyx.copy()
    found = arrays.download(arrays.activate(arrays.upload(batch_nczyx), activation))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(batch_nczyx, before)


@both_arrays
def test_activation_of_a_view_that_repeats_channels(make):
    arrays = make()
    one = arrays.upload(RNG.normal(size=(1, 1, 2, 3, 4)).astype(np.float32))
    wide = one.expand(1, 3, 2, 3, 4) if isinstance(one, torch.Tensor) else one.repeat(3, axis=1)
    if isinstance(one, np.ndarray):
        wide = np.broadcast_to(one, (1, 3, 2, 3, 4))
    found = arrays.download(arrays.activate(wide, "sigmoid"))
    np.testing.assert_allclose(
        found[0, 2], 1 / (1 + np.exp(-arrays.download(one)[0, 0])), rtol=1e-6
    )


@both_arrays
def test_add_weighted(make):
    arrays = make()
    patch_czyx = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
    z, y, x = (RNG.uniform(0.1, 1, n).astype(np.float32) for n in (4, 5, 6))
    where = slice(1, 4), slice(0, 2), slice(3, 8)
    part = slice(1, 4), slice(3, 5), slice(0, 5)
    total = arrays.zeros((2, 5, 6, 9))
    made = None
    for _ in range(2):
        made = arrays.window(*(arrays.vector(vector) for vector in (z, y, x)), made)
        arrays.add_weighted(total, where, arrays.upload(patch_czyx), part, made)
    weight_zyx = np.einsum("i,j,k->ijk", *(v.astype(np.float64) for v in (z, y, x)))
    expected = np.zeros((2, 5, 6, 9))
    expected[(slice(None), *where)] = 2 * (patch_czyx * weight_zyx)[(slice(None), *part)]
    np.testing.assert_allclose(arrays.download(total), expected, rtol=1e-6)

    again = arrays.zeros((1, 5, 6, 9))
    assert not arrays.download(again).any()


def one_patch(arrays):
    """Return what brings one patch through all that is done to patches, and its bytes."""
    source_czyx = RNG.integers(0, 100, (1, 16, 64, 64)).astype(np.uint8)
    whole = (slice(None), slice(None), slice(None))
    total = arrays.zeros((1, 16, 64, 64))
    ones = arrays.window(*(arrays.vector(np.ones(n, np.float32)) for n in (16, 64, 64)))

    def patch():
        staged = arrays.stage(
            arrays.feed(source_czyx), [whole], patch_shape=(16, 64, 64), batch_size=2
        )
        batch = arrays.gather(staged, scaling=Scaling(clip=(1, 90), subtract=2, divide=7))
        activated = arrays.activate(batch, "sigmoid")
        arrays.add_weighted(total, whole, activated[0], whole, ones)

    patch()
    return patch, total.nbytes


def test_numpy_makes_no_array_for_a_patch():
    patch, nbytes = one_patch(NumpyArrays())
    tracemalloc.start()
    try:
        for _ in range(3):
            patch()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # numpy converts by way of a buffer of some thousand values.
    assert peak < nbytes / 2


def test_torch_makes_no_array_for_a_patch():
    patch, nbytes = one_patch(TorchArrays(torch.device("cpu")))
    with torch.profiler.profile(profile_memory=True) as profile:
        patch()
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert sum(n for n in allocated if n > 0) < nbytes / 2


@both_arrays
def test_mask_overwrites_nan_and_finiteness_is_told(make):
    arrays = make()
    for bad in (np.nan, np.inf, -np.inf):
        values = np.ones((2, 2, 3, 4), np.float32)
        values[1, 1, 2, 3] = bad
        total = arrays.upload(values)
        flags = [arrays.is_finite(total)]
        mask_zyx = np.ones((2, 3, 4), bool)
        mask_zyx[1, 2, 3] = False
        arrays.apply_mask(total, mask_zyx)
        assert arrays.settle([*flags, arrays.is_finite(total)])() == [False, True]
        found = arrays.download(total)
        assert (found == mask_zyx).all()


HALVES = [
    # value * maximum: halves go to the even neighbour
    ("uint8", [0.5, 1.5, 2.5, 3.5, 253.5, 254.5], [0, 2, 2, 4, 254, 254]),
    ("int8", [0.5, 1.5, 2.5, 125.5, 126.5], [0, 2, 2, 126, 126]),
    ("uint16", [0.5, 1.5, 2.5, 65533.5, 65534.5], [0, 2, 2, 65534, 65534]),
    ("int16", [0.5, 1.5, 2.5, 32765.5, 32766.5], [0, 2, 2, 32766, 32766]),
]


@both_arrays
@pytest.mark.parametrize(("dtype", "halves", "expected"), HALVES, ids=[h[0] for h in HALVES])
def test_quantise_clips_and_rounds_half_to_even(make, dtype, halves, expected):
    largest = np.float32(np.iinfo(dtype).max)
    values = (np.array(halves) / float(largest)).astype(np.float32)
    # Only those whose float32 product is the half itself say anything about ties.
    ties = values * largest == np.array(halves, np.float32)
    assert ties.sum() >= 2
    values = np.concatenate([values[ties], [-5, -0.0, 0, 1, 1.5, 1e30]]).astype(np.float32)
    wanted = [*np.array(expected)[ties], 0, 0, 0, largest, largest, largest]
    arrays = make()
    found = np.empty((1, 1, 1, len(values)), dtype)
    out = arrays.outgoing(found)
    arrays.quantise(arrays.upload(values.reshape(1, 1, 1, -1).copy()), out)
    arrays.send(out, found)
    assert arrays.settle([])() == []
    np.testing.assert_array_equal(found.ravel(), wanted)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "float32"])
def test_quantise_is_the_same_in_numpy_and_torch(dtype):
    values = RNG.uniform(-0.2, 1.2, (2, 3, 20, 30)).astype(np.float32)
    results = []
    for make in ARRAYS:
        arrays = make()
        found = np.empty(values.shape, dtype)
        out = arrays.outgoing(found)
        arrays.quantise(arrays.upload(values.copy()), out)
        arrays.send(out, found)
        arrays.settle([])()
        results.append(found)
    np.testing.assert_array_equal(*results)
    assert results[0].dtype == dtype and results[0].flags.c_contiguous


def test_a_device_that_counts_no_memory_says_nothing(monkeypatch):
    """`torch.mps` has neither peaks nor what resets them."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    arrays = TorchArrays(torch.device("meta"))
    assert arrays.peak_nbytes(lambda: pytest.fail("nothing is to be weighed")) is None
    assert arrays.most_nbytes() is None
