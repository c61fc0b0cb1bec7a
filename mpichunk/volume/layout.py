"""How an output is laid out in each format, and how two layouts differ.

Pure functions between an `OutputSpec` and the JSON of a format; touches no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpichunk.config.formats import dtype_mistake, shard_mistake
from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple
from mpichunk.volume.address import FORMAT_NAMES, PRECOMPUTED, ZARR2, ZARR3
from mpichunk.volume.attributes import voxel_offset_of, voxel_size_of
from mpichunk.volume.metadata import Metadata
from mpichunk.volume.source import VoxelSize
from mpichunk.words import count

AXES = "czyx"
COMPRESSION_LEVEL = 3
LARGEST_CHUNK_NBYTES = 2**31 - 2**10
"""What the compressor takes at once."""

WRITABLE = (PRECOMPUTED, ZARR2, ZARR3)

Layout = Mapping[str, Any]
"""Fields that must agree before blocks may be written, in the user's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """The output volume that is asked for."""

    volume: str | dict[str, Any]
    """cloud-volume URL, TensorStore URL, path, or TensorStore spec."""

    domain: Box
    """Voxels that it covers, absolute zyx; chunks are counted from its first voxel."""

    num_channels: int
    """Channels; all of one voxel lie in one chunk."""

    dtype: np.dtype[Any]
    """Type of the stored values."""

    chunk_shape: Triple
    """Storage chunk zyx."""

    shard_shape: Triple | None = None
    """Shard zyx, a multiple of the chunk; None for one file per chunk."""

    voxel_size: VoxelSize | None = None
    """zyx in nm; None if nobody knows (precomputed, which must have one, then says 1 nm)."""

    @property
    def write_unit(self) -> Triple:
        """What one file holds, zyx."""
        return self.shard_shape or self.chunk_shape


def check_spec(spec: OutputSpec, driver: str) -> None:
    """Refuse what a format cannot hold.

    Raises:
        VolumeError: with the key of the setting to change.
    """
    name = FORMAT_NAMES.get(driver, driver)
    if driver not in WRITABLE:
        known = ", ".join(FORMAT_NAMES[d] for d in WRITABLE)
        raise VolumeError(f"{spec.volume}: {name} cannot be written; expected one of {known}")
    if mistake := dtype_mistake(spec.dtype.name, name):
        raise VolumeError(mistake, key="dtype")
    if spec.shard_shape is not None and (mistake := shard_mistake(spec.shard_shape, name)):
        raise VolumeError(mistake, key="shard_shape")
    if spec.shard_shape is not None and any(
        s % c for s, c in zip(spec.shard_shape, spec.chunk_shape, strict=True)
    ):
        raise VolumeError(
            f"{spec.shard_shape} is not a multiple of the chunk {spec.chunk_shape}",
            key="shard_shape",
        )
    nbytes = prod(spec.chunk_shape) * spec.num_channels * spec.dtype.itemsize
    if nbytes > LARGEST_CHUNK_NBYTES:
        raise VolumeError(
            f"a chunk {spec.chunk_shape} of {count(spec.num_channels, 'channel')} has {nbytes} "
            f"bytes; at most {LARGEST_CHUNK_NBYTES} can be stored: make it smaller",
            key="chunk_shape",
        )


def creation_json(spec: OutputSpec, driver: str) -> Metadata:
    """Return the members of a TensorStore spec that create the output."""
    if driver == PRECOMPUTED:
        return _precomputed_json(spec)
    return {"metadata": _zarr2_json(spec) if driver == ZARR2 else _zarr3_json(spec)}


def attributes_json(spec: OutputSpec) -> Metadata:
    """Return the attributes of a zarr array, which `input.volume` reads back."""
    attributes: Metadata = {"voxel_offset": list(spec.domain.start)}
    if spec.voxel_size is not None:
        attributes |= {"voxel_size": list(spec.voxel_size), "unit": "nanometer"}
    return attributes


def wanted_layout(spec: OutputSpec, driver: str) -> Layout:
    """Return the fields that an existing volume must have to be taken for this output."""
    size = spec.voxel_size
    if driver == PRECOMPUTED:
        size = size or (1.0, 1.0, 1.0)
    layout = {
        "format": FORMAT_NAMES[driver],
        "axes": AXES,
        "shape": spec.domain.shape,
        "voxel_offset": spec.domain.start,
        "voxel_size": size,
        "channels": spec.num_channels,
        "dtype": spec.dtype.name,
        "chunk_shape": spec.chunk_shape,
        "shard_shape": spec.shard_shape,
        "channels per chunk": spec.num_channels,
        "fill_value": 0,
    }
    return layout | ({"encoding": "raw"} if driver == PRECOMPUTED else {})


def found_layout(driver: str, metadata: Metadata, attributes: Metadata) -> Layout:
    """Return the same fields of an existing volume.

    Raises:
        KeyError, TypeError, ValueError, IndexError: the metadata are damaged.
        VolumeError: an attribute is damaged.
    """
    if driver == PRECOMPUTED:
        return _found_precomputed(metadata)
    sizes, shards = _found_zarr_chunks(driver, metadata)
    names = metadata.get("dimension_names") if driver == ZARR3 else None
    axes = "".join(name or "?" for name in names) if names else AXES
    dtype = np.dtype(metadata["data_type"] if driver == ZARR3 else metadata["dtype"])
    return {
        "format": FORMAT_NAMES[driver],
        "axes": axes,
        "shape": tuple(metadata["shape"][1:]),
        "voxel_offset": voxel_offset_of(attributes, AXES),
        "voxel_size": voxel_size_of(attributes, AXES),
        "channels": metadata["shape"][0] if len(metadata["shape"]) == 4 else None,
        "dtype": dtype.name,
        "chunk_shape": tuple(sizes[1:]),
        "shard_shape": tuple(shards[1:]) if shards else None,
        "channels per chunk": sizes[0],
        "fill_value": metadata["fill_value"] or 0,
    }


def differences(found: Layout, wanted: Layout) -> list[str]:
    """Return each field that differs, in words."""
    return [
        f"{name}: found {found.get(name)}, expected {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _precomputed_json(spec: OutputSpec) -> Metadata:
    z, y, x = spec.voxel_size or (1.0, 1.0, 1.0)
    return {
        "multiscale_metadata": {
            "type": "image",
            "data_type": spec.dtype.name,
            "num_channels": spec.num_channels,
        },
        "scale_metadata": {
            "size": spec.domain.shape[::-1],
            "voxel_offset": spec.domain.start[::-1],
            "resolution": [x, y, z],
            "chunk_size": spec.chunk_shape[::-1],
            "encoding": "raw",
        },
    }


def _zarr2_json(spec: OutputSpec) -> Metadata:
    if spec.dtype.itemsize == 1:
        compressor: Metadata = {"id": "zstd", "level": COMPRESSION_LEVEL}
    else:
        compressor = {"id": "blosc", "cname": "zstd", "clevel": COMPRESSION_LEVEL, "shuffle": 1}
    return {
        "shape": [spec.num_channels, *spec.domain.shape],
        "chunks": [spec.num_channels, *spec.chunk_shape],
        "dtype": spec.dtype.newbyteorder("<").str,
        "compressor": compressor,
        "fill_value": 0,
        "dimension_separator": "/",
    }


def _zarr3_json(spec: OutputSpec) -> Metadata:
    chunk_shape = [spec.num_channels, *spec.chunk_shape]
    codecs = _zarr3_codecs(spec.dtype.itemsize)
    if spec.shard_shape is not None:
        index_codecs = [_codec("bytes", endian="little"), _codec("crc32c")]
        codecs = [
            _codec(
                "sharding_indexed",
                chunk_shape=chunk_shape,
                codecs=codecs,
                index_codecs=index_codecs,
            )
        ]
    grid = {"chunk_shape": [spec.num_channels, *spec.write_unit]}
    return {
        "shape": [spec.num_channels, *spec.domain.shape],
        "chunk_grid": {"name": "regular", "configuration": grid},
        "data_type": spec.dtype.name,
        "fill_value": 0,
        "dimension_names": list(AXES),
        "codecs": codecs,
        "attributes": attributes_json(spec),
    }


def _zarr3_codecs(itemsize: int) -> list[Metadata]:
    """Return how one chunk is stored: compressed, with a checksum that finds damage."""
    # Bytes compress better, and faster, without blosc; longer values better shuffled by it.
    if itemsize == 1:
        compressor = _codec("zstd", level=COMPRESSION_LEVEL, checksum=False)
    else:
        compressor = _codec(
            "blosc",
            cname="zstd",
            clevel=COMPRESSION_LEVEL,
            shuffle="shuffle",
            typesize=itemsize,
            blocksize=0,
        )
    return [_codec("bytes", endian="little"), compressor, _codec("crc32c")]


def _codec(name: str, **configuration: Any) -> Metadata:
    return {"name": name, "configuration": configuration} if configuration else {"name": name}


def _found_precomputed(info: Metadata) -> Layout:
    """Return the fields of the finest scale, whose lists are xyz."""
    scale = info["scales"][0]
    sharded = scale.get("sharding") is not None
    return {
        "format": FORMAT_NAMES[PRECOMPUTED],
        "axes": AXES,
        "shape": tuple(scale["size"][::-1]),
        "voxel_offset": tuple(scale.get("voxel_offset", (0, 0, 0))[::-1]),
        "voxel_size": tuple(float(r) for r in scale["resolution"][::-1]),
        "channels": info["num_channels"],
        "dtype": info["data_type"],
        "chunk_shape": tuple(scale["chunk_sizes"][0][::-1]),
        "shard_shape": "some" if sharded else None,
        "channels per chunk": info["num_channels"],
        "fill_value": 0,
        "encoding": scale["encoding"],
    }


def _found_zarr_chunks(driver: str, metadata: Metadata) -> tuple[list[int], list[int] | None]:
    """Return the chunk and, if sharded, the shard of a zarr array, channels included."""
    if driver == ZARR2:
        return metadata["chunks"], None
    grid: list[int] = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            return codec["configuration"]["chunk_shape"], grid
    return grid, None
