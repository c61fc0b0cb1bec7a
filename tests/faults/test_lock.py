"""Two jobs on one run directory: the second is refused while the first lives, and only then."""

import json
import os
import threading
import time
from functools import partial

import pytest

from tests.endtoend import block_lines, check, kill_tree, wait_until_done
from tests.faults.program import GO
from tests.faults.slow import NUM_BLOCKS, program, slow_config

RUN = ("-m", "mpichunk", "run")


def test_a_second_job_is_refused_while_the_first_lives(tmp_path, mpirun, python):
    config = slow_config(tmp_path)
    run_dir = tmp_path / "runs/v"
    # Until all others have been refused.
    how = program(config, 1.5)
    refused = []

    def start_another(process):
        wait_until_done(process, run_dir, 2)
        for options in ((), ("--fresh",)):
            refused.append(python(*RUN, config, *options))
        refused.append(mpirun(2, *RUN, config))
        assert process.poll() is None
        (tmp_path / GO).touch()

    done = mpirun(2, *how["args"], env=how["env"], meanwhile=start_another)
    assert done.returncode == 0, done.stderr
    for other in refused:
        assert other.returncode == 2, other.stderr
        assert "is in use by a job on " in other.stderr
        assert "Traceback" not in other.stderr
    blocks = [line["block"] for line in block_lines(run_dir)]
    assert sorted(blocks) == list(range(NUM_BLOCKS))
    assert check(config) == 0
    assert not list(run_dir.glob("lock.*"))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_lock_of_a_killed_job_is_in_nobodys_way(tmp_path, mpirun, python, num_ranks):
    config = slow_config(tmp_path)
    run_dir = tmp_path / "runs/v"
    how = program(config, 0.1)

    def kill(process):
        wait_until_done(process, run_dir, 3)
        kill_tree(process)

    start = python if num_ranks == 1 else partial(mpirun, num_ranks)
    start(*how["args"], env=how["env"], meanwhile=kill)
    (path,) = run_dir.glob("lock.*")
    assert len(json.loads(path.read_text())["processes"]) == num_ranks
    started = time.monotonic()
    done = start(*RUN, config)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30
    assert "which is dead; going on" in done.stderr
    assert not list(run_dir.glob("lock.*"))


def claim_of_another_host(run_dir, *, age):
    run_dir.mkdir(parents=True)
    path = run_dir / "lock.1"
    content = {"host": "node7", "machine": "?", "processes": [[1, 1]], "num_elsewhere": 0}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_lock_of_a_dead_job_on_another_host(tmp_path, python):
    config = slow_config(tmp_path)
    path = claim_of_another_host(tmp_path / "runs/v", age=87)
    done = python(*RUN, config)
    assert done.returncode == 0, done.stderr
    assert "waiting at most 90 s to see whether a job on node7" in done.stderr
    assert not path.exists()


def test_the_lock_of_a_live_job_on_another_host(tmp_path, python):
    config = slow_config(tmp_path)
    path = claim_of_another_host(tmp_path / "runs/v", age=5)
    renewal = threading.Timer(4, os.utime, [path])
    renewal.start()
    done = python(*RUN, config)
    renewal.join()
    assert done.returncode == 2, done.stderr
    assert "is in use by a job on node7" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.exists()


def test_a_job_whose_lock_was_taken_away_ends_before_it_gets_in_the_way(tmp_path, mpirun):
    config = slow_config(tmp_path)
    run_dir = tmp_path / "runs/v"
    how = program(config, 1.0)

    def take(process):
        wait_until_done(process, run_dir, 2)
        (path,) = run_dir.glob("lock.*")
        path.unlink()

    done = mpirun(2, *how["args"], env=how["env"], meanwhile=take)
    assert done.returncode == 2, done.stderr
    assert "another job has taken the run directory" in done.stderr
    assert "Traceback" not in done.stderr
