"""What Slurm tells of a job: its number, its end, asked for once; and the table of variables."""

import re
import subprocess
from datetime import datetime

import pytest

from mpichunk.ranks.slurm import (
    AGAIN_SECONDS,
    VARIABLES,
    Allocation,
    SlurmJob,
    describe,
    find_job,
    parse_end_time,
)
from tests.launch import REPOSITORY

ENVIRON = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_CLUSTER_NAME": "big",
}


class Controller:
    """Answers as `scontrol` would, and counts how often it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, job):
        self.asked.append(job)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_job_is_that_of_the_environment():
    assert find_job({}) is None
    assert find_job(ENVIRON) == SlurmJob(
        job="4711", step="0", num_restarts=2, partition="gpu", cluster="big"
    )
    bare = find_job({"SLURM_JOB_ID": "5"})
    assert bare == SlurmJob(job="5", step=None, num_restarts=0, partition=None, cluster=None)


def test_every_variable_that_is_read_is_in_the_table_and_no_other():
    sources = [path.read_text() for path in (REPOSITORY / "mpichunk").rglob("*.py")]
    found = {name for text in sources for name in re.findall(r'"(SLURM_[A-Z_]+)"', text)}
    assert found == set(VARIABLES)
    assert all(VARIABLES.values())


def test_the_environment_is_believed_and_nobody_asked():
    ask = Controller()
    found = Allocation(ENVIRON | {"SLURM_JOB_END_TIME": "1760000000"}, ask=ask)
    assert found.end_time() == 1.76e9
    assert ask.asked == []


def test_the_controller_is_asked_once():
    ask = Controller("JobId=4711 EndTime=1760000000 Deadline=N/A")
    found = Allocation(ENVIRON, ask=ask)
    assert ask.asked == []
    assert [found.end_time(), found.end_time()] == [1.76e9, 1.76e9]
    assert ask.asked == ["4711"]


def test_a_job_without_end_is_asked_about_once():
    ask = Controller("JobId=4711 EndTime=Unknown")
    found = Allocation(ENVIRON, ask=ask)
    assert [found.end_time(), found.end_time()] == [None, None]
    assert len(ask.asked) == 1


def test_outside_of_slurm_nobody_is_asked():
    ask = Controller()
    found = Allocation({}, ask=ask)
    assert (found.end_time(), found.facts()) == (None, {})
    assert ask.asked == []


@pytest.mark.parametrize(
    "silence", [subprocess.TimeoutExpired("scontrol", 10), OSError("Invalid job id")]
)
def test_a_controller_that_does_not_answer_is_asked_again_later(silence):
    now = [0.0]
    ask = Controller(silence, "EndTime=1760000000")
    found = Allocation(ENVIRON, ask=ask, clock=lambda: now[0])
    assert [found.end_time(), found.end_time()] == [None, None]
    assert len(ask.asked) == 1
    now[0] = AGAIN_SECONDS
    assert found.end_time() == 1.76e9


def test_a_container_without_scontrol_is_asked_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    now = [0.0]
    found = Allocation(ENVIRON, clock=lambda: now[0])
    assert found.end_time() is None
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho EndTime=1760000000\n")
    (tmp_path / "scontrol").chmod(0o755)
    now[0] = 10 * AGAIN_SECONDS
    assert found.end_time() is None


def test_scontrol_is_asked_for_times_that_all_zones_agree_on(tmp_path, monkeypatch):
    script = '#!/bin/sh\n[ "$*$SLURM_TIME_FORMAT" = "--oneliner show job 4711%s" ] || exit 1\n'
    (tmp_path / "scontrol").write_text(f"{script}echo JobId=4711 EndTime=1760000000\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Allocation(ENVIRON).end_time() == 1.76e9
    other = Allocation(ENVIRON | {"SLURM_JOB_ID": "4712"})
    assert other.end_time() is None


ANSWERS = [
    ("JobId=1 StartTime=5 EndTime=1760000000 Deadline=N/A", 1.76e9),
    (f"JobId=1 EndTime={datetime.fromtimestamp(1.76e9).isoformat()}", 1.76e9),
    ("JobId=1 EndTime=Unknown", None),
    ("JobId=1 EndTime=NONE", None),
    ("JobId=1 EndTime=0", None),
    ("JobId=1 EndTime=4294967294", None),
    ("JobId=1", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_end_times(answer, expected):
    assert parse_end_time(answer) == expected


def test_a_job_in_words_is_as_short_as_what_is_known():
    facts = Allocation(ENVIRON, ask=Controller("EndTime=1760000000")).facts()
    assert facts["end_time"] == 1.76e9
    words = describe(facts)
    assert words.startswith("Slurm job 4711.0, restart 2, partition gpu, cluster big, ends 2025-10")
    assert describe({"job": "5"}) == "Slurm job 5"
