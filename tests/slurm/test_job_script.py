"""slurm/job.sh: it goes on by itself after whatever ends it, stops when that is of no use."""

import pytest

from tests.endtoend import start_lines, status_of
from tests.slurm.batch import Job


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, openmpi):
    """A job whose time limit is too short; it runs beside others, which leave nodes free."""
    folder = cluster.folder / "jobs" / "limited"
    folder.mkdir(parents=True)
    # Slurm knows no limit below 60 s: the run is told to end after 30 s, and has 30 s for it.
    # Two ranks need 60 s for 48 blocks of 2.5 s, so at least two starts.
    how = {"schedule": {"stop_before_seconds": 30}, "time": "1", "nodes": "1"}
    job = Job(cluster, openmpi, folder, name="job.sh", seconds=2.5, **how)
    yield job
    job.cancel()


@pytest.fixture(scope="module", autouse=True)
def overdue(cluster, openmpi):
    """A job whose blocks take so long that it is killed at its limit; beside others, too."""
    folder = cluster.folder / "jobs" / "overdue"
    folder.mkdir(parents=True)
    how = {"schedule": {"stop_before_seconds": 0}, "time": "1", "nodes": "1"}
    job = Job(cluster, openmpi, folder, name="job.sh", seconds=25, **how)
    yield job
    job.cancel()


def test_a_job_that_cannot_progress_is_not_requeued(cluster, submit):
    fault = {"kind": "exit", "code": 1, "rank": None, "point": "read", "after": 1}
    job = submit("job.sh", nodes="1", faults={"faults": [fault]})
    assert job.wait() == ("FAILED", "75:0"), job.told
    assert "job.sh: NOT requeued: this start has done no block" in job.told
    assert cluster.job(job.number)["Restarts"] == "0"


def test_failed_blocks_are_listed(cluster, submit):
    job = submit("job.sh", seconds=0.0, nodes="1", faults={"nan_blocks": [7]})
    assert job.wait() == ("FAILED", "3:0"), job.told
    assert "failed   block 7, " in job.told
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_mistake_is_told(submit):
    job = submit("job.sh", nodes="1", schedule={"mode": "dinamic"})
    assert job.wait() == ("FAILED", "2:0"), job.told
    assert "dinamic" in job.told


def test_a_cancelled_job_stays_cancelled(submit):
    job = submit("job.sh", seconds=0.5, nodes="1")
    job.wait_for_blocks(2)
    job.cancel()
    state, _ = job.wait()
    assert state == "CANCELLED", job.told
    assert "job.sh: requeued" not in job.told


def test_preempted_by_an_urgent_job(cluster, submit):
    job = submit("job.sh", seconds=0.3, nodes="1")
    job.wait_for_blocks(4)
    (host,) = start_lines(job.run_dir)[0]["hosts"]
    wanted = ("--partition=urgent", "--exclusive", f"--nodelist={host}", "--output=/dev/null")
    urgent = cluster.submit(*wanted, "--wrap=true")
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    assert "ending early: SIGTERM on rank" in job.told
    assert job.told.count("job.sh: requeued") == 1
    assert len(start_lines(job.run_dir)) == 2
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    # That of the new start: what job.sh asks for must not be left over from the first.
    assert cluster.job(job.number)["PreemptTime"] == "None"


def test_a_lost_node(cluster, submit, undisturbed):
    job = submit("job.sh", seconds=0.8, nodes="2")
    job.wait_for_blocks(8)
    lost = start_lines(job.run_dir)[0]["hosts"][1]
    cluster.kill_node(lost)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    job.assert_complete(undisturbed, num_ranks=4)
    hosts = start_lines(job.run_dir)[-1]["hosts"]
    assert len(hosts) == 2 and lost not in hosts


@pytest.mark.timeout(600)
def test_a_time_limit_too_short_for_the_job(limited, undisturbed):
    assert limited.wait(500) == ("COMPLETED", "0:0"), limited.told
    assert limited.assert_complete(undisturbed) == 0
    assert len(start_lines(limited.run_dir)) >= 2
    assert "ending early: the allocation ends in" in limited.told
    assert "job.sh: requeued: this start has done" in limited.told


def test_a_time_limit_that_is_met(overdue):
    overdue.wait_for_restart()
    assert "SIGUSR2 on rank" in overdue.told or "DUE TO TIME LIMIT" in overdue.told
    assert "job.sh: requeued: this start has done" in overdue.told


def test_undisturbed(submit, undisturbed):
    job = submit("job.sh", seconds=0.0)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    assert job.assert_complete(undisturbed) == 0
    assert "state    complete" in job.told


def test_requeued_in_the_middle(cluster, submit, undisturbed, capsys):
    job = submit("job.sh", seconds=0.5)
    job.wait_for_blocks(8)
    cluster.ask("scontrol", "requeue", job.number)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    job.assert_complete(undisturbed)
    found = status_of(job.config, capsys)
    assert found["slurm"]["job"] == str(job.number)
    assert [s["slurm"]["num_restarts"] for s in start_lines(job.run_dir)] == [0, 1]


def test_sigterm_to_all_ranks(cluster, submit, undisturbed):
    job = submit("job.sh", seconds=0.5)
    job.wait_for_blocks(8)
    cluster.ask("scancel", "--signal=TERM", job.number)
    assert job.wait() == ("COMPLETED", "0:0"), job.told
    assert job.assert_complete(undisturbed) == 0
    assert "ending early: SIGTERM on rank" in job.told
    assert job.told.count("job.sh: requeued") == 1


def test_a_job_that_must_not_be_requeued_ends_in_good_order(cluster, submit):
    job = submit("job.sh", seconds=0.5, nodes="1")
    job.wait_for_blocks(2)
    cluster.ask("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    cluster.ask("scancel", "--signal=TERM", job.number)
    assert job.wait() == ("FAILED", "75:0"), job.told
    assert "NOT requeued: scontrol refuses" in job.told
