"""Predicted times against plans that are walked block by block, and dealt out one by one."""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box
from mpichunk.geometry.symmetry import turns_of
from mpichunk.plan.estimate import estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.prediction import (
    Cost,
    Forecast,
    finish_seconds,
    forecast,
    forecast_json,
    format_outcome,
    pace_of,
    voxels_of_a_read,
)
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Pace, Probe
from mpichunk.plan.work import work_of
from tests.geometries import cases, make_config, make_info, make_plan

Case = tuple[Config, Box]
PACE = Pace(
    patch_seconds=0.25,
    finish_seconds=0.001,
    read_seconds=0.002,
    write_seconds=0.004,
    scale=1.5,
    num_ranks=2,
)


def deal(seconds: Sequence[float], num_ranks: int) -> float:
    """Return when the last of all blocks is done: each goes to the rank that is free first."""
    free = [0.0] * num_ranks
    for block in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + block)
    return max(free)


def brute_seconds(plan: Plan, config: Config) -> list[float]:
    """Return the batches of every block, with every turn."""
    turns = len(turns_of(config.model.augment))
    return [float(turns * ceil(b.num_patches / config.patch.batch_size)) for b in plan]


costs = st.builds(
    Cost,
    seconds=st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0.01, 50)),
    num_blocks=st.integers(0, 60),
)


@given(st.lists(costs, min_size=1, max_size=6), st.integers(1, 9))
def test_blocks_of_a_kind_are_dealt_out_at_once(kinds: list[Cost], num_ranks: int) -> None:
    every = [kind.seconds for kind in kinds for _ in range(kind.num_blocks)]
    assert finish_seconds(kinds, num_ranks) == pytest.approx(deal(every, num_ranks))


def test_a_billion_blocks_on_ten_thousand_ranks_take_no_time() -> None:
    kinds = [Cost(seconds=1 + i / 7, num_blocks=10**8) for i in range(10)]
    total = sum(kind.seconds * kind.num_blocks for kind in kinds)
    assert total / 10**4 <= finish_seconds(kinds, 10**4) <= total / 10**4 + 3
    assert finish_seconds([Cost(seconds=3.0, num_blocks=10**9 + 1)], 10**3) == 3 * (10**6 + 1)


@settings(max_examples=60)
@given(cases(largest=25), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_batches_are_those_of_all_blocks(
    case: Case, batch: int, num_ranks: int, is_turned: bool
) -> None:
    config, domain = case
    patch = config.patch.model_copy(update={"batch_size": batch})
    model = config.model.model_copy(update={"augment": ("flip_z",) if is_turned else ()})
    config = config.model_copy(update={"patch": patch, "model": model})
    plan = Plan.from_config(config, domain)
    assume(len(plan) <= 2000)
    premise = Premise(plan=plan, config=config, info=make_info(plan.volume), num_ranks=num_ranks)
    found = forecast(premise, work_of(plan))
    every = brute_seconds(plan, config)
    assert Counter({cost.seconds: cost.num_blocks for cost in found.costs}) == Counter(every)
    assert found.seconds == pytest.approx(deal(every, num_ranks))
    assert found.num_blocks == len(plan)
    assert found.idle_share == pytest.approx(1 - sum(every) / num_ranks / found.seconds)
    assert found.basis == "batches" and forecast_json(found) is None


@settings(max_examples=30)
@given(cases(largest=25))
def test_the_prediction_counts_what_the_estimate_counts(case: Case) -> None:
    config, domain = case
    plan = Plan.from_config(config, domain)
    probe = Probe(seconds=0.5, nbytes=None, device="cpu")
    premise = Premise(plan=plan, config=config, info=make_info(domain), probe=probe)
    told, found = estimate(premise), forecast(premise, premise.work)
    assert found.num_patches == told.work.num_patches and found.num_blocks == told.work.num_blocks
    # One patch per forward: what `plan` calls the network's time.
    assert found.seconds == pytest.approx(0.5 * told.work.num_patches)
    assert found.basis == "forward"


@settings(max_examples=40)
@given(cases(largest=25), st.integers(1, 4))
def test_a_block_takes_as_long_as_its_slowest_stage(case: Case, num_ranks: int) -> None:
    config, domain = case
    plan = Plan.from_config(config, domain)
    assume(len(plan) <= 2000)
    work = work_of(plan, (4, 4, 4))
    probe = Probe(seconds=0.5, nbytes=None, device="cpu", pace=PACE)
    info = make_info(plan.volume)
    premise = Premise(plan=plan, config=config, info=info, num_ranks=num_ranks, probe=probe)
    found = forecast(premise, work)
    read = PACE.read_seconds * voxels_of_a_read(work)
    every = []
    for block in plan:
        voxels = block.core.num_voxels
        compute = 0.75 * block.num_patches + PACE.finish_seconds * voxels
        every.append(1.5 * max(compute, read, PACE.write_seconds * voxels))
    edge = 1.5 * (read + PACE.write_seconds * plan.roi.num_voxels / len(plan))
    assert found.seconds == pytest.approx(deal(every, num_ranks) + edge)
    assert found.basis == "bench"


@pytest.mark.parametrize("slowest", ["blend_seconds", "read_seconds", "write_seconds"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_was_measured_is_predicted(slowest: str, num_ranks: int) -> None:
    """A run of as many blocks as were measured, all of them alike, takes as long as they did."""
    config = make_config((12, 12, 12), (12, 12, 12), patch_overlap=(0, 0, 0), patch_batch_size=3)
    plan = make_plan(config, (12, 12, 12 * 4 * num_ranks))
    work = work_of(plan)
    assert {block.num_patches for block in plan} == {1} and len(plan) == 4 * num_ranks
    stages = dict.fromkeys(("blend_seconds", "finish_seconds", "read_seconds", "write_seconds"), 1)
    pace = pace_of(
        batch_seconds=0.5,
        num_patches=1,
        num_batches=1,
        num_core_voxels=12**3,
        num_read_voxels=voxels_of_a_read(work),
        whole_seconds=123.0,
        num_blocks=4,
        num_ranks=num_ranks,
        **(stages | {slowest: 40}),
    )
    probe = Probe(seconds=0.5, nbytes=None, device="cpu", pace=pace)
    info = make_info(plan.volume)
    premise = Premise(plan=plan, config=config, info=info, num_ranks=num_ranks, probe=probe)
    found = forecast(premise, work)
    assert found.seconds == pytest.approx(123.0) and found.idle_share == pytest.approx(0)


@given(st.lists(costs, min_size=1, max_size=6), st.integers(0, 300))
def test_part_of_the_blocks_is_a_part_of_each_kind(kinds: list[Cost], num: int) -> None:
    kinds = sorted(kinds, key=lambda kind: -kind.seconds)
    whole = Forecast(
        basis="bench", num_ranks=3, costs=tuple(kinds), edge_seconds=1.0, num_patches=1000
    )
    num = min(num, whole.num_blocks)
    part = whole.of_blocks(num)
    assert part.num_blocks == num
    for kind in part.costs:
        same = [cost.num_blocks for cost in kinds if cost.seconds == kind.seconds]
        assert kind.num_blocks <= max(same)
        if whole.num_blocks:
            shares = [n * num / whole.num_blocks for n in same]
            assert min(abs(kind.num_blocks - share) for share in shares) < 1
    assert whole.of_blocks(whole.num_blocks) == whole


def test_outcome_in_words() -> None:
    found = Forecast(
        basis="bench",
        num_ranks=2,
        costs=(Cost(seconds=10.0, num_blocks=8),),
        edge_seconds=0.0,
        num_patches=800,
    )

    def words(expected: Forecast | None, num_done: int = 8, num_patches: int = 800) -> str:
        return format_outcome(expected, num_done=num_done, num_patches=num_patches, seconds=50)

    assert words(found) == "predicted 40 s (8 blocks, 2 ranks), took 50 s: 1.25 times as long"
    assert words(found, 4, 400).startswith("predicted 20 s (4 blocks")
    assert "50% of the patches were blank or masked" in words(found, 8, 400)
    # Of some blocks of a plan the number of patches is known on average only.
    assert "blank" not in words(found, 4, 100)
    assert "for the network alone" in words(replace(found, basis="forward"))
    for nothing in (None, replace(found, basis="batches")):
        assert "no prediction" in words(nothing) and "bench" in words(nothing)
    assert "no block" in words(found, 0, 0)
