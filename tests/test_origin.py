"""Who has written an output: the run that is named, of those that lie beside another one."""

import os
from pathlib import Path
from typing import Any

import pytest

from mpichunk.rundir.journal import Journal
from mpichunk.rundir.origin import foreign_output_message
from tests.blocks import core_of, done, failed, leases

STRING = {"output.volume": "file:///data/out.zarr|zarr3:"}
SPEC = {
    "output.volume.driver": "zarr3",
    "output.volume.kvstore.driver": "file",
    "output.volume.kvstore.path": "/data/out.zarr/",
}
VOLUMES = pytest.mark.parametrize("volume", [STRING, SPEC])
NEW = "exists and was written by"


def keep_run(run_dir: Path, fingerprint: dict[str, Any], *states: str, time: float = 0.0) -> None:
    """Leave the journal of a run whose blocks are in these states."""
    with Journal.open(run_dir, num_blocks=9, fingerprint=fingerprint, versions={}) as journal:
        for lease, state in zip(leases(*range(len(states))), states, strict=True):
            record = done(lease) if state == "done" else failed(lease)
            box = core_of(lease.block)
            journal.append(record, state, core=box, rank=0, host="node1")
    os.utime(journal.path, (time, time))


@VOLUMES
def test_the_same_place_is_known_however_it_is_written_down(tmp_path, volume):
    other = {key: f"{value}other" for key, value in volume.items()}
    keep_run(tmp_path / "a", other | {"mip": 0}, "done")
    told = foreign_output_message(tmp_path / "new", volume | {"mip": 0})
    assert f"there is no {tmp_path}/new/journal.jsonl" in told and "out.zarr" in told
    keep_run(tmp_path / "b", volume | {"mip": 0}, "done")
    told = foreign_output_message(tmp_path / "new", volume | {"mip": 0})
    assert f"{NEW} the run in {tmp_path}/b, which has the same settings: " in told
    told = foreign_output_message(tmp_path / "new", volume | {"mip": 1})
    assert f"{NEW} the run in {tmp_path}/b, with other settings:\n  mip: 0 then, 1 now" in told
    # A spec is more than a key that both have.
    more = volume | {"output.volume.context.limit": 3}
    assert "there is no" in foreign_output_message(tmp_path / "new", more | {"mip": 0})


@VOLUMES
def test_of_several_that_have_written_the_one_to_go_on_with_is_named(tmp_path, volume):
    old, new = volume | {"mip": 1}, volume | {"mip": 0}
    keep_run(tmp_path / "a", old, "done", time=2)
    keep_run(tmp_path / "b", old, "failed", "done", time=3)
    told = foreign_output_message(tmp_path / "new", new)
    assert f"{NEW} 2 runs, one of them that in {tmp_path}/b, with other settings:" in told
    keep_run(tmp_path / "c", new, "done", time=1)
    told = foreign_output_message(tmp_path / "new", new)
    assert f"{NEW} 3 runs, one of them that in {tmp_path}/c, which has the same settings" in told


@VOLUMES
def test_who_has_no_block_done_has_written_nothing(tmp_path, volume):
    keep_run(tmp_path / "a", volume, time=5)
    keep_run(tmp_path / "b", volume, "failed", "retry", time=4)
    assert "there is no" in foreign_output_message(tmp_path / "new", volume)
    keep_run(tmp_path / "c", volume | {"mip": 3}, "failed", "done", time=3)
    assert f"by the run in {tmp_path}/c, with other" in foreign_output_message(
        tmp_path / "new", volume
    )


def test_what_else_lies_there_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal.jsonl").write_text("a diary\n")
    keep_run(tmp_path / "short", STRING, "done")
    text = (tmp_path / "short" / "journal.jsonl").read_text()
    (tmp_path / "short" / "journal.jsonl").write_text(
        text.replace('"num_blocks":9', '"num_blocks":0')
    )
    assert "there is no" in foreign_output_message(tmp_path / "new", STRING)
    assert "there is no" in foreign_output_message(tmp_path / "nowhere" / "new", STRING)
