"""Every input format and notation gives the same voxels, placed right; mistakes get one message."""

import gzip
import json
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore as ts
import zarr

from mpichunk.errors import BlockError, VolumeError
from mpichunk.geometry.box import Box, Grid
from mpichunk.volume import Reader, open_input

RNG = np.random.default_rng(7)
IMAGE = RNG.integers(1, 255, (9, 11, 13)).astype(np.uint8)
PARTS = Box(start=(2, 3, 4), stop=(8, 10, 13))


def refused(key: str, volume: object, /, **how: object) -> str:
    with pytest.raises(VolumeError) as caught:
        open_input(volume, **how)
    assert caught.value.key == key
    return caught.value.message


def read_all(reader: Reader) -> np.ndarray:
    return reader.read(reader.info.domain).result()


def write_zarr(path: Path, array: np.ndarray, version: int = 3, **how: object) -> Path:
    how = {"chunks": (4,) * array.ndim, "compressors": None, "zarr_format": version} | how
    zarr.create_array(path, data=array, **how)
    return path


def write_precomputed(path: Path, array_zyx: np.ndarray, num_scales: int = 1) -> Path:
    for mip in range(num_scales):
        part = array_zyx[:, :: 2**mip, :: 2**mip]
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": str(path)},
            "multiscale_metadata": {
                "type": "image",
                "data_type": array_zyx.dtype.name,
                "num_channels": 1,
            },
            "scale_metadata": {
                "size": part.shape[::-1],
                "chunk_size": [4, 5, 6],
                "encoding": "raw",
                "resolution": [4 * 2**mip, 4 * 2**mip, 40],
                "voxel_offset": [-3, 5, 70],
            },
        }
        store = ts.open(spec, create=True).result()
        store.write(part.T[..., None]).result()
    return path


# ---- Formats ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interop(real_data):
    folder = real_data / "interop"
    manifest = json.loads((folder / "manifest.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        return folder, manifest, dict(arrays)


def test_fixtures_of_other_writers(interop):
    folder, manifest, arrays = interop
    for fixture in manifest["fixtures"]:
        if "ome" in fixture["path"]:
            continue
        expected = arrays[fixture["array"]]
        expected = expected if expected.ndim == 4 else expected[None]
        with open_input(str(folder / fixture["path"])) as reader:
            found = read_all(reader)
            handle = pickle.loads(pickle.dumps(reader.handle()))
            inner = reader.info.domain.grow((-5, -7, -9))
            with Reader.reopen(handle, num_threads=1) as again:
                assert again.info == reader.info
                inside = inner.slices(reader.info.domain.start)
                part = again.read(inner).result()
                np.testing.assert_array_equal(part, found[(slice(None), *inside)])
        tolerance = 19 if "jpeg" in fixture["path"] else 0
        difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
        assert difference <= tolerance, fixture["path"]
        assert found.dtype == expected.dtype and found.flags.c_contiguous
        assert reader.info.chunk_shape is not None
        if "pre" in fixture["path"]:
            assert reader.info.voxel_size == (10, 10, 10)
            start = (-3, 5, -7) if "raw_u16" in fixture["path"] else (101, 60, 90)
            assert reader.info.domain.start == start


def test_an_encoding_only_cloudvolume_knows(real_data, capsys):
    folder = real_data / "seg" / "pinky40_precomputed_compresso"
    with open_input(f"precomputed://file://{folder}") as reader:
        assert reader.info.driver == "cloudvolume"
        part = reader.read(Box.from_shape((40, 50, 60), (30, 150, 100))).result()
    assert part.shape == (1, 30, 150, 100) and part.dtype == np.uint32
    assert len(np.unique(part)) > 3
    assert capsys.readouterr().out == ""


def test_real_hdf5(real_data):
    path = real_data / "em" / "fib25_train2_250.h5"
    box = Box.from_shape((101, 60, 90), (37, 75, 109))
    with open_input(str(path), dataset="image") as reader:
        assert reader.info.voxel_size == (10, 10, 10)
        assert reader.info.chunk_shape == (50, 50, 125)
        found = reader.read(box).result()
    with np.load(real_data / "interop" / "expected.npz") as arrays:
        np.testing.assert_array_equal(found[0], arrays["image_u8"])
    assert "image, labels" in refused("input.dataset", str(path))


def test_the_computed_volume():
    url = "synthetic://membranes?shape=40,50,60&seed=7&offset=-5,6,7&voxel_size=30,8,8"
    with open_input(url) as reader:
        assert reader.info.domain == Box.from_shape((-5, 6, 7), (40, 50, 60))
        assert reader.info.voxel_size == (30, 8, 8) and reader.info.location == url
        box = Box(start=(-3, 10, 12), stop=(30, 20, 66))
        found = reader.read(box).result()
        again = Reader.reopen(reader.handle()).read(box).result()
    assert found.dtype == np.uint8 and found.shape == (1, *box.shape)
    np.testing.assert_array_equal(found, again)
    with open_input(url, voxel_offset=(100, 0, 0)) as moved:
        part = moved.read(box.translate((105, -6, -7))).result()
    np.testing.assert_array_equal(part, found)
    refused("mask.volume", "synthetic://membranes?shape=1,2", key="mask")


NOTATIONS = (
    "{path}",
    "file://{path}",
    "file://{path}/|{name}:",
    "{path}|{name}:",
    "{path}|auto:",
)


@pytest.mark.parametrize(
    "notation", [*NOTATIONS, "{wrapper}://file://{path}", "{wrapper}://{path}"]
)
@pytest.mark.parametrize("name", ["zarr2", "zarr3", "neuroglancer-precomputed"])
def test_notations(tmp_path, name, notation):
    path = tmp_path / "a volume"
    if name == "neuroglancer-precomputed":
        write_precomputed(path, IMAGE)
    else:
        write_zarr(path, IMAGE, int(name[-1]))
    wrapper = name.removeprefix("neuroglancer-")
    with open_input(notation.format(path=path, name=name, wrapper=wrapper)) as reader:
        np.testing.assert_array_equal(read_all(reader)[0], IMAGE)
        assert reader.info.location == f"file://{path}|{name}"


def test_escapes_before_a_format_only(tmp_path):
    path = write_zarr(tmp_path / "100%20 a", IMAGE)
    for notation in (str(path), f"file://{path}", f"file://{tmp_path}/100%2520%20a|zarr3:"):
        assert open_input(notation).info.domain.shape == IMAGE.shape


class QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """Serve a folder over HTTP on this machine; return its URL."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_volumes_over_http(tmp_path, server):
    write_zarr(tmp_path / "v3", IMAGE, chunks=IMAGE.shape)
    write_precomputed(tmp_path / "pre", IMAGE[:6, :5, :4])
    for notation in (f"precomputed://{server}/pre", f"{server}/v3", f"{server}/v3|zarr3:"):
        with open_input(notation) as reader:
            assert reader.info.location.startswith(server)
            expected = IMAGE[:6, :5, :4] if "pre" in notation else IMAGE
            np.testing.assert_array_equal(read_all(reader)[0], expected)
            np.testing.assert_array_equal(read_all(Reader.reopen(reader.handle()))[0], expected)
    assert "expected one of info" in refused("input.volume", f"{server}/nix")


def test_specs(tmp_path):
    write_zarr(tmp_path / "v2", IMAGE, 2)
    write_precomputed(tmp_path / "pre", IMAGE, 2)
    store = {"driver": "file", "path": f"{tmp_path}/v2/"}
    for spec in (
        {"driver": "zarr", "kvstore": store},
        {"driver": "zarr2", "kvstore": f"file://{tmp_path}/v2"},
        {"driver": "auto", "kvstore": f"file://{tmp_path}", "path": "v2"},
        {"driver": "zarr", "kvstore": store | {"path": str(tmp_path)}, "path": "v2"},
    ):
        np.testing.assert_array_equal(read_all(open_input(spec))[0], IMAGE)
    spec = {"driver": "neuroglancer_precomputed", "kvstore": f"file://{tmp_path}/pre"}
    assert open_input(spec | {"scale_index": 1}).info.mip == 1
    assert "`kvstore`" in refused("input.volume", {"driver": "zarr"})
    assert "cannot be opened" in refused("input.volume", {**spec, "nonsense": 1})


def test_a_spec_that_shows_a_part(tmp_path):
    write_zarr(tmp_path / "v", IMAGE)
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{tmp_path}/v",
        "transform": {"input_inclusive_min": [2, 3, 4], "input_exclusive_max": [8, 10, 13]},
    }
    with open_input(spec) as reader:
        assert reader.info.domain == PARTS
        part = Reader.reopen(reader.handle()).read(PARTS).result()[0]
        np.testing.assert_array_equal(part, IMAGE[PARTS.slices()])


# ---- Axes, placement, types -------------------------------------------------------------------


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


# ---- Mistakes ---------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path):
    write_zarr(tmp_path / "other", IMAGE)
    message = refused("input.volume", str(tmp_path / "nix"))
    assert "does not exist" in message and "other" in message
    message = refused("mask.volume", f"file://{tmp_path}/a/b/c|zarr3:", key="mask")
    assert f"the nearest that exists is {tmp_path}" in message
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in refused("input.volume", str(tmp_path / "empty"))
    (tmp_path / "text.h5").write_text("no volume")
    assert "not HDF5" in refused("input.volume", str(tmp_path / "text.h5"))
    (tmp_path / "short.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "cannot be opened as HDF5" in refused("input.volume", str(tmp_path / "short.h5"))


@pytest.mark.parametrize(
    "volume", ["a|tiff:", "a|zarr4:", "graphene://x", "boss://a/b", {"driver": "x", "kvstore": "y"}]
)
def test_unknown_formats(volume):
    message = refused("input.volume", volume)
    assert "precomputed, zarr2, zarr3, n5" in message


def test_other_notations_that_mean_nothing():
    assert "known are file, gs" in refused("input.volume", "precomputed://ftp://x")
    assert "once" in refused("input.volume", "precomputed://file:///a|zarr3:")
    assert "empty" in refused("input.volume", "  ")


def test_another_format_than_said(tmp_path):
    write_zarr(tmp_path / "v", IMAGE, 2)
    message = refused("input.volume", f"{tmp_path}/v|zarr3:")
    assert "is not zarr3" in message and "is zarr2" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "info").write_text("{")
    assert "not JSON" in refused("input.volume", f"{tmp_path}/broken")
    (tmp_path / "broken" / "info").write_text('{"scales": [{"key": "a"}]}')
    assert "damaged" in refused("input.volume", f"{tmp_path}/broken")


def test_groups_name_their_arrays(tmp_path):
    for version in (2, 3):
        group = zarr.create_group(tmp_path / f"g{version}", zarr_format=version)
        group.create_array("s0", data=IMAGE)
        group.create_array("s1", data=IMAGE)
        assert "s0, s1" in refused("input.volume", str(tmp_path / f"g{version}"))


@pytest.mark.parametrize("shape", [(5, 6), (1, 2, 3, 4, 5)])
def test_wrong_numbers_of_axes(tmp_path, shape):
    write_zarr(tmp_path / "v", np.zeros(shape, np.uint8))
    assert f"{len(shape)} axes" in refused("input.volume", str(tmp_path / "v"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["d"] = np.zeros(shape, np.uint8)
    assert "axes" in refused("input.volume", str(tmp_path / "a.h5"), dataset="d")


def test_wrong_types(tmp_path):
    write_zarr(tmp_path / "v", np.zeros((2, 3, 4), np.complex64))
    assert "complex64" in refused("input.volume", str(tmp_path / "v"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["d"] = np.full((2, 3, 4), b"text")
    assert "holds |S4" in refused("input.volume", str(tmp_path / "a.h5"))


def test_scale_levels(tmp_path):
    path = write_precomputed(tmp_path / "v", IMAGE, 2)
    with open_input(str(path), mip=1) as reader:
        assert reader.info.mip == 1 and reader.info.voxel_size == (40, 8, 8)
        assert reader.info.chunk_shape == (6, 5, 4)
        np.testing.assert_array_equal(read_all(reader)[0], IMAGE[:, ::2, ::2])
        np.testing.assert_array_equal(
            read_all(Reader.reopen(reader.handle()))[0], IMAGE[:, ::2, ::2]
        )
    assert "0 (40x4x4 nm), 1 (40x8x8 nm)" in refused("input.mip", str(path), mip=2)
    assert "one scale" in refused(
        "mask.mip", str(write_zarr(tmp_path / "z", IMAGE)), mip=1, key="mask"
    )


def test_datasets(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/raw"] = IMAGE
        file["labels"] = IMAGE
    path = str(tmp_path / "a.h5")
    assert "a/raw, labels" in refused("input.dataset", path)
    assert "'nix' is not there; it holds a/raw, labels" in refused(
        "input.dataset", path, dataset="nix"
    )
    assert "is a group" in refused("input.dataset", path, dataset="a")
    assert open_input(path, dataset="a/raw").info.dtype == np.uint8
    write_zarr(tmp_path / "v", IMAGE)
    assert "not HDF5" in refused("input.dataset", str(tmp_path / "v"), dataset="raw")


def test_a_host_that_does_not_see_the_volume(tmp_path):
    path = write_zarr(tmp_path / "v", IMAGE)
    handle = open_input(str(path), key="mask").handle()
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(VolumeError, match="is not visible on") as caught:
        Reader.reopen(handle)
    assert caught.value.key == "mask.volume"


def test_reopening_reads_no_metadata(tmp_path):
    path = write_precomputed(tmp_path / "v", IMAGE)
    handle = open_input(str(path)).handle()
    (path / "info").write_text("not read")
    np.testing.assert_array_equal(read_all(Reader.reopen(handle))[0], IMAGE)


def test_a_missing_codec(tmp_path, monkeypatch):
    path = write_precomputed(tmp_path / "v", IMAGE)
    info = json.loads((path / "info").read_text())
    for encoding, word in (("fpzip", "pip install fpzip"), ("zip", "unknown encoding")):
        info["scales"][0]["encoding"] = encoding
        (path / "info").write_text(json.dumps(info))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert word in refused("input.volume", str(path))


def test_a_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("mpichunk.volume.tensor.METADATA_SECONDS", 0.2)
    # Nobody listens on the discard port; TensorStore would go on trying for minutes.
    for volume in ("http://127.0.0.1:9/v|zarr3:", "precomputed://http://127.0.0.1:9/v"):
        message = refused("input.volume", volume)
        assert "127.0.0.1:9/v" in message and "no answer in 0.2 seconds" in message


# ---- Damaged data -----------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_damaged_chunks_fail_the_block(tmp_path):
    v2 = write_zarr(tmp_path / "v2", IMAGE, 2, compressors=None)
    v3 = write_zarr(tmp_path / "v3", IMAGE, shards=(8, 8, 8))
    pre = write_precomputed(tmp_path / "pre", IMAGE)
    damage(next(v2.glob("0.0.0")))
    damage(v3 / "c" / "0" / "0" / "0")
    damage(min(p for p in pre.rglob("*") if p.is_file() and p.name != "info"))
    for path in (v2, v3, pre):
        with open_input(str(path)) as reader:
            box = Box.from_shape(reader.info.domain.start, (2, 2, 2))
            with pytest.raises(BlockError) as caught:
                read_all(reader)
            message = str(caught.value)
            assert str(path) in message and str(reader.info.domain) in message
            assert "tensorstore_spec" not in message
            if path is not pre:
                with pytest.raises(BlockError):
                    reader.read(box).result()


def test_a_damaged_suffixed_chunk_fails_the_block(tmp_path, capsys):
    path = write_precomputed(tmp_path / "v", IMAGE)
    chunks = [p for p in path.rglob("*") if p.is_file() and p.name != "info"]
    for chunk in chunks:
        chunk.with_name(chunk.name + ".gz").write_bytes(gzip.compress(chunk.read_bytes()))
        chunk.unlink()
    with open_input(str(path)) as reader:
        assert reader.info.driver == "cloudvolume"
        np.testing.assert_array_equal(read_all(reader)[0], IMAGE)
    damage(chunks[0].with_name(chunks[0].name + ".gz"))
    with open_input(str(path)) as reader, pytest.raises(BlockError, match="could not read"):
        read_all(reader)
    assert capsys.readouterr().out == ""


def test_a_damaged_hdf5_chunk_fails_the_block(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("d", data=IMAGE, chunks=(4, 4, 4), compression="gzip")
        where = data.id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\0" * 20)
    with open_input(str(path)) as reader, pytest.raises(BlockError, match="could not read"):
        read_all(reader)


def test_many_reads_at_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=IMAGE, chunks=(4, 4, 4))
    volumes = [
        str(write_zarr(tmp_path / "v", IMAGE)),
        str(tmp_path / "a.h5"),
        "synthetic://membranes?shape=9,11,13",
    ]
    for volume in volumes:
        with open_input(volume, num_threads=1) as reader:
            whole = read_all(reader)
            boxes = list(Grid(origin=(0, 0, 0), step=(2, 3, 4), bounds=reader.info.domain))
            futures = [reader.read(box) for box in boxes]
            for box, future in zip(boxes, futures, strict=True):
                inside = (slice(None), *box.slices())
                np.testing.assert_array_equal(future.result(), whole[inside])
                assert future.done()


def test_a_read_begins_at_once_and_may_be_waited_for_a_while(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(self, box):
        begun.set()
        go_on.wait(10)
        return np.ones((1, *box.shape), np.uint8)

    monkeypatch.setattr("mpichunk.volume.computed.ComputedSource._fetch", slowly)
    with open_input("synthetic://membranes?shape=9,9,9") as reader:
        future = reader.read(reader.info.domain)
        assert begun.wait(10) and not future.done()
        with pytest.raises(TimeoutError):
            future.result(timeout=0.01)
        go_on.set()
        assert future.result().all()


def test_boxes_outside_are_bugs(tmp_path):
    with open_input(str(write_zarr(tmp_path / "v", IMAGE))) as reader:
        with pytest.raises(ValueError, match="reaches past"):
            reader.read(reader.info.domain.grow((0, 0, 1)))
        assert reader.read(Box(start=(1, 1, 1), stop=(1, 5, 5))).result().shape == (1, 0, 4, 4)
