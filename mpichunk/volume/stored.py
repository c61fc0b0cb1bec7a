"""Volumes that TensorStore reads: precomputed, zarr2, zarr3, N5.

Knows where each keeps its voxel size and offset; the rest is TensorStore's.
"""

import os
from typing import Any

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Triple, add, triple
from mpichunk.geometry.buffers import CACHE_NBYTES
from mpichunk.volume.address import N5, PRECOMPUTED, ZARR2, Address
from mpichunk.volume.attributes import ConfigFacts, axes_of, voxel_offset_of, voxel_size_of
from mpichunk.volume.metadata import MARKERS, Metadata, attributes_of, scale_of
from mpichunk.volume.source import Recipe, VolumeFacts, VoxelSize, usable_dtype
from mpichunk.volume.tensor import make_context, open_store, to_czyx


class StoredSource:
    """A zarr, N5 or precomputed volume, opened with its metadata read."""

    def __init__(
        self,
        address: Address,
        metadata: Metadata,
        *,
        mip: int,
        given: ConfigFacts,
        num_threads: int | None,
    ) -> None:
        assert address.driver is not None
        self.driver = address.driver
        self.location = str(address)
        self._marker = str(address.path / MARKERS[self.driver]) if address.path else None
        self._context = address.context
        self._raw = _open(address, mip, num_threads)
        if self.driver == PRECOMPUTED:
            self._axes = "xyzc"
            start: Triple = (0, 0, 0)
            voxel_size: VoxelSize | None = scale_of(address, metadata, mip).voxel_size
        else:
            attributes = attributes_of(address, metadata)
            self._axes = _axes(self._raw, address, attributes)
            start, voxel_size = _placement(address, attributes, self._axes, given)
        self.facts = self._read_facts(start, voxel_size, given)

    def _read_facts(
        self, start: Triple, voxel_size: VoxelSize | None, given: ConfigFacts
    ) -> VolumeFacts:
        """Return what the store says, with the placement that its metadata and the config say."""
        origin = self._raw.domain.origin
        first = triple([origin[self._axes.index(axis)] for axis in "zyx"])
        turned = to_czyx(self._raw, self._axes, start)
        chunk_shape = (turned.chunk_layout.read_chunk.shape or (0, 0, 0, 0))[1:]
        return VolumeFacts(
            shape=triple(turned.domain.shape[1:]),
            num_channels=int(turned.domain.shape[0]),
            dtype=usable_dtype(turned.dtype.numpy_dtype, self.location),
            start=given.voxel_offset or add(start, first),
            voxel_size=given.voxel_size or voxel_size,
            chunk_shape=triple(chunk_shape) if all(chunk_shape) else None,
        )

    def store(self, num_threads: int | None) -> Any:
        """Return the volume as (c, z, y, x) at its absolute coordinates."""
        return to_czyx(self._raw, self._axes, self.facts.start)

    def recipe(self) -> Recipe:
        """Return the spec with all metadata in it: nobody else reads them."""
        return {
            "spec": self.store(None).spec().to_json(),
            "context": self._context,
            "marker": self._marker,
            "driver": self.driver,
            "location": self.location,
            "facts": self.facts,
        }

    def close(self) -> None:
        """Nothing stays open."""


class ReopenedSource:
    """A volume that another rank has opened: no metadata are read again."""

    def __init__(self, recipe: Recipe) -> None:
        """Ask only whether the metadata file is there.

        Where it is not, every chunk would be missing too, and missing chunks read as zero.

        Raises:
            VolumeError: this host does not see the volume.
        """
        marker = recipe["marker"]
        if marker is not None and not os.path.isfile(marker):
            raise VolumeError(
                f"{recipe['location']} is not visible on {os.uname().nodename}, though it is where "
                "the run was started: put it on a file system that all hosts share"
            )
        self.driver = recipe["driver"]
        self.location = recipe["location"]
        self.facts = recipe["facts"]
        self._recipe = recipe

    def store(self, num_threads: int | None) -> Any:
        """Return the volume as (c, z, y, x) at its absolute coordinates."""
        extra = self._recipe["context"]
        context = make_context(num_threads, cache_nbytes=CACHE_NBYTES, extra=extra)
        return open_store(
            self._recipe["spec"],
            context,
            open=True,
            read=True,
            assume_metadata=True,
            recheck_cached="open",
        )

    def recipe(self) -> Recipe:
        """Return the recipe it was opened from."""
        return self._recipe

    def close(self) -> None:
        """Nothing stays open."""


def _open(address: Address, mip: int, num_threads: int | None) -> Any:
    """Open the array in its own order of axes."""
    spec = {**address.options, "driver": address.driver, "kvstore": address.store}
    spec.pop("context", None)
    if address.driver == PRECOMPUTED:
        spec["scale_index"] = mip
    context = make_context(num_threads, cache_nbytes=CACHE_NBYTES, extra=address.context)
    try:
        return open_store(spec, context, open=True, read=True, recheck_cached="open")
    except VolumeError as error:
        raise VolumeError(f"{address} cannot be opened: {error.message}") from error


def _axes(raw: Any, address: Address, attributes: Metadata) -> str:
    """Return the array's axes, one letter of `czyx` each, in its own order."""
    names = raw.domain.labels
    if address.driver == ZARR2:
        # xarray's way of naming the axes of a zarr2 array.
        names = attributes.get("_ARRAY_DIMENSIONS") or names
    try:
        return axes_of(names, raw.rank, "xyzc" if address.driver == N5 else "czyx")
    except VolumeError as error:
        raise VolumeError(f"{address} {error.message}") from error


def _placement(
    address: Address, attributes: Metadata, axes: str, given: ConfigFacts
) -> tuple[Triple, VoxelSize | None]:
    """Return first voxel and voxel size by the attributes, unless the config says them."""
    try:
        offset = (0, 0, 0) if given.voxel_offset else voxel_offset_of(attributes, axes)
        return offset, given.voxel_size or voxel_size_of(attributes, axes)
    except VolumeError as error:
        raise VolumeError(f"{address}: {error.message}", key=error.key) from error
