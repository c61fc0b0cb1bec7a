"""Every input format and notation gives the same voxels, also when many are read at once."""

import json
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest

from mpichunk.geometry.box import Box, Grid
from mpichunk.volume import Reader, open_input
from tests.volumes import IMAGE, read_all, refused, write_precomputed, write_zarr

PARTS = Box(start=(2, 3, 4), stop=(8, 10, 13))


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
