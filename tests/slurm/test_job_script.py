"""slurm/job.sh: it goes on by itself after whatever ends it, stops when that is of no use.

Every job here is the script as it stands, with other values in lines that it says to change.
"""

import json
import time
from collections import Counter

from mpichunk import journal
from tests.endtoend import assert_same_files, block_lines, start_lines
from tests.faults.slow import DEPTH, NUM_BLOCKS, slow_config, status_of
from tests.slurm.site import change_script, told

OPTIONS = {
    "nodes": "4",
    "ntasks-per-node": "2",
    "gpus-per-node": "2",
    "cpus-per-task": "1",
    "mem-per-cpu": None,
    "time": "10",
    "signal": "USR2@1",
}


class Job:
    """A submitted job, its config and its files."""

    def __init__(
        self, cluster, site, folder, *, seconds=0.3, schedule=None, faults=None, **options
    ):
        self.cluster, self.folder = cluster, folder
        self.config = slow_config(folder, **({"schedule": schedule} if schedule else {}))
        self.run_dir = folder / "runs/v"
        options = OPTIONS | {n.replace("_", "-"): v for n, v in options.items()}
        self.out = folder / "job.out"
        options |= {"output": str(self.out)}
        script = change_script("job.sh", folder / "job.sh", site, options)
        env = told(folder, seconds, **(faults or {}))
        self.number = cluster.submit(script, self.config, env=env)

    def wait_for_blocks(self, num_blocks, timeout=120):
        end = time.monotonic() + timeout
        path = self.run_dir / journal.NAME
        while not path.exists() or path.read_bytes().count(b'"state":"done"') < num_blocks:
            assert time.monotonic() < end, f"{self.told}\n{self.cluster.told()}"
            assert self.state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.told
            time.sleep(0.1)

    def wait(self, timeout=180):
        """Wait for the end; return state and exit code by scontrol and the completion file."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        found = self.cluster.wait_for_state(self.number, *ends, timeout=timeout)
        last = [c for c in self.cluster.completed() if c["JobId"] == str(self.number)][-1]
        assert last["JobState"] == found["JobState"]
        # That of a cancelled job is noted before its script has ended.
        assert last["ExitCode"] == found["ExitCode"] or found["JobState"] == "CANCELLED"
        return found["JobState"], found["ExitCode"]

    @property
    def state(self):
        return self.cluster.job(self.number)["JobState"]

    @property
    def told(self):
        return self.out.read_text() if self.out.exists() else ""

    def assert_complete(self, undisturbed, *, num_ranks=8):
        """Every block is there, and at most those in flight were done twice."""
        blocks = Counter(line["block"] for line in block_lines(self.run_dir))
        assert sorted(blocks) == list(range(NUM_BLOCKS))
        written = (self.folder / "written").read_text().split()
        num_starts = len(start_lines(self.run_dir))
        most_redone = num_ranks * DEPTH * (num_starts - 1)
        assert len(written) - NUM_BLOCKS <= most_redone
        assert_same_files(self.folder / "out/v.zarr", undisturbed)
        return len(written) - NUM_BLOCKS


def test_undisturbed(cluster, openmpi, folder, undisturbed):
    job = Job(cluster, openmpi, folder, seconds=0.0)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    assert job.assert_complete(undisturbed) == 0
    assert "state    complete" in job.told


def test_requeued_in_the_middle(cluster, openmpi, folder, undisturbed, capsys):
    job = Job(cluster, openmpi, folder, seconds=0.5)
    job.wait_for_blocks(8)
    cluster.ask("scontrol", "requeue", job.number)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    job.assert_complete(undisturbed)
    found = status_of(job.config, capsys)
    assert found["slurm"]["job"] == str(job.number)
    assert [s["slurm"]["num_restarts"] for s in start_lines(job.run_dir)] == [0, 1]


def test_a_time_limit_too_short_for_the_job(cluster, openmpi, folder, undisturbed):
    # What Slurm allows is 60 s at least; the run is told to end well before.
    schedule = {"stop_before_seconds": 48}
    job = Job(cluster, openmpi, folder, seconds=2, schedule=schedule, time="1")
    assert job.wait(300) == ("COMPLETED", "0:0"), job.told
    assert job.assert_complete(undisturbed) == 0
    assert len(start_lines(job.run_dir)) >= 3
    assert "ending early: the allocation ends in" in job.told
    assert "job.sh: requeued: this start has done" in job.told


def test_sigterm_to_all_ranks(cluster, openmpi, folder, undisturbed):
    job = Job(cluster, openmpi, folder, seconds=0.5)
    job.wait_for_blocks(8)
    cluster.ask("scancel", "--signal=TERM", job.number)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    assert job.assert_complete(undisturbed) == 0
    assert "ending early: SIGTERM on rank" in job.told
    assert job.told.count("job.sh: requeued") == 1


def test_a_lost_node(cluster, openmpi, folder, undisturbed):
    job = Job(cluster, openmpi, folder, seconds=0.5, nodes="3")
    job.wait_for_blocks(8)
    cluster.kill_node("node2")
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    job.assert_complete(undisturbed, num_ranks=6)
    starts = start_lines(job.run_dir)
    assert [s["hosts"] for s in starts] == [
        ["node1", "node2", "node3"],
        ["node1", "node3", "node4"],
    ]


def test_a_job_that_cannot_progress_is_not_requeued(cluster, openmpi, folder):
    fault = {"kind": "exit", "code": 1, "rank": None, "point": "read", "after": 1}
    job = Job(cluster, openmpi, folder, nodes="1", faults={"faults": [fault]})
    assert job.wait() == ("FAILED", "75:0"), job.told
    assert "job.sh: NOT requeued: this start has done no block" in job.told
    assert cluster.job(job.number)["Restarts"] == "0"


def test_failed_blocks_are_listed(cluster, openmpi, folder):
    job = Job(cluster, openmpi, folder, seconds=0.0, nodes="1", faults={"nan_blocks": [7]})
    assert job.wait() == ("FAILED", "3:0"), job.told
    assert "failed   block 7, " in job.told
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_mistake_is_told(cluster, openmpi, folder):
    job = Job(cluster, openmpi, folder, nodes="1", schedule={"mode": "dinamic"})
    assert job.wait() == ("FAILED", "2:0"), job.told
    assert "dinamic" in job.told


def test_a_cancelled_job_stays_cancelled(cluster, openmpi, folder):
    job = Job(cluster, openmpi, folder, seconds=0.5, nodes="1")
    job.wait_for_blocks(2)
    cluster.ask("scancel", job.number)
    state, _ = job.wait()
    assert state == "CANCELLED", job.told
    assert "job.sh: requeued" not in job.told
    assert json.loads((job.run_dir / journal.NAME).read_text().splitlines()[0])
