"""Inputs that cannot be opened get one message, and damaged data fails the block."""

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from mpichunk.errors import BlockError, VolumeError
from mpichunk.geometry.box import Box
from mpichunk.volume import Reader, open_input
from tests.volumes import IMAGE, read_all, refused, write_precomputed, write_zarr

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
