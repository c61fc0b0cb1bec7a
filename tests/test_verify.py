"""The `verify` verb: what was lost or damaged after it was written is found, and only that."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpichunk import cli
from mpichunk.errors import VolumeError
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.rundir.checksum import checksum_of, digest_of
from mpichunk.rundir.digests import read_digests
from mpichunk.verbs import verify as verb
from mpichunk.verbs.run import run_on
from mpichunk.volume import open_output
from tests.endtoend import TRAPPED, assert_same_files, block_lines, trap, write_config
from tests.test_memory_check import ThreadCommunicator, on_ranks

OUTPUTS = {
    "zarr3": {"volume": "out|zarr3:", "chunk_shape": [8, 16, 16]},
    "shards": {"volume": "out|zarr3:", "chunk_shape": [4, 8, 8], "shard_shape": [8, 16, 16]},
    "precomputed": {"volume": "precomputed://file://out", "chunk_shape": [8, 16, 16]},
    "zarr2": {"volume": "out|zarr2:", "chunk_shape": [8, 16, 16]},
}
NUM_BLOCKS = 12


def finished(folder: Path, output: str = "zarr3", **sections: Any) -> Path:
    """Return the config of a run that is complete."""
    config = write_config(folder, **(small(output) | sections))
    assert run_on(SerialCommunicator(), config) == 0
    return config


def small(output: str) -> dict[str, Any]:
    return {
        "input": {"volume": "synthetic://membranes?shape=24,32,32&seed=4"},
        "model": {"backend": "identity"},
        "patch": {"shape": [8, 16, 16], "overlap": [0, 0, 0]},
        "block": {"shape": [8, 16, 16]},
        "output": {"dtype": "uint8", **OUTPUTS[output]},
    }


def chunk_files(folder: Path) -> list[Path]:
    """Return the files that hold voxels, in a fixed order."""
    names = ("zarr.json", "info", ".zarray", ".zattrs")
    return sorted(p for p in (folder / "out").rglob("*") if p.is_file() and p.name not in names)


def verify(config: Path, capsys: Any, *options: str) -> dict[str, Any]:
    """Return what `verify --json` prints; its exit code is the process's."""
    capsys.readouterr()
    code = cli.main(["verify", str(config), "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return found


def kinds(found: dict[str, Any]) -> dict[int, str]:
    return {item["block"]: item["kind"] for item in found["blocks"]}


@pytest.mark.parametrize("output", OUTPUTS)
def test_flipped_and_deleted_files_are_found_and_repaired(tmp_path, capsys, output):
    config = finished(tmp_path, output)
    finished(tmp_path / "sound", output)
    assert kinds(verify(config, capsys)) == {}
    files = chunk_files(tmp_path)
    assert len(files) == NUM_BLOCKS
    flip(files[3], len(files[3].read_bytes()) // 2)
    files[7].unlink()
    files[9].write_bytes(files[9].read_bytes()[:-3])

    found = verify(config, capsys)
    assert found["exit_code"] == 3
    assert found["num_missing"] == 1
    assert len(kinds(found)) == 3
    bad = set(kinds(found))

    found = verify(config, capsys, "--repair")
    assert found["num_marked_undone"] == 3
    assert cli.main(["status", str(config), "--check"]) == 75
    found = verify(config, capsys)
    assert found["exit_code"] == 75
    assert set(kinds(found).values()) <= {"extra"}

    num_done = len(block_lines(tmp_path / "runs/config"))
    assert run_on(SerialCommunicator(), config) == 0
    lines = block_lines(tmp_path / "runs/config")[num_done:]
    assert {line["block"] for line in lines} == bad
    assert kinds(verify(config, capsys)) == {}
    assert_same_files(tmp_path / "out", tmp_path / "sound/out")


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_byte_that_changes_a_voxel_is_found(tmp_path, capsys):
    config = finished(tmp_path, "precomputed")
    path = chunk_files(tmp_path)[5]
    sound = path.read_bytes()
    for position in np.random.default_rng(1).integers(len(sound), size=20).tolist():
        flip(path, position, bit=position % 8)
        assert list(kinds(verify(config, capsys)).values()) == ["different"]
        path.write_bytes(sound)
    assert verify(config, capsys)["exit_code"] == 0


def test_an_unfinished_run_is_not_damaged(tmp_path, capsys):
    config = finished(tmp_path)
    path = tmp_path / "runs/config" / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    done = [line for line in lines if b'"state":"done"' in line]
    # Blocks that were written, but whose lines a crash has lost.
    path.write_bytes(b"".join(line for line in lines if line not in done[-3:]))
    found = verify(config, capsys)
    assert found["exit_code"] == 75
    assert list(kinds(found).values()) == ["extra"] * 3
    found = verify(config, capsys, "--repair")
    assert found["num_marked_undone"] == 0


def test_an_output_that_is_gone(tmp_path, capsys):
    config = finished(tmp_path)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert run_on(SerialCommunicator(), config) == 2
    assert "12 finished blocks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found = verify(config, capsys, "--repair")
    assert found["num_missing"] == NUM_BLOCKS
    assert not found["output_exists"]
    assert run_on(SerialCommunicator(), config) == 0
    assert_same_files(tmp_path / "out", tmp_path / "elsewhere")


def test_mistakes(tmp_path, capsys):
    config = write_config(tmp_path, **small("zarr3"))
    assert cli.main(["verify", str(config)]) == 2
    assert "has not been run yet" in capsys.readouterr().err
    finished(tmp_path)
    assert cli.main(["verify", str(config), "--set", "patch.window=hann"]) == 2
    told = capsys.readouterr().err
    assert 'patch.window: "bump" then, "hann" now' in told


def test_the_text_says_what_to_do(tmp_path, capsys):
    config = finished(tmp_path)
    capsys.readouterr()
    assert cli.main(["verify", str(config)]) == 0
    assert "complete and as it was written" in capsys.readouterr().out
    chunk_files(tmp_path)[0].unlink()
    assert cli.main(["verify", str(config)]) == 3
    told = capsys.readouterr().out
    assert "block 0, [0, 0, 0) to [8, 16, 16): nothing of it is stored" in told
    assert "verify --repair" in told


def test_on_ranks_and_without_torch(tmp_path, mpirun):
    config = finished(tmp_path)
    for path in chunk_files(tmp_path)[2:6]:
        path.unlink()
    environment = trap(tmp_path / "trap", "torch")
    done = mpirun(3, "-m", "mpichunk", "verify", config, "--json", env=environment)
    assert done.returncode == 3 != TRAPPED
    assert sorted(kinds(json.loads(done.stdout))) == [2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", ">f4", "float32"])
def test_checksum_is_of_little_endian_bytes_in_c_order(dtype):
    core = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    turned = np.asfortranarray(core)
    little = core.astype(core.dtype.newbyteorder("<"))
    assert digest_of(core) == digest_of(turned) == digest_of(little)
    assert checksum_of(core) == "xxh3:" + digest_of(core).hex()


def test_the_last_done_line_counts(tmp_path):
    path = tmp_path / journal.NAME
    line = '{"stage":"blocks","block":%d,"state":"%s","core":[],"checksum":"xxh3:%032x"}\n'
    lines = [(2, "done", 5), (0, "done", 6), (2, "retry", 8), (2, "done", 7)]
    path.write_text("".join(line % item for item in lines) + (line % (0, "done", 9))[:-1])
    digests = read_digests(path, range(3))
    assert [int.from_bytes(digest.tobytes(), "big") for digest in digests] == [6, 0, 7]
    assert (read_digests(path, range(1, 3, 1)) == digests[1:]).all()
    assert (read_digests(path, range(0, 3, 2)) == digests[::2]).all()


def test_an_output_that_one_rank_does_not_see_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, blind = finished(tmp_path), threading.local()

    def open_for_some(*arguments: Any, **options: Any) -> Any:
        if getattr(blind, "is_here", False):
            raise VolumeError("there is no such volume", key="output.volume")
        return open_output(*arguments, **options)

    monkeypatch.setattr(verb, "open_output", open_for_some)

    def call(comm: ThreadCommunicator) -> None:
        blind.is_here = comm.rank == 1
        verb._verify(comm, config, [], repair=False, as_json=True)

    for refusal in on_ranks(call):
        assert "rank 1 on" in refusal and "there is no such volume" in refusal
