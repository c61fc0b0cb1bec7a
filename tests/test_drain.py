"""When a run ends early: signals, the stop file, the end of the allocation."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mpichunk.roles.drain import (
    LOOK_SECONDS,
    REPEAT_SECONDS,
    DrainSources,
    DrainWatch,
    Signals,
    clear_stop,
    reason_to_stop,
    request_stop,
)
from mpichunk.rundir.layout import STOP
from mpichunk.rundir.lock import RunLock


def watch(run_dir, **kwargs):
    sources = kwargs.pop("sources", DrainSources())
    return DrainWatch(sources, stop_file=run_dir / STOP, **kwargs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_reason_on_every_rank(tmp_path, number):
    with Signals() as signals:
        found = watch(tmp_path, sources=DrainSources(signals=signals))
        assert found.poll(0.0, is_leader=False) is None
        os.kill(os.getpid(), number)
        assert found.poll(0.1, is_leader=False) == number.name
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_reason_is_told_again_now_and_then(tmp_path):
    with Signals() as signals:
        found = watch(tmp_path, sources=DrainSources(signals=signals))
        os.kill(os.getpid(), signal.SIGTERM)
        told = [found.poll(now, is_leader=False) for now in (0.0, 0.1, REPEAT_SECONDS + 0.1)]
    assert told == ["SIGTERM", None, "SIGTERM"]


def test_a_second_interrupt_ends_the_process_at_once():
    script = (
        "import os, signal; from mpichunk.roles.drain import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(signals.received.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGINT\n")


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_stop_file_is_looked_for_by_the_leader_every_few_seconds(tmp_path):
    leader, other = watch(tmp_path), watch(tmp_path)
    assert leader.poll(0.0, is_leader=True) is None
    request_stop(tmp_path)
    assert leader.poll(LOOK_SECONDS / 2, is_leader=True) is None
    assert leader.poll(LOOK_SECONDS, is_leader=True) == "`mpichunk stop`"
    assert other.poll(LOOK_SECONDS, is_leader=False) is None
    now = time.time()
    os.utime(tmp_path / STOP, (now, now))
    clear_stop(tmp_path, before=now + 1)
    clear_stop(tmp_path, before=now + 1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_once_the_lock_is_taken_is_for_this_job(tmp_path):
    request_stop(tmp_path)
    past = time.time() - 5
    os.utime(tmp_path / STOP, (past, past))
    with RunLock.acquire(tmp_path) as lock:
        clear_stop(tmp_path, before=lock.taken)
        assert not (tmp_path / STOP).exists()
        request_stop(tmp_path)
        clear_stop(tmp_path, before=lock.taken)
        assert (tmp_path / STOP).exists()


def test_a_run_directory_that_cannot_be_read_is_no_reason(tmp_path):
    assert watch(tmp_path / "gone").poll(0.0, is_leader=True) is None


def test_the_end_of_the_allocation_is_a_reason_ahead_of_time(tmp_path):
    times = iter([800.0, 880.0])
    found = watch(
        tmp_path,
        sources=DrainSources(end_time=lambda: 1000.0),
        stop_before_seconds=120,
        clock=lambda: next(times),
    )
    assert found.poll(0.0, is_leader=True) is None
    assert found.poll(1.0, is_leader=True) == "the allocation ends in 120 s"


def test_without_a_known_end_there_is_always_time():
    assert reason_to_stop(is_asked=False, now=1e12, end_time=None, stop_before_seconds=120) is None
