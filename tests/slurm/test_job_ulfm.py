"""slurm/job-ulfm.sh: ranks and nodes may be lost, and the allocation goes on being used."""

import os
import signal
import time

import pytest

from tests.endtoend import start_lines


def wait_for_start(job, number, timeout=300):
    end = time.monotonic() + timeout
    while len(start_lines(job.run_dir)) < number:
        assert time.monotonic() < end, f"{job.told}\n{job.cluster.told()}"
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_rank_dies_then_time_runs_out_then_a_node_is_lost(cluster, submit, undisturbed):
    job = submit("job-ulfm.sh", seconds=1.0, signal="B:USR2@1")
    job.wait_for_blocks(4)
    nodes = start_lines(job.run_dir)[0]["hosts"]
    os.kill(job.pid_of_rank(5), signal.SIGKILL)
    job.wait_for_blocks(14)
    # As Slurm does ahead of the time limit: to the script only.
    cluster.ask("scancel", "--batch", "--signal=USR2", job.number)
    wait_for_start(job, 2)
    assert f"rank 5 on {nodes[2]} has died" in job.told
    assert "ending early: SIGUSR2 on rank" in job.told
    assert job.told.count("job-ulfm.sh: requeued") == 1

    job.wait_for_blocks(28)
    nodes = start_lines(job.run_dir)[1]["hosts"]
    cluster.kill_node(nodes[2])
    assert job.wait(400) == ("COMPLETED", "0:0"), job.told
    job.assert_complete(undisturbed)
    starts = start_lines(job.run_dir)
    # A node that is slow to answer on a loaded machine may be taken for lost, too.
    hosts = starts[2]["hosts"]
    assert hosts and set(hosts) <= {nodes[0], nodes[1], nodes[3]}
    assert f"job-ulfm.sh: {len(hosts)} of 4 nodes are left: {' '.join(hosts)}" in job.told
    assert [start["num_ranks"] for start in starts] == [8, 8, 2 * len(hosts)]
    assert [start["slurm"]["num_restarts"] for start in starts] == [0, 1, 1]


def test_a_job_that_cannot_progress_is_not_started_again(submit):
    fault = {"kind": "exit", "code": 1, "rank": None, "point": "read", "after": 1}
    job = submit("job-ulfm.sh", faults={"faults": [fault]}, nodes="1", signal="B:USR2@1")
    assert job.wait() == ("FAILED", "75:0"), job.told
    assert "job-ulfm.sh: 1 of 1 nodes are left: node" in job.told
    assert "job-ulfm.sh: NOT requeued: this job has done no block" in job.told
    assert len(start_lines(job.run_dir)) == 1
