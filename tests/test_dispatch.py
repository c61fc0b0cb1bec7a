"""The benchmarks of dispatch, at a size at which they prove properties and no speed."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.rundir.journal import NAME, Journal
from tests.benchmarks.scale import simulate
from tests.benchmarks.simulation import Case, Simulation, plan_of

CASE = Case(num_ranks=50, num_blocks=4000, straggling=2e-3, failing=2e-3, num_deaths=3)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger="mpichunk")


@pytest.mark.parametrize("seed", range(3))
def test_many_ranks_do_every_block_once_and_nothing_is_kept_of_it(tmp_path, seed):
    case = replace(CASE, seed=seed)
    how = {"num_blocks": case.num_blocks, "fingerprint": {}, "versions": {}}
    with Journal.open(tmp_path, **how) as journal:
        simulation = Simulation(case, journal, plan_of(case.num_blocks))
        result = simulation.run()
    lines = map(json.loads, (tmp_path / NAME).read_text().splitlines()[1:])
    assert Counter(line["block"] for line in lines if line.get("state") == "done") == dict.fromkeys(
        range(case.num_blocks), 1
    )
    # What was in flight at a time, and what is left of it.
    assert result.most_leased <= BLOCKS_IN_FLIGHT * case.num_ranks
    coordinator, scheduler = simulation.coordinator, simulation.scheduler
    writers = coordinator._writers
    left_over = [writers._contested, writers.by_block, coordinator._retries]
    assert [len(found) for found in left_over] == [0, 0, 0]
    assert scheduler._retries._tries == {}
    assert len(list(scheduler._holders)) <= result.num_backups
    assert len(result.regroup_seconds) == 3
    assert 0 < result.wire_nbytes < 1000


def test_backups_shorten_the_end(tmp_path):
    case = replace(CASE, straggling=1e-2, num_deaths=0)
    with_backups = simulate(case, tmp_path / "with")
    without = simulate(replace(case, is_backing_up=False), tmp_path / "without")
    assert without.num_backups == 0 < with_backups.num_backups
    assert with_backups.idle_seconds < 0.7 * without.idle_seconds


def test_leases_per_second_are_measured(mpirun, python):
    done = python("-m", "tests.benchmarks.dispatch", "--ranks", 3, "--blocks", 3000, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    rates = [int(rate) for rate in re.findall(r"(\d+) leases/s", done.stdout)]
    assert len(rates) == 2
    assert min(rates) > 0
