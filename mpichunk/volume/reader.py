"""Volumes that are read: whatever the format, boxes in, (c, z, y, x) arrays out.

Chooses who reads a format; knows no padding and no blocks.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.volume.address import HDF5, PRECOMPUTED, SYNTHETIC, Address, parse_address
from mpichunk.volume.attributes import ConfigFacts
from mpichunk.volume.cloud import CloudSource, needs_cloudvolume, reopen_cloud
from mpichunk.volume.computed import ComputedSource, reopen_computed
from mpichunk.volume.future import BlockFuture
from mpichunk.volume.hdf5 import Hdf5Source, reopen_hdf5
from mpichunk.volume.metadata import array_metadata, find_driver, refuse_mip, scale_of
from mpichunk.volume.source import Recipe, Source, VoxelSize, keyed
from mpichunk.volume.stored import ReopenedSource, StoredSource

Handle = dict[str, Any]
Volume = str | dict[str, Any]

_REOPEN: dict[str, Callable[[Recipe], Source]] = {
    HDF5: reopen_hdf5,
    SYNTHETIC: reopen_computed,
    CloudSource.driver: reopen_cloud,
}
"""Who opens a recipe again; TensorStore where none is named."""


class Reader:
    """An opened volume."""

    def __init__(self, info: VolumeInfo, source: Source, num_threads: int | None, key: str) -> None:
        self.info = info
        self._source = source
        self._store = source.store(num_threads)
        self._key = key

    @classmethod
    def reopen(cls, handle: Handle, *, num_threads: int | None = None) -> "Reader":
        """Open on another rank what `handle` describes, without reading metadata again.

        (An HDF5 file cannot be opened without its header.)

        Raises:
            VolumeError: this host does not see the volume.
        """
        info: VolumeInfo = handle["info"]
        with keyed(handle["key"]):
            source = _REOPEN.get(info.driver, ReopenedSource)(handle["recipe"])
            return cls(info, source, num_threads, handle["key"])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close files; nothing may be read afterwards."""
        self._source.close()

    def handle(self) -> Handle:
        """Return a small picklable description from which other ranks `reopen` the volume."""
        return {"info": self.info, "recipe": self._source.recipe(), "key": self._key}

    def read(self, box: Box) -> BlockFuture[npt.NDArray[Any]]:
        """Begin to read `box`; the result is (c, z, y, x), native byte order, C order.

        Chunks that were never stored read as the volume's fill value. `result` raises BlockError
        naming volume, box and cause where data are damaged or cannot be read.

        Raises:
            ValueError: the box reaches past the domain (`padding` tells what to read instead).
        """
        if not self.info.domain.contains(box):
            raise ValueError(f"{box} reaches past {self.info.domain} of {self.info.location}")
        return read_box(self._store, box, self.info.location)


def read_box(store: Any, box: Box, location: str) -> BlockFuture[npt.NDArray[Any]]:
    """Begin to read a box of a store with axes c, z, y, x; booleans become 0.0 and 1.0."""

    def finish(array_czyx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array_czyx.astype(np.float32) if array_czyx.dtype == np.bool_ else array_czyx

    future = store[(slice(None), *box.slices())].read(order="C")
    return BlockFuture(future, task=f"read {box} of {location}", finish=finish)


def open_input(
    volume: Volume,
    *,
    mip: int = 0,
    dataset: str | None = None,
    voxel_size: VoxelSize | None = None,
    voxel_offset: Triple | None = None,
    key: str = "input",
    num_threads: int | None = None,
) -> Reader:
    """Open a volume and read its metadata; done by one rank, the others `Reader.reopen`.

    Args:
        volume: cloud-volume URL, TensorStore URL, path (the format is detected), `synthetic://`
            URL, or TensorStore spec.
        mip: scale level of a precomputed volume, 0 = finest.
        dataset: name inside an HDF5 file; needed where several could be meant.
        voxel_size: zyx in nm; overrides what the volume says.
        voxel_offset: coordinates zyx of the first voxel; overrides what the volume says.
        key: config section that errors are about.
        num_threads: threads that decode and copy.

    Raises:
        VolumeError: the volume is missing, is none, or is none that can be used.
    """
    given = ConfigFacts(voxel_size=voxel_size, voxel_offset=voxel_offset)
    with keyed(key):
        address = parse_address(volume)
        mip = mip or int(address.options.get("scale_index", 0))
        source = _open_source(address, mip, dataset, given, num_threads)
        facts = source.facts
        info = VolumeInfo(
            location=source.location,
            driver=source.driver,
            domain=Box.from_shape(facts.start, facts.shape),
            num_channels=facts.num_channels,
            dtype=facts.dtype,
            voxel_size=facts.voxel_size,
            mip=mip,
            chunk_shape=facts.chunk_shape,
        )
        return Reader(info, source, num_threads, key)


def _open_source(
    address: Address, mip: int, dataset: str | None, given: ConfigFacts, num_threads: int | None
) -> Source:
    """Open the volume by what reads its format."""
    if address.driver != SYNTHETIC:
        address = replace(address, driver=find_driver(address))
    if dataset is not None and address.driver != HDF5:
        raise VolumeError(
            f"{address} is not HDF5, which alone has datasets; found {dataset!r}: remove it",
            key="dataset",
        )
    if address.driver != PRECOMPUTED:
        refuse_mip(address, mip)
    if address.driver == SYNTHETIC:
        return ComputedSource(str(address), given)
    if address.driver == HDF5:
        assert address.path is not None
        return Hdf5Source(address.path, dataset, given)
    metadata = array_metadata(address)
    if address.driver == PRECOMPUTED and needs_cloudvolume(
        address, scale_of(address, metadata, mip)
    ):
        return CloudSource(address, metadata, mip=mip, given=given)
    return StoredSource(address, metadata, mip=mip, given=given, num_threads=num_threads)
