"""Axes, offsets, voxel sizes and types of inputs, as formats and labs write them."""

import json
import pickle
import shutil

import h5py
import numpy as np
import pytest
import tensorstore as ts

from mpichunk.geometry.box import Box
from mpichunk.volume import Reader, open_input
from tests.volumes import IMAGE, read_all, refused, write_zarr

RNG = np.random.default_rng(7)


def test_named_axes_are_turned(tmp_path):
    array = RNG.integers(0, 99, (4, 5, 6, 2)).astype(np.int16)
    write_zarr(tmp_path / "xyzc", array, dimension_names=["x", "y", "z", "channel"])
    with open_input(str(tmp_path / "xyzc")) as reader:
        assert reader.info.num_channels == 2 and reader.info.domain.shape == (6, 5, 4)
        np.testing.assert_array_equal(read_all(reader), array.T)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=array).attrs["axes"] = "xyzc"
    with open_input(str(tmp_path / "a.h5")) as reader:
        np.testing.assert_array_equal(read_all(reader), array.T)
        part = reader.read(Box(start=(1, 2, 3), stop=(5, 4, 4))).result()
        np.testing.assert_array_equal(part, array.T[:, 1:5, 2:4, 3:4])


@pytest.mark.parametrize("version", [2, 3])
def test_placement_by_attributes_and_by_config(tmp_path, version):
    attributes = {"voxel_offset": [-1, 2, 3], "voxel_size": [0.04, 0.004, 0.005], "unit": "um"}
    write_zarr(tmp_path / "v", IMAGE, version, attributes=attributes)
    with open_input(str(tmp_path / "v")) as reader:
        assert reader.info.domain == Box.from_shape((-1, 2, 3), IMAGE.shape)
        assert reader.info.voxel_size == pytest.approx((40, 4, 5))
        part = reader.read(Box(start=(-1, 2, 5), stop=(0, 4, 6))).result()
        np.testing.assert_array_equal(part[0], IMAGE[:1, :2, 2:3])
    with open_input(str(tmp_path / "v"), voxel_offset=(0, 0, -9), voxel_size=(1, 2, 3)) as reader:
        assert reader.info.domain.start == (0, 0, -9) and reader.info.voxel_size == (1, 2, 3)
        again = Reader.reopen(reader.handle())
        np.testing.assert_array_equal(read_all(again)[0], IMAGE)


def test_placement_of_n5_is_xyz(tmp_path):
    path = tmp_path / "v.n5"
    spec = {"driver": "n5", "kvstore": f"file://{path}/"}
    ts.open(spec, create=True, dtype="uint8", shape=IMAGE.shape[::-1]).result().write(
        IMAGE.T
    ).result()
    file = path / "attributes.json"
    more = {"voxel_offset": [3, 2, -1], "pixelResolution": {"dimensions": [4, 5, 40], "unit": "nm"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    with open_input(str(path)) as reader:
        assert reader.info.domain == Box.from_shape((-1, 2, 3), IMAGE.shape)
        assert reader.info.voxel_size == (40, 5, 4)
        np.testing.assert_array_equal(read_all(reader)[0], IMAGE)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"voxel_size_um": [0.3, 0.1, 0.1]}, (300, 100, 100)),
        ({"element_size_um": [1.0, 0.5, 0.5]}, (1000, 500, 500)),
        ({"resolution": [40, 4, 4]}, (40, 4, 4)),
        ({"resolution": [1, 40, 4, 4], "units": ["", "nm", "nm", "nm"]}, (40, 4, 4)),
        ({"voxel_size": [1, 1, 1], "unit": "pixel"}, None),
        ({"resolution": [0, 0, 0]}, None),
        ({}, None),
    ],
)
def test_voxel_sizes_as_labs_write_them(tmp_path, attributes, expected):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("raw", data=np.zeros((2, 3, 4, 5), np.float32))
        for name, value in attributes.items():
            dataset.attrs[name] = value
    size = open_input(str(tmp_path / "a.h5")).info.voxel_size
    assert size == (None if expected is None else pytest.approx(expected))


def test_damaged_attributes_matter_unless_overridden(tmp_path):
    path = str(write_zarr(tmp_path / "v", IMAGE, attributes={"voxel_size": "small"}))
    assert "voxel_size" in refused("input.voxel_size", path)
    assert open_input(path, voxel_size=(1, 1, 1)).info.voxel_size == (1, 1, 1)
    path = str(write_zarr(tmp_path / "w", IMAGE, attributes={"voxel_offset": [0.5, 0, 0]}))
    assert "whole" in refused("input.voxel_offset", path)
    assert open_input(path, voxel_offset=(1, 1, 1)).info.domain.start == (1, 1, 1)


@pytest.mark.parametrize("dtype", ["bool", ">u2", "<i8", ">f4", "float16", "float64"])
@pytest.mark.parametrize("kind", ["zarr2", "hdf5"])
def test_types_come_out_native(tmp_path, dtype, kind):
    array = RNG.integers(0, 2, (3, 4, 5)).astype(dtype)
    path = tmp_path / ("a.h5" if kind == "hdf5" else "a")
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["data"] = array
    else:
        write_zarr(path, array, 2)
    with open_input(str(path)) as reader:
        found = read_all(reader)
        expected = np.float32 if dtype == "bool" else np.dtype(dtype).newbyteorder("=")
        assert found.dtype == expected == reader.info.dtype and found.dtype.isnative
        np.testing.assert_array_equal(found[0], array)


def test_contiguous_and_four_axis_hdf5(tmp_path):
    array = RNG.random((2, 70, 30, 80)).astype(np.float32)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["volumes/raw"] = array
        file["table"] = np.zeros(3)
    with open_input(str(tmp_path / "a.hdf5"), voxel_offset=(10, -20, 30)) as reader:
        assert reader.info.location == f"file://{tmp_path}/a.hdf5|hdf5:volumes/raw"
        box = Box(start=(12, -10, 40), stop=(79, 10, 109))
        expected = array[(slice(None), *box.slices((10, -20, 30)))]
        with Reader.reopen(pickle.loads(pickle.dumps(reader.handle()))) as again:
            np.testing.assert_array_equal(again.read(box).result(), expected)


def test_missing_chunks_are_the_fill_value(tmp_path):
    path = write_zarr(tmp_path / "v", IMAGE)
    shutil.rmtree(path / "c" / "0")
    with open_input(str(path)) as reader:
        found = read_all(reader)[0]
    assert not found[:4].any()
    np.testing.assert_array_equal(found[4:], IMAGE[4:])
