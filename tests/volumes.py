"""Volumes that tests write to read them, and the outputs that they ask for."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box
from mpichunk.volume import OutputSpec, Reader, open_input

# ---- Read -------------------------------------------------------------------------------------

IMAGE = np.random.default_rng(7).integers(1, 255, (9, 11, 13)).astype(np.uint8)


def refused(key: str, volume: object, /, **how: object) -> str:
    """Return why a volume is not opened."""
    with pytest.raises(VolumeError) as caught:
        open_input(volume, **how)
    assert caught.value.key == key
    return caught.value.message


def read_all(reader: Reader) -> np.ndarray:
    """Return (c, z, y, x)."""
    return reader.read(reader.info.domain).result()


def write_zarr(path: Path, array: np.ndarray, version: int = 3, **how: object) -> Path:
    how = {"chunks": (4,) * array.ndim, "compressors": None, "zarr_format": version} | how
    zarr.create_array(path, data=array, **how)
    return path


def write_precomputed(path: Path, array_zyx: np.ndarray, num_scales: int = 1) -> Path:
    """Write a volume at an offset, each scale with half the y and x of the one before."""
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


# ---- Written ----------------------------------------------------------------------------------

DOMAIN = Box.from_shape((-3, 5, -7), (19, 22, 27))
FORMATS = ("zarr3", "zarr2", "neuroglancer-precomputed")


def spec_of(path: Path | str, **how: object) -> OutputSpec:
    """Return an output of three channels over `DOMAIN`."""
    how = {
        "domain": DOMAIN,
        "num_channels": 3,
        "dtype": np.dtype("uint8"),
        "chunk_shape": (8, 8, 8),
        "voxel_size": (40.0, 4.0, 4.5),
    } | how
    return OutputSpec(volume=str(path), **how)
