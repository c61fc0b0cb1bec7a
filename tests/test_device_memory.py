"""When the device has no memory left: half the patches per forward, from then on, and no other."""

import logging

import numpy as np
import pytest
import torch

from mpichunk.backends.identity import IdentityEngine
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.block import inference as inference_module
from mpichunk.block.hostpool import HostPool
from mpichunk.block.inference import BlockInference
from mpichunk.config.scaling import Scaling
from mpichunk.errors import BlockError, DeviceMemoryError
from tests.blockinference import FLOAT32, Mix, make_plan, make_request


def make(engine, request):
    return BlockInference(
        engine,
        request,
        scaling=Scaling(divide=255.0),
        window_name="bump",
        activation="none",
        skip_blank=True,
    )


ERRORS = {
    "numpy": (IdentityEngine, MemoryError()),
    "torch": (
        lambda request: TorchEngine(Mix().eval(), request),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ),
    "script": (
        lambda request: TorchEngine(Mix().eval(), request),
        RuntimeError("The above operation failed in interpreter.\nCUDA out of memory."),
    ),
}


def limit(engine, error, most):
    """Give an engine memory for `most` patches per forward; return the sizes it was asked for."""
    sizes = []
    infer = engine.infer

    def limited_infer(batch_nczyx):
        sizes.append(len(batch_nczyx))
        if len(batch_nczyx) > most:
            raise error
        return infer(batch_nczyx)

    engine.infer = limited_infer
    return sizes


@pytest.fixture
def case():
    plan = make_plan()
    block = plan[1]
    shape = (2, *block.input_box.shape)
    source = np.random.default_rng(2).integers(1, 256, shape, dtype=np.uint8)
    return plan, block, source


@pytest.mark.parametrize("name", ERRORS)
def test_the_batch_is_halved_until_it_fits_and_stays_so(name, case, caplog, monkeypatch):
    monkeypatch.setattr(inference_module.log, "propagate", True)
    monkeypatch.setattr(logging.getLogger("mpichunk"), "propagate", True)
    plan, block, source = case
    make_engine, error = ERRORS[name]
    request = make_request(plan, batch_size=7)
    expected = make(make_engine(request), request).run(block, source, None, FLOAT32)
    assert expected.batch_size is None

    engine = make_engine(request)
    sizes = limit(engine, error, most=2)
    tried = make(engine, request)
    for _ in range(2):
        found = tried.run(block, source, None, FLOAT32)
        assert found.batch_size == 1
        assert found.num_patches == expected.num_patches
        np.testing.assert_allclose(found.core(), expected.core(), rtol=1e-5, atol=1e-6)
    assert sizes[:2] == [7, 3]
    assert set(sizes[2:]) == {1}
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    told = list(dict.fromkeys(told))
    assert len(told) == 2
    assert "runs 3 patches per forward from now on instead of 7" in told[0]


def test_not_even_one_patch(case):
    plan, block, source = case
    request = make_request(plan, batch_size=2)
    engine = IdentityEngine(request)
    limit(engine, MemoryError(), most=0)
    with pytest.raises(DeviceMemoryError, match=r"block 1, .*: not even one patch") as caught:
        make(engine, request).run(block, source, None, FLOAT32)
    assert isinstance(caught.value, BlockError)


def test_other_errors_are_left_alone(case):
    plan, block, source = case
    request = make_request(plan, batch_size=4)
    engine = IdentityEngine(request)
    sizes = limit(engine, ZeroDivisionError(), most=0)
    with pytest.raises(ZeroDivisionError):
        make(engine, request).run(block, source, None, FLOAT32)
    assert sizes == [4]


def test_no_memory_on_the_host_is_no_reason_for_smaller_batches(case):
    plan, block, source = case
    request = make_request(plan, batch_size=4)
    tried = make(IdentityEngine(request), request)

    def allocate(nbytes):
        raise RuntimeError("CUDA error: out of memory")

    tried._cores = HostPool(allocate)
    with pytest.raises(BlockError, match="this host has no memory") as caught:
        tried.run(block, source, None, FLOAT32)
    assert not isinstance(caught.value, DeviceMemoryError)
    tried._cores = HostPool(lambda nbytes: np.empty(nbytes, np.uint8))
    assert tried.run(block, source, None, FLOAT32).batch_size is None


def test_memory_of_a_block_that_fails_is_used_again(case):
    plan, block, source = case
    request = make_request(plan)
    tried = make(IdentityEngine(request), request)
    num_allocated = 0

    def allocate(nbytes):
        nonlocal num_allocated
        num_allocated += 1
        return np.empty(nbytes, np.uint8)

    tried._cores = HostPool(allocate)
    bad = source.astype(np.float32)
    bad[:] = np.nan
    for _ in range(3):
        with pytest.raises(BlockError, match="NaN or inf"), np.errstate(invalid="ignore"):
            tried.run(block, bad, None, FLOAT32).core()
    tried.run(block, source, None, FLOAT32).core()
    assert num_allocated == 1
