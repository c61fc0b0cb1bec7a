"""Jobs that meet faults at drawn moments finish with the bytes of an undisturbed run.

`python -m tests.faults.soak` runs many more of the same.
"""

import pytest

from tests.faults.harness import NUM_BLOCKS, Bench, Run, can_mount
from tests.faults.scenario import KINDS, draw

NEEDS_DISK = ("disk-full", "journal-full")
TWICE = ("job-kill", "rank-kill", "rank-kills", "segfault", "bug", "block-error", "mixed")
"""Kinds that differ much from seed to seed."""

SCENARIOS = [(kind, seed) for kind in KINDS for seed in ((0, 1) if kind in TWICE else (0,))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, mpirun):
    # `mpirun` skips where there is none.
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), SCENARIOS)
def test_bytes_are_right_whatever_happens(bench, kind, seed):
    if kind in NEEDS_DISK and not can_mount():
        pytest.skip("no small disk: only root may mount one")
    outcome = Run(bench, draw(kind, seed, num_blocks=NUM_BLOCKS)).finish()
    print(outcome)


def test_enough_scenarios():
    assert len(SCENARIOS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_scenario_can_be_drawn_again(kind):
    drawn = [draw(kind, seed, num_blocks=NUM_BLOCKS) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
