"""Who may write to a run directory: claims, their age, and their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpichunk.errors import JournalError
from mpichunk.process import Process, start_time, this_process
from mpichunk.rundir import lock as locks
from mpichunk.rundir.lock import (
    Claim,
    RunLock,
    find_holder,
    is_dead,
    read_claims,
)

HERE = this_process()


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def write_claim(run_dir, number=1, *, age=0.0, **content):
    path = run_dir / f"lock.{number}"
    whole = {"host": "node7", "machine": "another", "processes": [[1, 1]], "num_elsewhere": 0}
    path.write_text(json.dumps(whole | content))
    os.utime(path, (time.time() - age,) * 2)
    return path


def no_sleep(_):
    raise AssertionError("nothing to wait for")


def test_a_lock_is_there_while_it_is_held(tmp_path):
    with RunLock.acquire(tmp_path / "run") as lock:
        content = json.loads(lock.path.read_text())
        assert content["processes"] == [[os.getpid(), HERE.started]]
        assert names(tmp_path / "run") == ["lock.1"]
    assert names(tmp_path / "run") == []


def test_a_second_job_is_refused_while_the_first_lives(tmp_path):
    with RunLock.acquire(tmp_path):
        with pytest.raises(JournalError, match=rf"by a job on .* \(process {os.getpid()}\)"):
            RunLock.acquire(tmp_path, sleep=no_sleep)
        assert names(tmp_path) == ["lock.1"]


def test_the_lock_of_a_dead_job_of_this_machine_is_taken_at_once(tmp_path, caplog):
    script = (
        "import os, sys; from pathlib import Path; from mpichunk.rundir.lock import RunLock;"
        "RunLock.acquire(Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert names(tmp_path) == ["lock.1"]
    with RunLock.acquire(tmp_path, sleep=no_sleep):
        assert names(tmp_path) == ["lock.2"]
    assert "which is dead" in caplog.text
    assert names(tmp_path) == []


def test_another_process_of_that_number_is_not_the_job(tmp_path):
    write_claim(tmp_path, machine=HERE.machine, processes=[[HERE.pid, HERE.started - 1]])
    RunLock.acquire(tmp_path, sleep=no_sleep).release()


def test_a_job_lives_as_long_as_one_of_its_ranks(tmp_path):
    write_claim(tmp_path, machine=HERE.machine, processes=[[1, 0], [HERE.pid, HERE.started]])
    with pytest.raises(JournalError, match="in use"):
        RunLock.acquire(tmp_path, sleep=no_sleep)


def test_the_lock_of_another_machine_is_taken_when_it_is_old(tmp_path):
    write_claim(tmp_path, age=locks.STALE_SECONDS + 1)
    RunLock.acquire(tmp_path, sleep=no_sleep).release()


def test_a_stopped_job_of_this_machine_keeps_its_lock_however_old(tmp_path):
    job = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(job.pid, signal.SIGSTOP)
        process = [job.pid, start_time(job.pid)]
        write_claim(tmp_path, machine=HERE.machine, processes=[process], age=1000)
        with pytest.raises(JournalError, match="in use"):
            RunLock.acquire(tmp_path, sleep=no_sleep)
        assert find_holder(tmp_path)
    finally:
        job.kill()
        job.wait()
    assert find_holder(tmp_path) is None
    RunLock.acquire(tmp_path, sleep=no_sleep).release()


def test_the_lock_of_another_machine_is_watched_until_it_is_old(tmp_path, caplog):
    path = write_claim(tmp_path)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        age = 10.0 * len(slept)
        os.utime(path, (time.time() - age,) * 2) if age > locks.STALE_SECONDS else None

    RunLock.acquire(tmp_path, sleep=sleep).release()
    assert len(slept) == 10
    assert "waiting at most 90 s" in caplog.text


def test_the_lock_of_another_machine_that_is_renewed_is_respected(tmp_path):
    path = write_claim(tmp_path, age=30)
    with pytest.raises(JournalError, match=r"by a job on node7 \(process 1\), which is alive"):
        RunLock.acquire(tmp_path, sleep=lambda _: os.utime(path))
    assert names(tmp_path) == ["lock.1"]


def test_a_lock_given_back_while_it_is_watched_is_free(tmp_path):
    path = write_claim(tmp_path)
    RunLock.acquire(tmp_path, sleep=lambda _: path.unlink()).release()


def test_a_claim_whose_writer_was_lost_while_it_wrote_goes_by_age(tmp_path):
    path = tmp_path / "lock.3"
    path.write_text('{"host": "no')
    seen = []

    def sleep(_):
        seen.append(read_claims(tmp_path)[0].content)
        os.utime(path, (time.time() - 100,) * 2)

    RunLock.acquire(tmp_path, sleep=sleep).release()
    assert seen == [{}]


def test_a_job_with_ranks_elsewhere_is_not_dead_because_those_here_are():
    claim = Claim(
        path=Path("lock.1"),
        renewed=100.0,
        content={"machine": "m", "processes": [[5, 5]], "num_elsewhere": 2},
    )
    assert not is_dead(claim, now=150.0, machine="m", started=lambda _: None)
    assert is_dead(claim, now=191.0, machine="m", started=lambda _: None)
    assert not is_dead(claim, now=191.0, machine="m", started=lambda _: 5)
    assert is_dead(claim, now=191.0, machine="other", started=lambda _: 5)
    alone = Claim(path=claim.path, renewed=100.0, content=claim.content | {"num_elsewhere": 0})
    assert is_dead(alone, now=101.0, machine="m", started=lambda _: None)
    assert not is_dead(alone, now=101.0, machine="m", started=lambda _: 5)
    assert not is_dead(alone, now=101.0, machine="other", started=lambda _: None)


def test_a_lock_of_another_version_goes_by_age():
    claim = Claim(path=Path("lock.1"), renewed=100.0, content={"machine": "m", "processes": []})
    assert not is_dead(claim, now=150.0, machine="m", started=lambda _: None)
    assert is_dead(claim, now=191.0, machine="m", started=lambda _: None)


def test_of_many_jobs_that_start_at_once_at_most_one_gets_the_lock(tmp_path):
    write_claim(tmp_path, age=1000)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from mpichunk.rundir.lock import RunLock; from mpichunk.errors import JournalError\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try: RunLock.acquire(Path(sys.argv[1]))\n"
        "except JournalError: print('refused', flush=True)\n"
        "else: print('held', flush=True); time.sleep(1)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(time.time() + 1.5)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [job.communicate()[0].strip() for job in jobs]
    assert said.count("held") <= 1
    assert set(said) <= {"held", "refused"}


def test_a_lock_that_is_taken_away_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.01)
    lock = RunLock.acquire(tmp_path)
    before = lock.path.stat().st_mtime_ns
    time.sleep(0.1)
    assert lock.path.stat().st_mtime_ns > before
    lock.check()
    lock.path.unlink()
    time.sleep(0.1)
    with pytest.raises(JournalError, match="another job has taken the run directory"):
        lock.check()
    lock.release()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_lost_lock_is_noticed_before_it_is_due_for_renewal(tmp_path, is_replaced):
    lock = RunLock.acquire(tmp_path)
    lock.check()
    lock.path.unlink()
    if is_replaced:
        other = write_claim(tmp_path)
        assert other == lock.path
    with pytest.raises(JournalError, match="another job has taken the run directory"):
        lock.check()
    lock.release()
    assert lock.path.exists() == is_replaced


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        aside = lock.path.rename(tmp_path / "aside")
        lock.path.mkdir()
        lock.check()
        lock.path.rmdir()
        aside.rename(lock.path)
        lock.check()


def test_a_lock_says_when_it_was_taken(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        before = lock.taken
        (tmp_path / "later").touch()
        assert before <= (tmp_path / "later").stat().st_mtime <= before + 10


def test_a_place_that_cannot_be_a_run_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written"):
        RunLock.acquire(tmp_path / "file" / "run")


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) is None
    process.wait()
    assert start_time(process.pid) is None
    assert start_time(os.getpid()) == HERE.started


def test_ranks_of_other_machines_are_counted_only(tmp_path):
    elsewhere = Process(machine="another", pid=HERE.pid, started=HERE.started)
    with RunLock.acquire(tmp_path, processes=[HERE, elsewhere, elsewhere]) as lock:
        content = json.loads(lock.path.read_text())
    assert content["processes"] == [[HERE.pid, HERE.started]]
    assert content["num_elsewhere"] == 2
