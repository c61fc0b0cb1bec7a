"""slurm/job.sh: it goes on by itself after whatever ends it, stops when that is of no use."""

from tests.endtoend import start_lines
from tests.faults.slow import status_of
from tests.slurm.batch import Job


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
