"""The scripts in slurm/: their syntax, and what they decide, with programs that play Slurm.

On a real Slurm they run in tests/slurm.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

FILES = sorted((REPOSITORY / "slurm").glob("*.sh"))
SHARED = REPOSITORY / "slurm/requeue.sh"
SCRIPTS = [path for path in FILES if path != SHARED]

# Plays `python -m mpichunk` and counts its starts: the journal is two numbers and a word.
PYTHON = """\
#!/bin/bash
cd "{folder}" || exit 1
case "$*" in
*json.load*num_done*) if [ -s unreadable ]; then exit 1; else cat done; fi ;;
*json.load*end_reason*) cat reason ;;
*"status"*--json*) ;;
*"status"*--check) exit "$(cat code)" ;;
*"-m mpichunk run"*)
    echo run >> starts
    head -n "$(wc -l < starts)" done_after | tail -n 1 > done
    ;;
esac
"""

PROGRAMS = {
    "srun": '[[ "$*" = *mpichunk* ]] && { '
    '"${@: -5:1}" -m mpichunk run x; [ -s "{folder}/ends" ] && kill "$PPID"; exit 9; }; exit 0',
    "mpirun": 'python -m mpichunk run x; [ -s "{folder}/ends" ] && kill "$PPID"; exit 0',
    "scontrol": (
        'case "$1$2" in showjob) cat "{folder}/job" ;; showhostnames) printf "node1\\nnode2\\n" ;; '
        '*) echo "$@" >> "{folder}/asked"; exit "$(cat "{folder}/refused")" ;; esac'
    ),
    "squeue": "exit 0",
    "sleep": "exit 0",
}


@pytest.mark.parametrize("script", FILES, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install '.[test]' brings shellcheck"
    done = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_are_scripts():
    assert [path.name for path in FILES] == ["job-ulfm.sh", "job.sh", "requeue.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_is_to_be_changed_is_said(script):
    text = script.read_text()
    for option in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem-per-cpu"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"#SBATCH --{option}=")]
        assert "# CHANGE" in line
    for line in ("--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert text.count('status "$config" --check') == 1
    assert max(map(len, text.splitlines())) <= 110


def start(script, folder, *, code, gain, reason="None", num_starts=1, env=None, **files):
    """Run a script on what a journal proves afterwards; return exit code, output, requests."""
    (folder / "bin").mkdir()
    values = {"done": 5, "done_after": 5 + gain, "code": code, "reason": reason}
    values |= {"job": "PreemptTime=None", "refused": 0} | files
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    programs = {"python": PYTHON, **{n: f"#!/bin/bash\n{t}\n" for n, t in PROGRAMS.items()}}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text.replace("{folder}", str(folder)))
        (folder / "bin" / name).chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"VIRTUAL_ENV={folder}\n")
    (folder / "slurm").symlink_to(SHARED.parent)
    env = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS_PER_NODE": "2",
    } | (env or {})
    done = subprocess.run(
        ["bash", script, "x.yaml"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    asked = folder / "asked"
    assert (folder / "starts").read_text().split() == ["run"] * num_starts, done.stderr
    return done.returncode, done.stdout, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_exit_code_is_what_the_journal_proves(tmp_path, script, code):
    # Whatever the launcher has returned: here 9 and 0.
    assert start(script, tmp_path, code=code, gain=3)[::2] == (code, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_with_blocks_gained_it_is_requeued(tmp_path, script):
    code, out, asked = start(script, tmp_path, code=75, gain=3, reason="drained")
    assert (code, asked) == (75, "requeue 7\n")
    assert "requeued: " in out and "has done 3 blocks" in out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_it_says_why_not(tmp_path, script):
    code, out, asked = start(script, tmp_path, code=75, gain=0, reason="drained")
    assert (code, asked) == (75, "")
    assert "NOT requeued: " in out and "has done no block" in out


BOTH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
PREEMPTED = "JobState=RUNNING PreemptTime=2026-11-22T21:57:42"


@BOTH
def test_preempted_it_is_requeued_whatever_was_gained(tmp_path, script):
    how = {"reason": "drained", "job": PREEMPTED, "ends": "yes"}
    code, out, asked = start(script, tmp_path, code=75, gain=0, **how)
    assert (code, asked) == (75, "requeue 7\n")
    assert "requeued: the job was preempted" in out and "NOT requeued" not in out


@BOTH
def test_ended_by_somebody_it_is_not_requeued(tmp_path, script):
    code, out, asked = start(script, tmp_path, code=75, gain=3, ends="yes")
    assert (code, asked) == (75, "")
    assert "NOT requeued: somebody has ended this job" in out


@BOTH
@pytest.mark.parametrize(("num_restarts", "wanted"), [("0", "requeue 7\n"), ("3", "")])
def test_a_journal_that_cannot_be_read_is_no_endless_loop(tmp_path, script, num_restarts, wanted):
    how = {"reason": "drained", "unreadable": "yes", "env": {"SLURM_RESTART_COUNT": num_restarts}}
    code, out, asked = start(script, tmp_path, code=75, gain=0, **how)
    assert (code, asked) == (75, wanted)
    assert "the journal could not be read" in out and "no block" not in out


@BOTH
def test_a_requeue_that_is_refused_is_told(tmp_path, script):
    code, out, _ = start(script, tmp_path, code=75, gain=3, reason="drained", refused=1)
    assert code == 75
    assert "NOT requeued: scontrol refuses" in out


@BOTH
def test_a_requeue_that_is_slow_is_not_called_refused(tmp_path, script):
    _, out, _ = start(script, tmp_path, code=75, gain=3, reason="drained")
    assert "NOT requeued" not in out


def test_what_counts_is_the_gain_of_the_whole_job(tmp_path):
    # The first mpirun does three blocks, the second none.
    script = REPOSITORY / "slurm/job-ulfm.sh"
    how = {"num_starts": 2, "done_after": "8\n8"}
    code, out, asked = start(script, tmp_path, code=75, gain=3, **how)
    assert (code, asked) == (75, "requeue 7\n")
    assert "requeued: this job has done 3 blocks" in out


@BOTH
def test_an_environment_that_is_missing_is_told_at_once(tmp_path, script):
    done = subprocess.run(
        ["bash", script, "x.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "activate" in done.stderr


@BOTH
def test_a_shared_file_that_is_missing_is_told_at_once(tmp_path, script):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    done = subprocess.run(
        ["bash", script, "x.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"{script.name}: no slurm/requeue.sh here: change its line" in done.stderr
