"""`status --watch` while a job begins its run anew."""

from pathlib import Path

import pytest

from mpichunk.config.file import load_config
from mpichunk.errors import ExitCode, NotStartedError
from mpichunk.rundir import journal as journals
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.lock import RunLock
from mpichunk.verbs import status as verb
from tests.smallrun import config_file

NAMES = {"num_blocks": 18, "fingerprint": {}, "versions": {}}


@pytest.fixture
def config(tmp_path):
    return config_file(tmp_path)


@pytest.fixture
def run_dir(config):
    run_dir = Path(load_config(config).config.run_dir)
    Journal.open(run_dir, **NAMES).close()
    return run_dir


def watch(config, monkeypatch, *steps, check=False):
    """Watch a run to which one thing happens before each look but the first."""
    waiting = iter(steps)
    monkeypatch.setattr(verb.time, "sleep", lambda seconds: next(waiting)())
    code = verb.status(config, [], as_json=False, watch=True, check=check)
    assert next(waiting, None) is None
    return code


def set_aside(run_dir):
    assert journals.set_aside(run_dir / journals.NAME)


@pytest.mark.parametrize("check", [False, True])
def test_a_run_that_is_begun_anew_is_starting_meanwhile(
    config, run_dir, monkeypatch, capsys, check
):
    lock = RunLock.acquire(run_dir)
    steps = [
        lambda: set_aside(run_dir),
        lambda: (run_dir / journals.NAME).write_text('{"format":'),
        lambda: Journal.open(run_dir, fresh=True, **NAMES).close(),
        lock.release,
    ]
    code = watch(config, monkeypatch, *steps, check=check)
    assert code == (ExitCode.DRAINED if check else ExitCode.ALL_DONE)
    states = [
        line.split(maxsplit=1)[1].split(":")[0].split(";")[0]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("state")
    ]
    assert states == ["running", "starting", "starting", "running", "not running"]


def test_a_journal_that_nobody_begins_anew_is_missed(config, run_dir, monkeypatch):
    lock = RunLock.acquire(run_dir)

    def lose():
        set_aside(run_dir)
        lock.release()

    with pytest.raises(NotStartedError, match="has not been run yet"):
        watch(config, monkeypatch, lose)
