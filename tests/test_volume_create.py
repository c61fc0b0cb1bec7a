"""An output is created once, where nothing lies yet or what lies there is the same."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import tensorstore as ts

from mpichunk.errors import VolumeError
from mpichunk.volume import OutputSpec, check_output, create_output, open_input, open_output
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
        assert "is what is read" in refused("volume", replace(spec, volume=volume), sources=[info])
    inside = replace(spec, volume=f"{tmp_path / 'v'}/more|zarr3:")
    assert "inside the volume that is read" in refused("volume", inside, sources=[info])
    assert create_output(spec_of(f"{tmp_path}/w|zarr3:"), sources=[info])


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(VolumeError) as caught:
        create_output(spec_of("/proc/mpichunk|zarr3:"))
    assert caught.value.key == "output.volume" and "/proc/mpichunk" in caught.value.message
    assert "tensorstore_spec" not in caught.value.message
    if os.geteuid() != 0:
        (tmp_path / "no").mkdir(mode=0o555)
        assert "no permission" in refused("volume", spec_of(f"{tmp_path}/no/v|zarr3:"))
