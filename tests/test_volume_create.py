"""An output is created once, where nothing lies yet or what lies there is the same."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tensorstore as ts

from mpichunk.errors import VolumeError
from mpichunk.volume import OutputSpec, check_output, create_output, open_input, open_output, tensor
from mpichunk.volume.writer import EXPECTED
from tests.faults.harness import can_mount
from tests.launch import REPOSITORY, finish
from tests.volumes import DOMAIN, FORMATS, spec_of


def refused(key: str, spec: OutputSpec, /, **how: object) -> str:
    """Return the message, the same from all three that look."""
    with pytest.raises(VolumeError) as checked:
        check_output(spec, **how)
    with pytest.raises(VolumeError) as caught:
        create_output(spec, **how)
    assert caught.value.key == checked.value.key == f"output.{key}"
    assert caught.value.message == checked.value.message
    return caught.value.message


def test_names_that_tell_the_format(tmp_path):
    create_output(spec_of(tmp_path / "a.zarr"))
    assert (tmp_path / "a.zarr" / "zarr.json").exists()
    create_output(spec_of(f"precomputed://file://{tmp_path}/p"))
    assert not create_output(spec_of(tmp_path / "p"))
    assert "|zarr3:" in refused("volume", spec_of(tmp_path / "what"))
    spec = replace(spec_of(""), volume={"driver": "zarr2", "kvstore": f"file://{tmp_path}/d"})
    assert create_output(spec) and (tmp_path / "d" / ".zarray").exists()
    spec = replace(spec, volume={**spec.volume, "metadata": {}})
    assert "metadata" in refused("volume", spec)


def test_what_formats_cannot_hold(tmp_path):
    half = np.dtype("float16")
    assert "float32" in refused("dtype", spec_of(f"precomputed://{tmp_path}/v", dtype=half))
    sharded = spec_of(f"{tmp_path}/v|zarr2:", shard_shape=(16, 16, 16))
    assert "zarr3" in refused("shard_shape", sharded)
    sharded = spec_of(f"{tmp_path}/v|zarr3:", shard_shape=(16, 12, 16))
    assert "multiple" in refused("shard_shape", sharded)
    huge = spec_of(f"{tmp_path}/v|zarr3:", chunk_shape=(1024, 1024, 1024))
    assert "bytes" in refused("chunk_shape", huge)
    for volume in (f"{tmp_path}/v|n5:", f"{tmp_path}/v.h5", "synthetic://membranes?shape=9,9,9"):
        assert "precomputed, zarr2, zarr3" in refused("volume", spec_of(volume))


# ---- What lies there already ------------------------------------------------------------------


@pytest.mark.parametrize("volume", FORMATS)
def test_every_differing_field_is_named(tmp_path, volume):
    spec = spec_of(f"{tmp_path}/v|{volume}:")
    create_output(spec)
    for change, words in (
        ({"dtype": np.dtype("float32")}, "dtype: found uint8, expected float32"),
        ({"num_channels": 2}, "channels: found 3, expected 2"),
        ({"chunk_shape": (4, 8, 8)}, "chunk_shape: found (8, 8, 8), expected (4, 8, 8)"),
        ({"voxel_size": (1.0, 1.0, 1.0)}, "voxel_size: found (40.0, 4.0, 4.5), expected"),
        ({"domain": DOMAIN.translate((1, 0, 0))}, "voxel_offset: found (-3, 5, -7), expected (-2"),
        ({"domain": DOMAIN.grow((0, 0, 1))}, "shape: found (19, 22, 27), expected (19, 22, 29)"),
    ):
        other = replace(spec, **change)
        assert words in refused("volume", other)
        with pytest.raises(VolumeError, match="differs"):
            open_output(other)
    other = "zarr2" if volume == "zarr3" else "zarr3"
    message = refused("volume", replace(spec, volume=f"{tmp_path}/v|{other}:"))
    assert "format: found" in message


@pytest.mark.parametrize("volume", FORMATS)
def test_odd_voxel_sizes_agree_with_themselves(tmp_path, volume):
    spec = spec_of(f"{tmp_path}/v|{volume}:", voxel_size=(283.71837, 1e3 / 7, 0.1 + 0.2))
    create_output(spec)
    assert not create_output(spec)
    assert open_input(str(tmp_path / "v")).info.voxel_size == spec.voxel_size


def test_shards_and_fill_values_count(tmp_path):
    spec = spec_of(tmp_path / "v.zarr", shard_shape=(16, 16, 16))
    create_output(spec)
    assert "shard_shape: found (16, 16, 16), expected None" in refused(
        "volume", replace(spec, shard_shape=None)
    )
    file = tmp_path / "v.zarr" / "zarr.json"
    good = json.loads(file.read_text())
    for change, words in (
        ({"fill_value": 1}, "fill_value: found 1, expected 0"),
        ({"dimension_names": ["x", "y", "z", "c"]}, "axes: found xyzc"),
        ({"chunk_grid": {}}, "damaged"),
    ):
        file.write_text(json.dumps(good | change))
        assert words in refused("volume", spec)
    file.write_text("}")
    assert "not JSON" in refused("volume", spec)


def test_a_lossy_precomputed_differs(tmp_path):
    spec = spec_of(f"precomputed://{tmp_path}/v")
    create_output(spec)
    file = tmp_path / "v" / "info"
    info = json.loads(file.read_text())
    info["scales"][0]["encoding"] = "jpeg"
    file.write_text(json.dumps(info))
    assert "encoding: found jpeg, expected raw" in refused("volume", spec)
    info["scales"][0]["encoding"] = "raw"
    file.write_text(json.dumps(info))
    assert check_output(spec)
    folder = tmp_path / "v" / info["scales"][0]["key"]
    folder.mkdir()
    (folder / "-7-1_5-13_-3-5.gz").write_bytes(b"")
    assert "encoding: found compressed files" in refused("volume", spec)


def test_other_formats_are_not_overwritten(tmp_path):
    ts.open(
        {"driver": "n5", "kvstore": f"file://{tmp_path}/v/"},
        create=True,
        dtype="uint8",
        shape=[9] * 3,
    ).result()
    assert "format: found n5, expected zarr3" in refused("volume", spec_of(f"{tmp_path}/v|zarr3:"))


def test_places_that_are_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    assert "thesis.tex" in refused("volume", spec_of(f"{tmp_path}/folder|zarr3:"))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("volume", spec_of(f"{tmp_path}/file|zarr3:"))
    assert "is a file" in refused("volume", spec_of(f"{tmp_path}/file/below|zarr2:"))


def test_an_interrupted_creation_is_finished(tmp_path):
    spec = spec_of(f"{tmp_path}/v|zarr2:")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".zattrs").write_text("{}")
    (tmp_path / "v" / ".zarray_12.__lock").write_text("")
    assert create_output(spec) and not create_output(spec)


def test_the_input_is_not_overwritten(tmp_path):
    spec = spec_of(f"{tmp_path}/v|zarr3:")
    create_output(spec)
    info = open_input(str(tmp_path / "v")).info
    (tmp_path / "link").symlink_to(tmp_path / "v")
    for volume in (spec.volume, f"{tmp_path}/link|zarr3:", f"precomputed://{tmp_path}/v"):
        assert "is also read" in refused("volume", replace(spec, volume=volume), sources=[info])
    inside = replace(spec, volume=f"{tmp_path / 'v'}/more|zarr3:")
    assert "inside the volume that is read" in refused("volume", inside, sources=[info])
    assert create_output(spec_of(f"{tmp_path}/w|zarr3:"), sources=[info])


@pytest.mark.parametrize("notation", FORMATS)
@pytest.mark.parametrize("place", ["/proc/x/y/v", "/proc/v"])
def test_a_place_that_cannot_be_made_is_one_message_in_plain_words(notation, place):
    with pytest.raises(VolumeError) as caught:
        create_output(spec_of(f"{place}|{notation}:"))
    assert caught.value.key == "output.volume"
    assert caught.value.message == (
        f"{place} cannot be created: no folder can be made in /proc (No such file or directory); "
        "expected a place that this job can write to: choose another one, or fix this"
    )


REFUSED_ELSEWHERE = """
import json, os, sys, tempfile
from tests.test_volume_create import create_output, refused, spec_of

*volumes, is_nobody = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    create_output(spec_of(f"{folder}/v|zarr3:"))  # so that all is imported while it can be
if is_nobody == "True":
    os.setresuid(65534, 65534, 0)
print(json.dumps([refused("volume", spec_of(volume)) for volume in volumes]))
"""
"""What `refused` returns for each volume, to a user whom permissions hold for."""


def test_a_place_without_permission_is_named_before_anything_runs():
    # pytest's own folders are closed to other users altogether.
    with TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent, "no")
        folder.mkdir(mode=0o555)
        volumes = [f"{folder}/{name}/v|{name}:" for name in FORMATS]
        script = ["-c", REFUSED_ELSEWHERE, *volumes, os.geteuid() == 0]
        done = finish([sys.executable, *script], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        f"{folder}/{name}/v cannot be written: no permission to write at {folder}; {EXPECTED}"
        for name in FORMATS
    ]


def test_a_file_system_that_is_read_only_is_named_before_anything_runs(tmp_path):
    if not can_mount():
        pytest.skip("no small disk: mounting one is not allowed here")
    volumes = [f"{tmp_path}/{name}/v|{name}:" for name in FORMATS]
    mount = f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$0" "$@"'
    script = ["-c", REFUSED_ELSEWHERE, *volumes, False]
    done = finish(["unshare", "-m", "sh", "-c", mount, sys.executable, *script], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        f"{tmp_path}/{name}/v cannot be written: the file system is read-only at {tmp_path}; "
        f"{EXPECTED}"
        for name in FORMATS
    ]


def test_another_place_is_advised_only_where_the_file_system_refuses(tmp_path, monkeypatch):
    spec = spec_of(f"{tmp_path}/v|zarr3:")
    create_output(spec)
    file = tmp_path / "v" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new": {"must_understand": True}}))
    with pytest.raises(VolumeError, match=r"v\|zarr3 cannot be opened: .*new") as caught:
        open_output(spec)
    assert EXPECTED not in caught.value.message
    monkeypatch.setattr(tensor, "METADATA_SECONDS", 0)
    with pytest.raises(VolumeError, match="cannot be created: no answer in") as caught:
        create_output(spec_of(f"{tmp_path}/w.zarr"))
    assert EXPECTED not in caught.value.message


@contextmanager
def no_file_may_grow() -> Iterator[None]:
    """Let the file system refuse what is written, where nothing has told before that it would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("notation", FORMATS)
def test_what_the_file_system_refuses_is_told_in_its_words(tmp_path, notation):
    spec = spec_of(f"{tmp_path}/v|{notation}:")
    with no_file_may_grow(), pytest.raises(VolumeError) as caught:
        create_output(spec)
    assert caught.value.key == "output.volume"
    message = caught.value.message
    assert f"{tmp_path}/v|{notation} cannot be created: " in message
    assert "File too large; expected a place that this job can write to" in message
    assert not any(word in message for word in ("os_error", "driver", "Failed"))
    assert create_output(spec), "what was left in between is in nobody's way"
