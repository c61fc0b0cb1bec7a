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

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))

# Plays `python -m mpichunk` and counts its starts: the journal is two numbers and a word.
PYTHON = """\
#!/bin/bash
cd "{folder}" || exit 1
case "$*" in
*json.load*num_done*) cat done ;;
*json.load*end_reason*) cat reason ;;
*"status"*--json) ;;
*"status"*--check) exit "$(cat code)" ;;
*"-m mpichunk run"*) echo run >> starts; cat done_after > done ;;
esac
"""

PROGRAMS = {
    "srun": '[[ "$*" = *mpichunk* ]] && { "${@: -5:1}" -m mpichunk run x; exit 9; }; exit 0',
    "mpirun": "python -m mpichunk run x; exit 0",
    "scontrol": 'if [ "$1" = show ]; then echo node1 node2; else echo "$@" >> "{folder}/asked"; fi',
    "squeue": "exit 0",
    "sleep": "exit 0",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install '.[test]' brings shellcheck"
    done = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_are_scripts():
    assert [path.name for path in SCRIPTS] == ["job-ulfm.sh", "job.sh"]


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


def start(script, folder, *, code, gain, reason="None"):
    """Run a script on what a journal proves afterwards; return exit code, output, requests."""
    (folder / "bin").mkdir()
    values = {"done": 5, "done_after": 5 + gain, "code": code, "reason": reason}
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    programs = {"python": PYTHON, **{n: f"#!/bin/bash\n{t}\n" for n, t in PROGRAMS.items()}}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text.replace("{folder}", str(folder)))
        (folder / "bin" / name).chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"VIRTUAL_ENV={folder}\n")
    env = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS_PER_NODE": "2",
    }
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
    assert (folder / "starts").read_text().split() == ["run"], done.stderr
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
