"""Datasets of HDF5 files, read through a virtual TensorStore.

Knows h5py and nothing of chunks read ahead; HDF5 itself lets one thread read at a time.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple, triple
from mpichunk.volume.address import HDF5
from mpichunk.volume.attributes import ConfigFacts, axes_of, voxel_offset_of, voxel_size_of
from mpichunk.volume.source import Recipe, VolumeFacts, usable_dtype
from mpichunk.volume.tensor import virtual_store

CONTIGUOUS_CHUNK: Triple = (64, 64, 64)
"""What is read at once from a dataset that is not chunked."""


class Hdf5Source:
    """One dataset of an HDF5 file."""

    driver = HDF5

    def __init__(self, path: Path, dataset: str | None, given: ConfigFacts) -> None:
        import h5py

        try:
            # Locks are taken where the file system has them: some parallel ones do not.
            self._file = h5py.File(path, "r", locking="best-effort")
        except OSError as error:
            raise VolumeError(f"{path} cannot be opened as HDF5: {error}") from error
        try:
            self._dataset = _find_dataset(self._file, dataset, path)
            self.location = f"file://{path}|hdf5:{self._dataset.name.strip('/')}"
            self._axes, self.facts = _read_facts(self._dataset, given, self.location)
        except VolumeError:
            self._file.close()
            raise
        self._path, self._given = path, given

    def store(self, num_threads: int | None) -> Any:
        """Return the dataset as (c, z, y, x) at its absolute coordinates."""
        chunk_shape = self.facts.chunk_shape or CONTIGUOUS_CHUNK
        return virtual_store(self._fetch, self.facts, num_threads, chunk_shape)

    def recipe(self) -> Recipe:
        """Return path and dataset: opening the file reads what HDF5 needs."""
        return {
            "path": str(self._path),
            "dataset": self._dataset.name,
            "voxel_size": self._given.voxel_size,
            "voxel_offset": self._given.voxel_offset,
        }

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fetch(self, box: Box) -> npt.NDArray[Any]:
        """Return (c, z, y, x) of a box counted from the first voxel."""
        spans = dict(zip("zyx", box.slices(), strict=True))
        part = self._dataset[tuple(spans.get(axis, slice(None)) for axis in self._axes)]
        if "c" not in self._axes:
            return np.asarray(part.transpose([self._axes.index(axis) for axis in "zyx"])[None])
        return np.asarray(part.transpose([self._axes.index(axis) for axis in "czyx"]))


def reopen_hdf5(recipe: Recipe) -> Hdf5Source:
    """Return the dataset that a recipe describes."""
    given = ConfigFacts(voxel_size=recipe["voxel_size"], voxel_offset=recipe["voxel_offset"])
    return Hdf5Source(Path(recipe["path"]), recipe["dataset"], given)


def _find_dataset(file: Any, name: str | None, path: Path) -> Any:
    """Return the dataset of that name, or the only one that could be a volume."""
    import h5py

    names: list[str] = []

    def collect(item_name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim in (3, 4):
            names.append(item_name)

    if name is not None and isinstance(file.get(name), h5py.Dataset):
        return file[name]
    file.visititems(collect)
    listed = ", ".join(sorted(names)) or "none with 3 or 4 axes"
    if name is not None:
        found = "is a group" if name in file else "is not there"
        raise VolumeError(f"{path}: dataset {name!r} {found}; it holds {listed}", key="dataset")
    if len(names) != 1:
        raise VolumeError(f"{path} holds the datasets {listed}; name one of them", key="dataset")
    return file[names[0]]


def _read_facts(dataset: Any, given: ConfigFacts, location: str) -> tuple[str, VolumeFacts]:
    """Return the axes of a dataset and what it says about itself."""
    attributes = {name: _plain(value) for name, value in dataset.attrs.items()}
    if not isinstance(dataset.dtype, np.dtype) or dataset.shape is None:
        raise VolumeError(f"{location} does not hold an array", key="dataset")
    try:
        axes = axes_of(list(str(attributes.get("axes", ""))), dataset.ndim, "czyx")
        start = given.voxel_offset or voxel_offset_of(attributes, axes)
        size = given.voxel_size or voxel_size_of(attributes, axes)
    except VolumeError as error:
        raise VolumeError(f"{location} {error.message}", key=error.key) from error

    def spatial(values: tuple[int, ...]) -> Triple:
        return triple([values[axes.index(axis)] for axis in "zyx"])

    return axes, VolumeFacts(
        shape=spatial(dataset.shape),
        num_channels=dataset.shape[axes.index("c")] if "c" in axes else 1,
        dtype=usable_dtype(dataset.dtype, location),
        start=start,
        voxel_size=size,
        chunk_shape=spatial(dataset.chunks) if dataset.chunks else None,
    )


def _plain(value: Any) -> Any:
    """Return an HDF5 attribute as text, number or list."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
