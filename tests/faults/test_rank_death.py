"""Ranks that die or hang under a real mpirun, each at a moment that is told or drawn from a seed.

Where MPI is fault tolerant one start must be enough: exit code 0 and the bytes of an undisturbed
run, as long as one rank is left. Elsewhere the job ends at once, and says how to go on.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mpichunk import cli
from mpichunk.errors import ExitCode
from mpichunk.ranks.recovery import Watchdog
from mpichunk.schedule.scheduler import MOST_DEATHS
from tests.endtoend import assert_same_files, kill_tree, status_of, wait_until_done
from tests.faults.harness import NUM_BLOCKS, Bench, Run, _mpirun_command
from tests.faults.program import GO, VARIABLE
from tests.faults.scenario import POINTS, Attempt, Fault, Scenario
from tests.launch import REPOSITORY, launch_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory, mpirun):
    # `mpirun` skips where there is none.
    return Bench(tmp_path_factory.mktemp("deaths"))


class Job:
    """A job that is watched from outside, with files of its own."""

    def __init__(self, bench, name, num_ranks, *, mode="dynamic", tolerant=True, **schedule):
        self.bench, self.num_ranks = bench, num_ranks
        self.folder = bench.folder / name
        self.config = bench.write_config(self.folder, mode=mode, **schedule)
        self.run_dir = self.folder / "runs/v"
        self.command = _mpirun_command(num_ranks, self.config)
        if not tolerant:
            self.command = [w for w in self.command if w not in ("--with-ft", "ulfm")]
        self.log = self.folder / "start.log"

    def start(self, **more):
        told = {
            "folder": str(self.folder),
            "faults": [],
            "nan_blocks": [],
            "bad_ranks": [],
            "seconds_per_block": 0.02,
            **more,
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                env=launch_environment(self.folder) | {VARIABLE: json.dumps(told)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self

    def wait(self, timeout=60):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s\n{self.log.read_text()}")
        finally:
            kill_tree(self.process)

    def until_told(self, words, timeout=30):
        end = time.monotonic() + timeout
        while words not in self.log.read_text():
            assert time.monotonic() < end, f"no {words!r}\n{self.log.read_text()}"
            assert self.process.poll() is None, f"no {words!r}\n{self.log.read_text()}"
            time.sleep(0.02)

    def verify(self):
        command = [sys.executable, "-m", "mpichunk", "verify", str(self.config)]
        done = subprocess.run(
            command,
            env=launch_environment(self.folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def until(self, num_blocks):
        wait_until_done(self.process, self.run_dir, num_blocks)

    def pids(self):
        """Return the process of each rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            rank = process.environ().get("OMPI_COMM_WORLD_RANK")
            if rank is not None and "python" in process.name():
                found[int(rank)] = process.pid
        return found

    def check(self):
        assert cli.main(["status", str(self.config), "--check"]) == 0
        for leftover in (self.folder / "out/v.zarr").rglob("*.__lock"):
            leftover.unlink()  # what a killed process was writing; no reader takes it for a chunk
        assert_same_files(self.folder / "out/v.zarr", self.bench.expected)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_any_ranks_may_die_at_any_moment_as_long_as_one_is_left(bench, mode, seed):
    draw = random.Random(f"{mode} {seed}")
    num_ranks = draw.randint(3, 5)
    victims = draw.sample(range(num_ranks), draw.randint(1, min(3, num_ranks - 1)))
    points = sorted(set(POINTS) - {"sync"})
    faults = []
    for rank in victims:
        point = draw.choice(points)
        after = draw.randint(1, POINTS[point])
        faults.append(Fault(kind="kill", rank=rank, point=point, after=after))
    attempt = Attempt(num_ranks=num_ranks, mode=mode, faults=tuple(faults))
    scenario = Scenario(kind=f"death-{mode}", seed=seed, attempts=(attempt,))
    outcome = Run(bench, scenario).finish()
    assert outcome.codes == (0,)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_all_but_one_die_at_the_same_moment(bench, mode):
    job = Job(bench, f"all-but-one-{mode}", 4, mode=mode).start()
    job.until(NUM_BLOCKS // 4)
    pids = job.pids()
    for rank in (0, 1, 3):
        os.kill(pids[rank], signal.SIGKILL)
    assert job.wait() == 0
    job.check()
    text = job.log.read_text()
    assert "rank 0 on " in text
    assert "has died" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("seed", range(3))
def test_ranks_die_while_the_others_recover(bench, seed):
    draw = random.Random(seed)
    job = Job(bench, f"recovering-{seed}", 5).start()
    job.until(NUM_BLOCKS // 5)
    pids = job.pids()
    for rank in draw.sample([0, 1, 2, 3], 4):
        os.kill(pids[rank], signal.SIGKILL)
        time.sleep(draw.choice([0.0, 0.001, 0.005, 0.02, 0.1]))
    assert job.wait() == 0
    job.check()


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_the_coordinator_dies_before_anything_is_computed(bench, seconds):
    job = Job(bench, f"early-{seconds}", 3).start()
    end = time.monotonic() + 30
    while not list(job.run_dir.glob("lock.*")):
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(job.pids()[0], signal.SIGKILL)
    assert job.wait() == 0
    job.check()


def test_a_stopped_coordinator_is_killed_and_named(bench):
    job = Job(bench, "stopped", 3, min_lease_seconds=2).start()
    job.until(NUM_BLOCKS // 4)
    os.kill(job.pids()[0], signal.SIGSTOP)
    assert job.wait() == 0
    job.check()
    assert "rank 0 on " in job.log.read_text()
    assert "hangs: no step for" in job.log.read_text()


def test_without_fault_tolerance_the_others_finish_for_a_stopped_rank(bench):
    job = Job(bench, "stopped-plain", 3, tolerant=False, min_lease_seconds=2).start()
    job.until(NUM_BLOCKS // 4)
    os.kill(job.pids()[1], signal.SIGSTOP)
    job.wait()
    job.check()
    assert "rank 1 on " in job.log.read_text()
    assert "cannot be left behind" in job.log.read_text()


def test_a_stopped_rank_whose_blocks_went_to_others_may_come_back(bench):
    job = Job(bench, "back-plain", 3, tolerant=False, min_lease_seconds=2)
    job.start(seconds_per_block=0.12)
    job.until(NUM_BLOCKS // 6)
    stopped = job.pids()[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        job.until_told("cannot be left behind")
    finally:
        os.kill(stopped, signal.SIGCONT)
    job.wait()
    job.verify()
    job.check()
    assert "Traceback" not in job.log.read_text()


def slow(rank, point, after, seconds):
    return {"kind": "slow", "rank": rank, "point": point, "after": after, "seconds": seconds}


def test_a_block_that_kills_every_rank_that_computes_it_is_given_up(bench, capsys):
    deadly = NUM_BLOCKS // 2
    job = Job(bench, "deadly", 5)
    # What the coordinator dies of nobody knows, so it is kept from this block.
    job.start(deadly_blocks=[deadly], faults=[slow(0, "infer", 2, 50)])
    job.until_told("as others did; given up")
    (job.folder / GO).touch()
    assert job.wait() == ExitCode.BLOCKS_FAILED, job.log.read_text()
    met = (job.folder / "met").read_text().splitlines()
    assert len({line for line in met if line.startswith("kill")}) == MOST_DEATHS
    text = job.log.read_text()
    assert f"block {deadly}: rank" in text
    assert "as others did; given up" in text
    capsys.readouterr()
    found = status_of(job.config, capsys)
    assert (found["num_done"], found["num_failed"]) == (NUM_BLOCKS - 1, 1)
    assert [failure["block"] for failure in found["failures"]] == [deadly]


def test_a_standstill_of_all_ranks_is_told_and_ends_the_job(bench):
    job = Job(bench, "standstill", 3, min_lease_seconds=1)
    # Both threads that read, on every rank.
    job.start(faults=[slow(None, "read", after, 80) for after in (8, 9)])
    assert job.wait(40) not in (0, 2, 3, 75)
    text = job.log.read_text()
    assert "no rank has moved for" in text
    assert "is a file system down?" in text
    assert "run the same again to resume" in text
    assert "Traceback" not in text
    assert "hangs" not in text
    assert job.start().wait() == 0
    job.check()


def test_an_idle_rank_computes_what_is_slow_at_the_end(bench):
    job = Job(bench, "backup", 3, min_lease_seconds=60)
    started = time.monotonic()
    job.start(faults=[slow(1, "infer", 10, 50)], least_slow_seconds=0.5)
    assert job.wait(45) == 0
    assert time.monotonic() - started < 40
    text = job.log.read_text()
    assert "is slow; rank" in text
    assert "computes it as well" in text
    job.verify()
    job.check()


def test_without_fault_tolerance_a_death_ends_the_job_and_tells_how_to_resume(bench):
    job = Job(bench, "plain", 3, tolerant=False).start()
    job.until(NUM_BLOCKS // 4)
    os.kill(job.pids()[1], signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait() not in (0, 2, 3, 75)
    assert time.monotonic() - killed < 15
    (told,) = [line for line in job.log.read_text().splitlines() if "has died" in line]
    assert "mpichunk: rank 1 on " in told
    assert "run the same again to resume" in told
    assert job.start().wait() == 0
    job.check()


def test_a_start_that_does_not_complete_ends_by_itself(bench):
    job = Job(bench, "late", 2, start_timeout_seconds=4)
    script = (
        "import os, runpy, time\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': time.sleep(90)\n"
        "runpy.run_module('tests.faults.program', run_name='__main__')\n"
    )
    place = job.command.index("-m")
    job.command[place : place + 2] = ["-c", script]
    started = time.monotonic()
    job.start()
    assert job.wait(40) != 0
    assert time.monotonic() - started < 30
    assert "Timeout" in job.log.read_text()


def test_the_watchdog_ends_a_process_only_while_it_runs():
    script = (
        "import time; from mpichunk.ranks.recovery import Watchdog; w = Watchdog(0.5);"
        "w.start(); w.stop();"
        "time.sleep(1); print('here', flush=True); w.start(); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "here\n"
    assert "Timeout" in done.stderr
    Watchdog().start()
