"""Every output format: written in whole units, read back by other libraries."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from mpichunk.errors import BlockError, DiskFullError, VolumeError
from mpichunk.geometry.box import Box, Grid
from mpichunk.volume import (
    OutputSpec,
    Writer,
    check_output,
    create_output,
    open_input,
    open_output,
)
from tests.volumes import DOMAIN, FORMATS, spec_of

RNG = np.random.default_rng(3)
DTYPES = ("uint8", "int8", "uint16", "int16", "float16", "float32")
ROUND_TRIPS = [
    (volume, dtype)
    for volume in (*FORMATS, "sharded")
    for dtype in DTYPES
    if (volume, dtype) != ("neuroglancer-precomputed", "float16")  # precomputed has none
]


def random_czyx(spec: OutputSpec) -> np.ndarray:
    values = RNG.random((spec.num_channels, *spec.domain.shape)) * 100
    return values.astype(spec.dtype)


def blocks(spec: OutputSpec, units: tuple[int, int, int] = (1, 2, 2)) -> Grid:
    step = tuple(n * k for n, k in zip(spec.write_unit, units, strict=True))
    return Grid(origin=spec.domain.start, step=step, bounds=spec.domain)


def write_all(writer: Writer, array_czyx: np.ndarray, spec: OutputSpec) -> None:
    futures = []
    for core in blocks(spec):
        inside = core.slices(spec.domain.start)
        futures.append(writer.write(core, np.ascontiguousarray(array_czyx[(slice(None), *inside)])))
    for future in futures:
        assert future.result() is None


def data_files(path: Path) -> list[Path]:
    names = {"zarr.json", ".zarray", ".zattrs", "info"}
    return [p for p in path.rglob("*") if p.is_file() and p.name not in names]


# ---- Written here, read by others -------------------------------------------------------------


@pytest.mark.parametrize(("volume", "dtype"), ROUND_TRIPS)
def test_round_trip(tmp_path, volume, dtype):
    shards = {"shard_shape": (16, 8, 16)} if volume == "sharded" else {}
    name = "zarr3" if shards else volume
    spec = spec_of(f"file://{tmp_path}/v|{name}:", dtype=np.dtype(dtype), **shards)
    assert not check_output(spec) and not (tmp_path / "v").exists()
    assert create_output(spec) and check_output(spec) and not create_output(spec)
    expected = random_czyx(spec)
    writer = open_output(spec, num_threads=1)
    assert not writer.read(spec.domain).any()
    write_all(writer, expected, spec)
    num_units = [-(-n // unit) for n, unit in zip(DOMAIN.shape, spec.write_unit, strict=True)]
    assert len(data_files(tmp_path / "v")) == np.prod(num_units)
    np.testing.assert_array_equal(writer.read(spec.domain), expected)

    with open_input(str(tmp_path / "v")) as reader:
        info = reader.info
        assert (info.domain, info.voxel_size) == (DOMAIN, spec.voxel_size)
        assert (info.dtype, info.num_channels) == (spec.dtype, 3)
        assert info.chunk_shape == spec.chunk_shape
        np.testing.assert_array_equal(reader.read(DOMAIN).result(), expected)
    np.testing.assert_array_equal(read_elsewhere(tmp_path / "v", name), expected)


def read_elsewhere(path: Path, name: str) -> np.ndarray:
    """Read by a library that is not TensorStore; (c, z, y, x)."""
    if name == "neuroglancer-precomputed":
        from cloudvolume import CloudVolume

        cloud = CloudVolume(f"file://{path}", progress=False, fill_missing=True)
        assert list(cloud.voxel_offset) == list(DOMAIN.start[::-1])
        assert list(cloud.resolution) == [4.5, 4.0, 40.0]
        return np.asarray(cloud[:]).transpose(3, 2, 1, 0)
    array = zarr.open_array(path, mode="r")
    assert array.attrs["voxel_offset"] == list(DOMAIN.start)
    assert array.attrs["voxel_size"] == [40, 4, 4.5] and array.attrs["unit"] == "nanometer"
    if name == "zarr3":
        assert array.metadata.dimension_names == ("c", "z", "y", "x")
    assert array.fill_value == 0
    return array[:]


@pytest.mark.parametrize("volume", FORMATS)
def test_one_channel_keeps_its_axis_and_no_voxel_size_is_needed(tmp_path, volume):
    spec = spec_of(f"{tmp_path}/v|{volume}:", num_channels=1, voxel_size=None)
    create_output(spec)
    assert not create_output(spec)
    expected = random_czyx(spec)
    write_all(open_output(spec), expected, spec)
    with open_input(str(tmp_path / "v")) as reader:
        size = (1, 1, 1) if volume == FORMATS[2] else None
        assert reader.info.voxel_size == size
        np.testing.assert_array_equal(reader.read(DOMAIN).result(), expected)
    if volume != FORMATS[2]:
        assert zarr.open_array(tmp_path / "v", mode="r").shape == (1, *DOMAIN.shape)


@pytest.mark.parametrize("volume", [*FORMATS, "sharded"])
def test_zeros_over_old_data_are_zeros(tmp_path, volume):
    shards = {"shard_shape": (16, 16, 16)} if volume == "sharded" else {}
    spec = spec_of(f"{tmp_path}/v|{'zarr3' if shards else volume}:", **shards)
    create_output(spec)
    writer = open_output(spec)
    write_all(writer, random_czyx(spec), spec)
    write_all(open_output(spec), np.zeros((3, *DOMAIN.shape), np.uint8), spec)
    assert not writer.read(DOMAIN).any()
    assert not open_input(str(tmp_path / "v")).read(DOMAIN).result().any()
    assert not data_files(tmp_path / "v")


@pytest.mark.parametrize("volume", [*FORMATS, "sharded"])
def test_part_of_a_write_unit_keeps_the_rest(tmp_path, volume):
    """Blocks are clipped to the ROI, so that its faces may cut write units."""
    shards = {"shard_shape": (16, 16, 16)} if volume == "sharded" else {}
    spec = spec_of(f"{tmp_path}/v|{'zarr3' if shards else volume}:", **shards)
    create_output(spec)
    expected = random_czyx(spec)
    write_all(open_output(spec), expected, spec)
    part = Box(start=(-1, 7, -2), stop=(12, 9, 19))
    expected[(slice(None), *part.slices(DOMAIN.start))] = 7
    open_output(spec).write(part, np.full((3, *part.shape), 7, np.uint8)).result()
    np.testing.assert_array_equal(open_output(spec).read(DOMAIN), expected)


# ---- Opening and writing ----------------------------------------------------------------------


def test_opening_never_creates(tmp_path):
    spec = spec_of(f"{tmp_path}/v|zarr3:")
    with pytest.raises(VolumeError, match="is not visible on"):
        open_output(spec)
    assert not (tmp_path / "v").exists()


def test_arrays_that_do_not_fit_are_bugs(tmp_path):
    spec = spec_of(f"{tmp_path}/v|zarr3:")
    create_output(spec)
    writer = open_output(spec)
    core = Box.from_shape(DOMAIN.start, (8, 8, 8))
    for array in (np.zeros((3, 8, 8, 7), np.uint8), np.zeros((3, 8, 8, 8), np.int8)):
        with pytest.raises(ValueError, match="expected uint8"):
            writer.write(core, array)
    with pytest.raises(ValueError, match="reaches past"):
        writer.write(core.translate((-1, 0, 0)), np.zeros((3, 8, 8, 8), np.uint8))


FULL_DISK = """
import resource, sys
import numpy as np
from mpichunk.errors import BlockError
from mpichunk.volume import open_output
from tests.volumes import DOMAIN, spec_of
writer = open_output(spec_of(sys.argv[1], dtype=np.dtype("float32")), num_threads=1)
# What a full disk or a quota does to a write, without filling one.
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
array_czyx = np.random.default_rng(0).random((3, *DOMAIN.shape), np.float32)
try:
    writer.write(DOMAIN, array_czyx).result()
except BlockError as error:
    print(error)
"""


class FullStore:
    """A TensorStore on a disk without room, its view of a box, and the future of a write."""

    def __init__(self, number):
        self._text = f"RESOURCE_EXHAUSTED: Error writing local file: {os.strerror(number)} [os]"
        self.commit = self

    def __getitem__(self, box):
        return self

    def write(self, array):
        return self

    def force(self):
        pass

    def result(self, timeout):
        raise ValueError(self._text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_one_calm_sentence(tmp_path, number):
    spec = spec_of(tmp_path / "v.zarr")
    create_output(spec)
    writer = open_output(spec)
    writer._store = FullStore(number)
    full = f"the disk of {tmp_path}/v.zarr is full ({os.strerror(number)}): "
    with pytest.raises(DiskFullError) as caught:
        writer.write(DOMAIN, np.zeros((3, *DOMAIN.shape), np.uint8)).result()
    assert str(caught.value) == f"{full}make room, then run it again"


@pytest.mark.parametrize("volume", FORMATS)
def test_a_failing_write_is_not_done(tmp_path, python, volume):
    place = f"{tmp_path}/v|{volume}:"
    create_output(spec_of(place, dtype=np.dtype("float32")))
    run = python("-c", FULL_DISK, place, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert f"could not write {DOMAIN} of file://{tmp_path}/v" in run.stdout
    assert "File too large" in run.stdout
    assert not data_files(tmp_path / "v")


def test_a_damaged_chunk_of_the_output_is_found(tmp_path):
    spec = spec_of(tmp_path / "v.zarr")
    create_output(spec)
    writer = open_output(spec)
    write_all(writer, random_czyx(spec), spec)
    chunk = tmp_path / "v.zarr" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(BlockError, match="could not read"):
        writer.read(DOMAIN)


@pytest.mark.parametrize("driver", ["zarr3", "zarr", "neuroglancer_precomputed"])
def test_the_context_of_a_spec_is_there_for_metadata_too(tmp_path, driver):
    """As credentials are: `name#own` is only known in the context that brings it."""
    store = {
        "driver": "file",
        "path": f"{tmp_path}/v/",
        "file_io_concurrency": "file_io_concurrency#own",
    }
    volume = {
        "driver": driver,
        "kvstore": store,
        "context": {"file_io_concurrency#own": {"limit": 2}},
    }
    spec = replace(spec_of("v"), volume=volume)
    assert create_output(spec)
    assert not create_output(spec)
    array_czyx = random_czyx(spec)
    write_all(open_output(spec), array_czyx, spec)
    with open_input(volume) as reader:
        np.testing.assert_array_equal(reader.read(DOMAIN).result(), array_czyx)
