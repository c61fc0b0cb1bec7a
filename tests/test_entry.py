"""How the process ends: with the exit code of the verb, also while threads compute."""

import pytest

from mpichunk import cli

PROGRAM = """
import sys, threading, time
from mpichunk import cli

def compute():
    while True:
        time.sleep(0.01)

threading.Thread(target=compute, daemon={is_daemon}).start()

def verb(options):
    raise KeyboardInterrupt

cli._VERBS["status"] = verb
sys.argv = ["mpichunk", "status", "c.yaml"]
cli.entry()
"""


@pytest.mark.parametrize("is_daemon", [True, False])
def test_what_was_interrupted_does_not_keep_the_process(python, is_daemon):
    done = python("-c", PROGRAM.format(is_daemon=is_daemon), timeout=30)
    assert done.returncode == 1 and "mpichunk: interrupted" in done.stderr


def test_a_mistake_ends_with_its_code(python, tmp_path):
    done = python("-m", "mpichunk", "plan", tmp_path / "none.yaml", timeout=30)
    assert done.returncode == 2 and "none.yaml" in done.stderr


def test_an_interrupt_while_an_extension_is_loaded_is_one(monkeypatch, capsys):
    def verb(options):
        raise ImportError("initialization failed") from cause

    monkeypatch.setitem(cli._VERBS, "status", verb)
    cause = KeyboardInterrupt()
    assert cli.main(["status", "c.yaml"]) == 1
    assert capsys.readouterr().err == "mpichunk: interrupted\n"
    cause = ValueError()
    with pytest.raises(ImportError):
        cli.main(["status", "c.yaml"])
