"""Jobs that are asked to end early finish what they compute, exit 75, and lose nothing."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from functools import partial

import pytest

from mpichunk import cli
from mpichunk.rundir import journal
from mpichunk.rundir.layout import STOP
from tests.endtoend import assert_same_files, block_lines, check, status_of, wait_until_done
from tests.faults.slow import NUM_BLOCKS, pid_of_rank, program, slow_config


def drain_and_resume(config, start, ask, undisturbed, *, seconds=0.1):
    """Start, `ask(process)` it to end once some blocks are done, start again; return stderr."""
    run_dir = config.parent / "runs/v"
    asked = []

    def meanwhile(process):
        wait_until_done(process, run_dir, 4)
        ask(process)
        asked.append(time.monotonic())

    how = program(config, seconds)
    drained = start(*how["args"], env=how["env"], meanwhile=meanwhile)
    took = time.monotonic() - asked[0]
    assert drained.returncode == 75, drained.stderr
    assert "Traceback" not in drained.stderr
    assert check(config) == 75
    num_done = len(block_lines(run_dir))
    assert 4 <= num_done < NUM_BLOCKS
    # What was written is in the journal: nothing that was computed is lost.
    written = (config.parent / "written").read_text().split()
    assert sorted(map(int, written)) == sorted(line["block"] for line in block_lines(run_dir))
    last = json.loads((run_dir / journal.NAME).read_text().splitlines()[-1])
    assert last["end"]["reason"] == "drained"
    assert last["end"]["why"] in drained.stderr
    assert took < 10

    done = start("-m", "mpichunk", "run", config)
    assert done.returncode == 0, done.stderr
    assert check(config) == 0
    counts = Counter(line["block"] for line in block_lines(run_dir))
    assert sorted(counts) == list(range(NUM_BLOCKS))
    assert max(counts.values()) == 1
    assert not (run_dir / STOP).exists()
    assert not list(run_dir.glob("lock.*"))
    assert_same_files(config.parent / "out/v.zarr", undisturbed)
    return drained.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_a_process(tmp_path, python, undisturbed, number):
    config = slow_config(tmp_path)
    told = drain_and_resume(
        config, python, lambda process: process.send_signal(number), undisturbed
    )
    assert f"ending early: {number.name} on rank 0" in told


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_sigusr2_to_mpirun_reaches_all_ranks(tmp_path, mpirun, undisturbed, mode):
    config = slow_config(tmp_path, schedule={"mode": mode})
    told = drain_and_resume(
        config,
        partial(mpirun, 3),
        lambda process: process.send_signal(signal.SIGUSR2),
        undisturbed,
    )
    assert told.count("ending early") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_a_single_rank_ends_all(tmp_path, mpirun, undisturbed, rank):
    config = slow_config(tmp_path)
    told = drain_and_resume(
        config,
        partial(mpirun, 2),
        lambda process: os.kill(pid_of_rank(process, rank), signal.SIGTERM),
        undisturbed,
    )
    assert f"ending early: SIGTERM on rank {rank}" in told


def test_stop_reaches_a_running_job(tmp_path, mpirun, undisturbed, capsys):
    config = slow_config(tmp_path)
    assert cli.main(["stop", str(config)]) == 2
    assert "has not been run yet" in capsys.readouterr().err

    def ask(_):
        assert cli.main(["stop", str(config)]) == 0
        assert "asked to finish" in capsys.readouterr().out

    told = drain_and_resume(config, partial(mpirun, 2), ask, undisturbed, seconds=0.3)
    assert "ending early: `mpichunk stop`" in told
    assert cli.main(["stop", str(config)]) == 0
    assert "nothing to stop: complete" in capsys.readouterr().out


def test_the_end_of_the_allocation_is_seen_coming(tmp_path, mpirun, capsys):
    config = slow_config(tmp_path, schedule={"stop_before_seconds": 100})
    end_time = round(time.time()) + 106
    how = program(config, 0.5)
    done = mpirun(2, *how["args"], env=how["env"] | {"SLURM_JOB_END_TIME": end_time})
    assert done.returncode == 75, done.stderr
    assert time.time() < end_time - 90
    assert "ending early: the allocation ends in" in done.stderr
    found = status_of(config, capsys)
    assert found["end_reason"] == "drained"
    assert not found["is_alive"]
    assert found["num_failed"] == 0


def test_a_second_interrupt_ends_at_once(tmp_path, python):
    config = slow_config(tmp_path)
    how = program(config, 1000.0)
    times = []

    def interrupt_twice(process: subprocess.Popen[str]):
        log = tmp_path / "runs/v/logs/rank-00000.log"
        while not log.exists() or "network:" not in log.read_text():
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        times.append(time.monotonic())

    done = python(*how["args"], env=how["env"], meanwhile=interrupt_twice)
    assert time.monotonic() - times[0] < 5
    assert done.returncode == -signal.SIGINT
    assert check(config) == 75
