"""What a user can get wrong: one clear message with file, line and cure, and exit code 2."""

import json
import os
import shutil
from pathlib import Path
from socket import gethostname
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from mpichunk import cli
from mpichunk.ranks import comm
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir.layout import STOP
from mpichunk.rundir.lock import RunLock

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self, outputs=1, cut=0, value=0.5):
        super().__init__()
        self.outputs, self.cut, self.value = outputs, cut, value

    def forward(self, x):
        c = self.cut
        if c:
            x = x[:, :, c:-c, c:-c, c:-c]
        return x.repeat(1, self.outputs, 1, 1, 1) + float(self.value)
"""


@pytest.fixture
def attempt(tmp_path, monkeypatch, capfd):
    """Return `attempt(verb, changes) -> (exit code, what stderr says)`, on one rank without MPI."""
    monkeypatch.setattr(comm, "start_mpi", SerialCommunicator)
    monkeypatch.setattr("mpichunk.verbs.run.start_mpi", SerialCommunicator)
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        random = np.random.default_rng(0)
        file["raw"] = random.integers(1, 256, (16, 24, 24), dtype=np.uint8)
    (tmp_path / "net.py").write_text(NETS)

    def attempt(verb: str = "run", text: str | None = None, **sections: Any) -> tuple[int, str]:
        config: dict[str, Any] = {
            "input": {"volume": "raw.h5"},
            "model": {"backend": "identity"},
            "patch": {"shape": [8, 12, 12]},
            "block": {"shape": [8, 16, 16]},
            "output": {"volume": "out.zarr", "chunk_shape": [4, 8, 8]},
            "compute": {"device": "cpu"},
        }
        for name, section in sections.items():
            merged = config.get(name, {}) | section if isinstance(section, dict) else section
            config[name] = merged
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False) if text is None else text)
        capfd.readouterr()
        code = cli.main([verb, str(path)])
        return code, capfd.readouterr().err

    return attempt


TORCH = {"backend": "pytorch", "path": "net.py:Net"}

MISTAKES = {
    "missing input": ({"input": {"volume": "nowhere.h5"}}, "input.volume", "nowhere.h5"),
    "unknown driver": ({"input": {"volume": "file:///x|tiff:"}}, "input.volume", "tiff"),
    "unknown key": ({"patch": {"overlp": [1, 1, 1]}}, "patch.overlp", "overlap"),
    "unknown section": ({"modle": {"backend": "identity"}}, "modle", "model"),
    "wrong type": ({"patch": {"shape": "big"}}, "patch.shape", "big"),
    "overlap of a patch": ({"patch": {"overlap": [8, 4, 4]}}, "patch.overlap", "(8, 12, 12)"),
    "block off the write unit": ({"block": {"shape": [8, 16, 20]}}, "block.shape", "(4, 8, 8)"),
    "roi outside": ({"roi": {"start": [0, 0, 0], "stop": [17, 24, 24]}}, "roi", "[16, 24, 24)"),
    "too many blocks": (
        {
            "input": {"volume": "synthetic://membranes?shape=100000,100000,100000"},
            "block": {"shape": [4, 8, 8]},
        },
        "block.shape",
        "larger blocks",
    ),
    "empty roi": ({"roi": {"start": [4, 0, 0], "stop": [4, 24, 24]}}, "roi", ""),
    "no such backend": ({"model": {"backend": "tensorflow"}}, "model.backend", "pytorch"),
    "no model file": ({"model": TORCH | {"path": "lost.pt"}}, "model.path", "lost.pt"),
    "not a model": ({"model": TORCH | {"path": "raw.h5"}}, "model.path", "raw.h5"),
    "no such class": ({"model": TORCH | {"path": "net.py:Nett"}}, "model.path", "Net"),
    "no weights file": ({"model": TORCH | {"weights": "w.pt"}}, "model.weights", "w.pt"),
    "wrong channels": ({"model": TORCH | {"out_channels": 3}}, "model.out_channels", "3"),
    "needs crop": ({"model": TORCH | {"arguments": {"cut": 2}}}, "patch.crop", "2"),
    "nan": ({"model": TORCH | {"arguments": {"value": "nan"}}}, "model", "NaN"),
    "no cuda": ({"model": TORCH, "compute": {"device": "cuda"}}, "compute.device", "cuda"),
    "output on input": ({"output": {"volume": "raw.h5"}}, "output", "raw.h5"),
    "output in a file": ({"output": {"volume": "net.py/out.zarr"}}, "output.volume", "net.py"),
    "output without format": ({"output": {"volume": "out"}}, "output.volume", "zarr"),
    "shards in precomputed": (
        {
            "output": {"volume": "precomputed://file://out/p", "shard_shape": [8, 16, 16]},
        },
        "output.shard_shape",
        "zarr3",
    ),
    "mask without voxel size": (
        {"mask": {"volume": "raw.h5", "voxel_size": [8, 8, 8]}},
        "input",
        "voxel_size",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(attempt, name):
    sections, key, word = MISTAKES[name]
    code, said = attempt(**sections)
    assert code == 2, said
    assert "Traceback" not in said
    messages = [line for line in said.splitlines() if "config.yaml" in line and key in line]
    assert messages, said
    assert word in said


def test_every_mistake_of_a_file_is_told_at_once(attempt):
    code, said = attempt(
        patch={"shape": [8, 12, 12], "overlap": [9, 1, 1], "windw": "hann"},
        block={"shape": [8, 16, 17]},
        schedule={"mode": "random"},
    )
    assert code == 2
    for key in ("patch.overlap", "patch.windw", "block.shape", "schedule.mode"):
        assert key in said
    assert said.count("config.yaml:") == 4


@pytest.mark.parametrize("text", ["", "- 1\n", "input: [unclosed", "input: {volume: a\n\tb: c"])
def test_what_is_no_config_is_refused(attempt, text):
    code, said = attempt(text=text)
    assert code == 2
    assert "config.yaml" in said
    assert "Traceback" not in said


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert cli.main(["plan", str(tmp_path / "lost.yaml")]) == 2
    assert "lost.yaml" in capsys.readouterr().err


def test_an_output_that_differs_is_refused_with_the_fields(attempt):
    assert attempt()[0] == 0
    code, said = attempt(output={"dtype": "uint8", "chunk_shape": [8, 8, 8]}, run_dir="other")
    assert code == 2
    assert "output.volume" in said
    for field in ("float32", "uint8", "8, 8, 8", "4, 8, 8"):
        assert field in said


def test_an_output_that_another_run_has_written_is_refused(attempt, tmp_path):
    assert attempt()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out.zarr").rglob("*.*")}
    code, told = attempt(run_dir="elsewhere")
    assert code == 2 and ": output.volume: " in told
    assert "was not written by this run" in told and "--fresh" in told
    assert not (tmp_path / "elsewhere").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "out.zarr").rglob("*.*")}
    # What was begun and has written nothing is nobody's.
    for path in (tmp_path / "out.zarr" / "c").rglob("*"):
        if path.is_file():
            path.unlink()
    assert attempt(run_dir="elsewhere")[0] == 0


def test_the_run_that_has_written_an_output_is_named_with_what_differs(attempt, tmp_path):
    """As when a config that was tuned is run where the one before has."""
    assert attempt(run_dir="runs/first")[0] == 0
    code, told = attempt(run_dir="runs/second", patch={"batch_size": 2})
    assert code == 2 and ": output.volume: " in told
    assert f"was written by the run in {tmp_path}/runs/first, with other settings:" in told
    assert "\n  patch.batch_size: 1 then, 2 now\n" in told
    assert "set output.volume to another place, or continue that run with its own config" in told
    # The same settings under another name go on where that run is.
    code, told = attempt(run_dir="runs/second")
    assert code == 2 and f"set run_dir to {tmp_path}/runs/first to continue that run" in told
    assert attempt(run_dir="runs/first")[0] == 0
    # What the message names mends it.
    code, told = attempt(
        run_dir="runs/second", patch={"batch_size": 2}, output={"volume": "new.zarr"}
    )
    assert code == 0, told
    # In the run directory of the other run both must change.
    code, told = attempt(run_dir="runs/first", patch={"batch_size": 2})
    assert code == 2 and "set another run_dir AND output.volume" in told


def test_an_output_that_is_a_spec_is_told_of_as_well(attempt, tmp_path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/out.zarr/"}}
    assert attempt(run_dir="runs/first", output={"volume": spec})[0] == 0
    code, told = attempt(run_dir="runs/second", output={"volume": spec})
    assert code == 2 and f"set run_dir to {tmp_path}/runs/first to continue that run" in told
    (tmp_path / "runs/first/journal.jsonl").unlink()
    code, told = attempt(run_dir="runs/second", output={"volume": spec})
    assert code == 2 and f"there is no {tmp_path}/runs/second/journal.jsonl" in told


def test_a_mask_of_unknown_scale_must_cover_the_input(attempt, tmp_path):
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["mask"] = np.ones((4, 6, 6), np.uint8)
    code, told = attempt(mask={"volume": "mask.h5"})
    assert code == 2 and "set input.voxel_size and mask.voxel_size" in told
    sizes = {"volume": "mask.h5", "voxel_size": [4, 4, 4]}
    code, told = attempt(input={"voxel_size": [1, 1, 1]}, mask=sizes)
    assert code == 0, told


def test_an_output_that_is_gone_is_not_called_done(attempt, tmp_path):
    assert attempt()[0] == 0
    shutil.rmtree(tmp_path / "out.zarr")
    code, said = attempt()
    assert code == 2
    assert "gone" in said
    assert not (tmp_path / "out.zarr").exists()


def test_a_mistake_in_the_network_leaves_nothing_behind(attempt, tmp_path):
    code, _ = attempt(model=TORCH | {"out_channels": 3})
    assert code == 2
    assert not (tmp_path / "out.zarr").exists()
    assert not (tmp_path / "runs").exists()
    assert attempt(model=TORCH)[0] == 0


def test_status_refuses_another_config(attempt):
    assert attempt()[0] == 0
    code, said = attempt("status", patch={"overlap": [1, 1, 1]})
    assert code == 2
    assert "patch.overlap" in said


def test_a_network_that_leaves_is_no_success(attempt, tmp_path):
    leaver = NETS.replace("self.cut\n", "self.cut\n        self.leave_on_third_call()\n")
    leaver += """
    calls = 0

    def leave_on_third_call(self):
        self.calls += 1
        if self.calls > 2:
            raise SystemExit(0)
"""
    (tmp_path / "net.py").write_text(leaver)
    with pytest.raises(RuntimeError, match=r"sys\.exit"):
        attempt(model=TORCH)


def test_another_fingerprint_is_refused_with_the_keys(attempt):
    assert attempt()[0] == 0
    code, said = attempt(patch={"overlap": [1, 1, 1]})
    assert code == 2
    assert "patch.overlap" in said
    assert "--fresh" in said


def test_a_full_run_directory_place_is_refused(attempt, tmp_path):
    (tmp_path / "taken").write_text("")
    code, said = attempt(run_dir="taken")
    assert code == 2
    assert "run_dir" in said


def test_an_unreadable_chunk_fails_its_blocks_and_exits_3(attempt, tmp_path):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(
        tmp_path / "in.zarr", shape=(16, 24, 24), chunks=(8, 8, 8), dtype="uint8"
    )
    array[:] = 7
    chunk = tmp_path / "in.zarr" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:5])
    code, said = attempt(input={"volume": "in.zarr"})
    assert code == 3
    assert "Traceback" not in said
    assert "in.zarr" in said
    assert "failed" in said


@pytest.mark.parametrize("verb", ["plan", "status"])
def test_other_verbs_tell_mistakes_alike(attempt, verb):
    code, said = attempt(verb, patch={"overlap": [8, 4, 4]})
    assert code == 2
    assert "patch.overlap" in said


def test_status_of_what_was_never_run(attempt):
    code, said = attempt("status")
    assert code == 2
    assert "not been run" in said


def test_check_of_what_was_never_run_is_no_mistake(attempt, tmp_path, capfd):
    attempt("status")
    config = str(tmp_path / "config.yaml")
    assert cli.main(["status", config, "--check"]) == 75
    assert "nothing is done yet: not started, or lost before" in capfd.readouterr().out
    assert cli.main(["status", config, "--check", "--json"]) == 75
    assert json.loads(capfd.readouterr().out)["num_done"] == 0


def test_status_and_stop_while_the_first_job_starts(attempt, tmp_path, capfd):
    attempt("status")
    config = str(tmp_path / "config.yaml")
    with RunLock.acquire(tmp_path / "runs/config"):
        for arguments, expected in (([], 0), (["--check"], 75)):
            assert cli.main(["status", config, *arguments]) == expected
            said = capfd.readouterr().out
            assert f"starting: a job on {gethostname()} (process {os.getpid()})" in said
            assert "not started" not in said
        assert cli.main(["status", config, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["starting"].startswith("a job on")
        assert cli.main(["stop", config]) == 0
        assert "asked to finish" in capfd.readouterr().out
    assert (tmp_path / "runs/config" / STOP).exists()
    assert cli.main(["status", config]) == 2


def test_check_of_a_config_with_a_mistake_is_one(attempt, tmp_path):
    attempt("status", patch={"overlp": [1, 1, 1]})
    assert cli.main(["status", str(tmp_path / "config.yaml"), "--check"]) == 2


def test_plan_refuses_what_run_would_refuse(attempt, tmp_path):
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "notes.txt").write_text("mine")
    for verb in ("plan", "run"):
        code, said = attempt(verb)
        assert code == 2, (verb, said)
        assert "output.volume" in said


def test_plan_says_that_a_package_is_missing(attempt, monkeypatch):
    code, said = attempt("plan", model=TORCH)
    assert (code, said) == (0, "")
    monkeypatch.setattr("mpichunk.backends.optional.find_spec", lambda package: None)
    code, said = attempt("plan", model=TORCH)
    assert code == 0 and "lacks the package torch, which is not installed" in said


@pytest.mark.parametrize("verb", ["report", "view", "fly"])
def test_a_verb_that_is_not_there_is_unknown(verb, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, str(tmp_path / "config.yaml")])
    assert caught.value.code == 2
    assert verb in capsys.readouterr().err
    assert Path(tmp_path).is_dir()
