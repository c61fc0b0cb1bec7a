"""Which ranks compute wrongly, by their deviation from a reference; see also tests/mpi."""

from dataclasses import replace

import numpy as np
import pytest

from mpichunk.backends.absent import AbsentEngine
from mpichunk.backends.identity import IdentityEngine
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError
from mpichunk.job import canary
from mpichunk.job.canary import (
    TOLERANCES,
    GoldenResult,
    deviation,
    find_off_ranks,
    find_sound_ranks,
    judge,
    median_of,
)
from mpichunk.plan.fit import Room
from mpichunk.ranks.comm import SerialCommunicator
from tests.blockinference import ENGINES, make_plan, make_request

RIGHT = np.linspace(-2, 4, 60, dtype=np.float32).reshape(3, 4, 5)


def test_deviation_is_a_share_of_the_largest_value():
    off = RIGHT.copy()
    off[1, 2, 3] += 0.4
    assert deviation(off, RIGHT) == pytest.approx(0.1)
    assert deviation(RIGHT, RIGHT) == 0
    assert deviation(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_off(value):
    off = RIGHT.copy()
    off[0, 0, 0] = value
    assert deviation(off, RIGHT) == np.inf
    assert deviation(RIGHT[:2], RIGHT) == np.inf


def finding(rank, **what):
    return GoldenResult(rank=rank, host=f"node{rank}", device="cuda:0 X", **what)


@pytest.mark.parametrize("precision", [*TOLERANCES, "mxfp8"])
def test_judge_names_who_is_off(precision):
    tolerance = TOLERANCES.get(precision, 0.1)
    findings = [
        finding(0, deviation=tolerance / 2, precision=precision),
        finding(1, deviation=tolerance * 2, precision=precision),
        finding(2, error=ModelError("CUDA error: misaligned address")),
        finding(3, deviation=np.inf),
        finding(4, deviation=np.nan),
    ]
    off = judge(findings)
    assert list(off) == [1, 2, 3, 4]
    assert off[1].startswith("rank 1 on node1 (cuda:0 X) computes wrongly")
    assert "misaligned address" in off[2]


def test_what_the_engine_says_of_its_precision_counts(monkeypatch):
    """A setting such as openvino's INFERENCE_PRECISION_HINT is none of the request."""
    request = make_request(make_plan())
    engine = AbsentEngine(replace(request, precision="bfloat16"))
    seen = {}
    monkeypatch.setattr(canary, "find_off_ranks", lambda *_, **how: seen.update(how) or {})
    find_sound_ranks(SerialCommunicator(), Model(backend="identity"), request, lambda: engine)
    assert seen["precision"] == "bfloat16"


def test_one_bad_rank_of_three_does_not_move_the_median():
    np.testing.assert_array_equal(median_of([RIGHT, RIGHT * 1e9, RIGHT]), RIGHT)


def test_alone_on_the_cpu_there_is_nothing_to_compare():
    comm = SerialCommunicator()
    how = {"device": "cpu", "precision": "float32"}
    assert find_off_ranks(comm, lambda: RIGHT, reference=None, **how) == {}


def test_alone_and_off():
    comm = SerialCommunicator()
    how = {"device": "cuda:0 X", "precision": "float32"}
    assert find_off_ranks(comm, lambda: RIGHT * 1.0001, reference=lambda _: RIGHT, **how) == {}
    with pytest.raises(DeviceError, match=r"computes wrongly: a test patch is off by 0.5"):
        find_off_ranks(comm, lambda: RIGHT * 0.5, reference=lambda _: RIGHT, **how)


def test_a_network_that_runs_nowhere_is_the_users_mistake():
    def refuse():
        raise ModelError("the network takes 3 input channels", key="model.path")

    with pytest.raises(ModelError, match="takes 3 input channels"):
        find_off_ranks(
            SerialCommunicator(), refuse, reference=None, device="cpu", precision="float32"
        )


@pytest.mark.parametrize("error", [RuntimeError, OSError, MemoryError, ImportError])
def test_a_broken_device_is_told_without_a_traceback(error):
    def break_down():
        raise error("CUDA error: misaligned address\nCompile with TORCH_USE_CUDA_DSA")

    how = {"reference": None, "device": "cuda:0 X", "precision": "float32"}
    told = rf"^cuda:0 X fails: {error.__name__}: CUDA error: misaligned address$"
    with pytest.raises(DeviceError, match=told):
        find_off_ranks(SerialCommunicator(), break_down, **how)
    request = make_request(make_plan())
    with pytest.raises(DeviceError, match=r"^cpu fails: "):
        find_sound_ranks(SerialCommunicator(), Model(backend="identity"), request, break_down)


def test_a_coarse_precision_is_judged_as_such():
    def golden():
        return np.full((2, 4), 1.02, np.float32)

    def reference(others_nbytes):
        return np.ones((2, 4), np.float32)

    how = {"reference": reference, "device": "cuda:0 X"}
    assert find_off_ranks(SerialCommunicator(), golden, precision="bfloat16", **how) == {}
    with pytest.raises(DeviceError, match=r"off by 0\.02"):
        find_off_ranks(SerialCommunicator(), golden, precision="float32", **how)


def test_a_bug_stays_a_bug():
    def stumble():
        raise KeyError("a bug")

    request = make_request(make_plan())
    with pytest.raises(KeyError):
        find_sound_ranks(SerialCommunicator(), Model(backend="identity"), request, stumble)


def test_a_reference_that_breaks_down_is_done_without(caplog):
    def break_down(others_nbytes):
        raise RuntimeError("Illegal instruction")

    off = find_off_ranks(
        SerialCommunicator(),
        lambda: RIGHT,
        reference=break_down,
        device="cuda:0 X",
        precision="float32",
    )
    assert off == {}
    assert "does not run on this CPU" in caplog.text


@pytest.mark.parametrize("has_room", [True, False])
def test_the_host_gets_no_second_network_that_it_has_no_room_for(monkeypatch, caplog, has_room):
    request = replace(make_request(make_plan()), precision="bfloat16")
    engine = IdentityEngine(request)
    asked = []

    def room(num_local, groups, *, own_nbytes, idle_nbytes):
        asked.append((num_local, idle_nbytes))
        nbytes = own_nbytes + (1 << 30 if has_room else 1000)
        return Room(nbytes=nbytes, words="the host has little")

    monkeypatch.setattr(canary, "host_room", room)
    loaded = []
    backend = canary.get_backend("identity")
    load = type(backend).load
    monkeypatch.setattr(type(backend), "load", lambda *asked: loaded.append(asked) or load(*asked))
    how = Model(backend="identity"), request, lambda: engine
    assert find_sound_ranks(SerialCommunicator(), *how)[1] == (0,)
    assert asked == [(1, 0)]
    assert len(loaded) == has_room
    assert (
        "the host has little), so ranks are compared with the median" in caplog.text
    ) != has_room


def test_an_absent_engine_runs_nothing():
    request = make_request(make_plan())
    engine = AbsentEngine(request)
    with pytest.raises(ModelError, match="must not compute"):
        check_engine(engine, request)
    assert not engine.is_out_of_memory(MemoryError())
    assert "boom" in str(engine.explain(RuntimeError("boom")))


@pytest.mark.parametrize("name", ENGINES)
def test_golden_output_is_repeatable_and_belongs_to_the_caller(name):
    request = make_request(make_plan())
    engine = ENGINES[name][0](request)
    first = check_engine(engine, request)
    assert first.shape[0] == 3
    assert first.dtype == np.float32
    second = check_engine(ENGINES[name][0](request), request)
    np.testing.assert_array_equal(first, second)
    first[:] = 7
    np.testing.assert_array_equal(check_engine(engine, request), second)
