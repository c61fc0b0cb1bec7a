"""Ranks find out, by collectives, who of them is off."""

import logging

import numpy as np
import pytest

from mpichunk.backends.absent import AbsentEngine
from mpichunk.backends.identity import IdentityEngine
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from mpichunk.job.canary import find_off_ranks, find_sound_ranks
from tests.blockinference import make_plan, make_request

RIGHT = np.linspace(-2, 4, 200_000, dtype=np.float32).reshape(2, 100_000)
HOW = {"device": "some device", "precision": "float32"}


def golden(comm, bad, factor=1.5):
    return lambda: RIGHT * np.float32(factor if comm.rank in bad else 1)


@pytest.mark.mpi(min_ranks=2)
@pytest.mark.parametrize("bad", [(), (0,), (1,)])
def test_by_the_cpu_of_the_coordinator(world, bad):
    beside = []

    def reference(others_nbytes):
        beside.append(others_nbytes)
        return RIGHT

    off = find_off_ranks(world, golden(world, bad), reference=reference, **HOW)
    assert tuple(off) == bad
    # Each of the others has at least numpy in memory.
    others = [r for r in world.alive if r != world.rank and world.hosts[r] == world.host]
    assert len(beside) == world.is_coordinator
    assert all(nbytes > len(others) * (10 << 20) for nbytes in beside)


@pytest.mark.mpi(min_ranks=2)
def test_by_what_the_coordinator_has_computed(world):
    off = find_off_ranks(world, golden(world, (1,)), reference=None, **HOW)
    assert tuple(off) == (1,)
    assert f"rank 1 on {world.host} (some device) computes wrongly" in off[1]


@pytest.mark.mpi(min_ranks=3)
def test_the_coordinator_is_off_where_most_ranks_differ_from_it(world):
    off = find_off_ranks(world, golden(world, (0,)), reference=None, **HOW)
    assert tuple(off) == (0,)


@pytest.mark.mpi(min_ranks=3)
@pytest.mark.parametrize("bad", [(0,), (2,)])
def test_by_the_median(world, bad):
    def no_cpu(others_nbytes):
        raise ModelError("made for one device only")

    off = find_off_ranks(world, golden(world, bad), reference=no_cpu, **HOW)
    assert tuple(off) == bad


@pytest.mark.mpi(min_ranks=2)
def test_a_rank_that_cannot_run_it_is_off(world):
    def run():
        if world.rank == world.size - 1:
            raise ModelError("CUDA error")
        return RIGHT

    off = find_off_ranks(world, run, reference=None, **HOW)
    assert tuple(off) == (world.size - 1,)


@pytest.mark.mpi(min_ranks=2)
@pytest.mark.parametrize("error", [ModelError, RuntimeError, OSError])
@pytest.mark.parametrize("place", [0, -1])
def test_a_rank_that_cannot_load_it_is_off(world, error, place):
    bad = world.alive[place]
    request = make_request(make_plan())

    def load():
        if world.rank == bad:
            raise error("no kernel image")
        return IdentityEngine(request)

    engine, sound = find_sound_ranks(world, Model(backend="identity"), request, load)
    assert sound == tuple(rank for rank in world.alive if rank != bad)
    assert isinstance(engine, AbsentEngine if world.rank == bad else IdentityEngine)


def test_what_nobody_can_load_is_told_once(comm):
    def load():
        raise ModelError("net.pt is not a TorchScript file", key="model.path")

    request = make_request(make_plan())
    with pytest.raises(ModelError, match=r"^net\.pt is not a TorchScript file$") as caught:
        find_sound_ranks(comm, Model(backend="identity"), request, load)
    assert caught.value.key == "model.path"


def test_all_off(comm):
    with pytest.raises(DeviceError, match="rank 0 on"):
        find_off_ranks(comm, lambda: RIGHT * 2, reference=lambda _: RIGHT, **HOW)


def test_all_refuse(comm):
    def refuse():
        raise ModelError("wrong channels", key="model.path")

    with pytest.raises(ModelError, match=r"^wrong channels$") as caught:
        find_off_ranks(comm, refuse, reference=None, **HOW)
    assert caught.value.key == "model.path"


def test_small_differences_are_no_fault(comm, caplog):
    caplog.set_level(logging.WARNING, logger="mpichunk")
    output = RIGHT * np.float32(1 + 1e-6 * comm.rank)
    assert find_off_ranks(comm, lambda: output, reference=lambda _: RIGHT, **HOW) == {}
    assert caplog.records == []
