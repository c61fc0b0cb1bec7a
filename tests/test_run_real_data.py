"""Real electron microscopy through a real network on three ranks, against the reference."""

from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from cloudvolume import CloudVolume

from mpichunk.config.file import load_config
from mpichunk.geometry.box import Box, triple
from mpichunk.nets import em_affinity_resunet
from tests.endtoend import files_of, read_volume, write_config
from tests.metrics import auc
from tests.reference import Array, Reference, reference

pytestmark = pytest.mark.slow

RUN = ("-m", "mpichunk", "run")
OFFSET = (1000, -56, 7)
VOXEL_SIZE = [10, 10, 10]
SHAPE = (250, 250, 250)
DOMAIN = Box.from_shape(OFFSET, SHAPE)
CODE = Path(em_affinity_resunet.__file__)

GEOMETRY: dict[str, dict[str, Any]] = {
    # At a corner of the volume, so that mirror images take part, and off every grid.
    "same": {
        "roi": {"start": [1225, 139, 160], "stop": [1250, 194, 257]},
        "patch": {"shape": [32, 64, 64], "overlap": [8, 12, 16]},
        "block": {"shape": [48, 96, 96]},
    },
    # Strides that are multiples of 4: the network's pooling has the same phase everywhere.
    "valid": {
        "roi": {"start": [1225, 144, 200], "stop": [1250, 194, 257]},
        "patch": {"shape": [74, 90, 90], "crop": [21, 21, 21], "overlap": [8, 12, 12]},
        "block": {"shape": [48, 96, 96]},
    },
}
SHARDED = {"volume": "out.zarr", "chunk_shape": [16, 32, 32], "shard_shape": [48, 96, 96]}
PRECOMPUTED = {"volume": "precomputed://file://out", "chunk_shape": [24, 48, 48], "dtype": "uint8"}


def real_config(folder: Path, data: Path, padding: str, *, script: bool, output: Any) -> Path:
    """Write a config for the published TorchScript file, or for the network that ships."""
    model = {"path": str(data / f"nets/em_affinity_resunet_{padding}.ts.pt")}
    if not script:
        model = {
            "path": f"{CODE}:EmAffinityResUNet",
            "weights": str(CODE.with_suffix(".safetensors")),
            "arguments": {"padding": padding},
        }
    return write_config(
        folder,
        input={
            "volume": str(data / "em/fib25_train2_250.h5"),
            "dataset": "image",
            "voxel_size": VOXEL_SIZE,
            "voxel_offset": list(OFFSET),
        },
        model={"backend": "pytorch", "out_channels": 3} | model,
        output=output,
        compute={"device": "cpu", "threads": 1},
        **GEOMETRY[padding],
    )


@cache
def image(data: Path) -> Array:
    with h5py.File(data / "em/fib25_train2_250.h5") as file:
        return np.asarray(file["image"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory, real_data):
    """Return `expected(padding)`: the reference, from the published network, computed once."""

    @cache
    def make(padding: str) -> Reference:
        torch.set_num_threads(1)
        net = torch.jit.load(real_data / f"nets/em_affinity_resunet_{padding}.ts.pt")

        def forward(patch_czyx: Array) -> Array:
            with torch.no_grad():
                return net(torch.from_numpy(np.ascontiguousarray(patch_czyx))[None])[0].numpy()

        folder = tmp_path_factory.mktemp("reference")
        config = real_config(folder, real_data, padding, script=True, output=SHARDED)
        return reference(image(real_data)[None], DOMAIN, forward, load_config(config).config)

    return make


def roi_of(padding: str) -> Box:
    roi = GEOMETRY[padding]["roi"]
    return Box(start=triple(roi["start"]), stop=triple(roi["stop"]))


def check_values(found_czyx: Array, padding: str, expected: Reference) -> None:
    """Compare the ROI of an output: float32 within 1e-5, uint8 within one level."""
    where = (slice(None), *roi_of(padding).slices(OFFSET))
    values = expected.values_czyx[where]
    assert 0.2 < values.std() < 0.5
    if found_czyx.dtype == np.float32:
        np.testing.assert_allclose(found_czyx, values, rtol=0, atol=1e-5)
        return
    assert found_czyx.dtype == np.uint8
    quantised = np.rint(np.clip(values, 0, 1) * 255).astype(int)
    difference = np.abs(found_czyx.astype(int) - quantised)
    assert difference.max() <= 1
    # One level off only where float32 falls to the other side of a half.
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("padding", "script", "dtype"), [("same", True, "float32"), ("valid", False, "uint8")]
)
def test_sharded_zarr(tmp_path, mpirun, real_data, expected, padding, script, dtype):
    output = SHARDED | {"dtype": dtype}
    config = real_config(tmp_path, real_data, padding, script=script, output=output)
    done = mpirun(3, *RUN, config)
    assert done.returncode == 0, done.stderr
    found = read_volume(tmp_path / "out.zarr", roi_of(padding))
    check_values(found, padding, expected(padding))

    opened = zarr.open_array(tmp_path / "out.zarr", mode="r")
    assert opened.shape == (3, *SHAPE)
    assert opened.dtype == dtype
    assert opened.chunks == (3, 16, 32, 32)
    assert opened.shards == (3, 48, 96, 96)
    attributes = opened.attrs.asdict()
    assert attributes["voxel_offset"] == list(OFFSET)
    assert attributes["voxel_size"] == VOXEL_SIZE
    assert attributes["unit"] == "nanometer"
    where = (slice(None), *roi_of(padding).slices(OFFSET))
    np.testing.assert_array_equal(opened[where], found)
    # A file per shard that the ROI touches, and the metadata.
    assert len(files_of(tmp_path / "out.zarr")) == 1 + len(load_plan(config))


def load_plan(config: Path) -> Any:
    from mpichunk.plan.plan import Plan

    return Plan.from_config(load_config(config).config, DOMAIN)


@pytest.mark.parametrize(("padding", "script"), [("same", False), ("valid", True)])
def test_precomputed(tmp_path, mpirun, real_data, expected, padding, script):
    config = real_config(tmp_path, real_data, padding, script=script, output=PRECOMPUTED)
    done = mpirun(3, *RUN, config)
    assert done.returncode == 0, done.stderr
    found = read_volume(f"precomputed://file://{tmp_path}/out", roi_of(padding))
    check_values(found, padding, expected(padding))

    opened = CloudVolume(f"file://{tmp_path}/out", fill_missing=True, progress=False)
    assert opened.shape == (*SHAPE[::-1], 3)
    assert opened.dtype == np.uint8
    assert list(opened.resolution) == VOXEL_SIZE
    assert list(opened.voxel_offset) == list(OFFSET[::-1])
    assert list(opened.chunk_size) == [48, 48, 24]
    roi = roi_of(padding)
    z, y, x = (slice(a, b) for a, b in zip(roi.start, roi.stop, strict=True))
    cutout_xyzc = np.asarray(opened[x, y, z])
    np.testing.assert_array_equal(cutout_xyzc.transpose(3, 2, 1, 0), found)


def test_affinities_are_those_of_the_truth(real_data, expected):
    """The published accuracy on the part of the volume that was not trained on."""
    roi = roi_of("same")
    inside = roi.slices(OFFSET)
    assert inside[0].start >= 180, "the network was trained below"
    with h5py.File(real_data / "em/fib25_train2_250.h5") as file:
        labels = np.asarray(file["labels"])
    values = expected("same").values_czyx
    for axis in range(3):
        same_body = labels == np.roll(labels, 1, axis=axis)
        score = auc(values[axis][inside], same_body[inside])
        print(f"axis {axis}: affinity AUC {score:.3f}")
        assert score > 0.88
