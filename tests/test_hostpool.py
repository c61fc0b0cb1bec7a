"""Memory that is used again: never by two at a time, and only where it fits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.block.hostpool import HostPool
from mpichunk.errors import BlockError

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(st.lists(st.tuples(SHAPES, st.sampled_from(["uint8", "float32"]), st.booleans())))
def test_nobody_writes_into_what_another_holds(steps):
    pool = HostPool(lambda nbytes: np.empty(nbytes, np.uint8))
    held = []
    for number, (shape, dtype, gives_back) in enumerate(steps):
        array = pool.take(shape, np.dtype(dtype))
        assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
        array[...] = number
        held.append((array, number))
        for earlier, value in held:
            assert (earlier == value).all()
        if gives_back:
            pool.give_back(held.pop(0)[0])


def test_blocks_of_one_shape_take_no_new_memory():
    allocated = []

    def allocate(nbytes):
        allocated.append(nbytes)
        return np.empty(nbytes, np.uint8)

    pool = HostPool(allocate)
    for shape in [(1, 2, 3, 4), (2, 4, 5, 6), (2, 4, 5, 6), (1, 4, 5, 6), (2, 4, 5, 6)]:
        pool.give_back(pool.take(shape, np.dtype(np.float32)))
    assert allocated == [4 * 24, 4 * 240]
    # What was too small is forgotten.
    assert pool.take((1, 1, 1, 1), np.dtype(np.uint8)).base.nbytes == 4 * 240


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_a_host_without_memory_fails_the_block(error):
    def allocate(nbytes):
        raise error

    with pytest.raises(BlockError, match=r"no memory for 96 B of a block: .*block\.shape"):
        HostPool(allocate).take((1, 2, 3, 4), np.dtype(np.float32))


def test_pages_of_a_host_are_lent_given_back_and_lent_again():
    pool = HostPool(NumpyArrays().host_bytes)
    first = pool.take((1, 2, 3, 4), np.dtype(np.float32))
    first[...] = 7
    pool.give_back(first)
    again = pool.take((1, 1, 3, 4), np.dtype(np.float32))
    assert np.shares_memory(first, again) and (again == 7).all()
    assert not np.shares_memory(again, pool.take((1, 1, 3, 4), np.dtype(np.float32)))
    assert pool.take((1, 0, 3, 4), np.dtype(np.float32)).size == 0


def test_a_host_says_that_it_has_no_pages():
    with pytest.raises(BlockError, match=r"no memory for .* of a block: .*block\.shape"):
        HostPool(NumpyArrays().host_bytes).take((1, 1 << 20, 1 << 20, 1 << 20), np.dtype(np.uint8))
