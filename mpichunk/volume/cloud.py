"""Precomputed volumes that TensorStore does not read right, read by cloud-volume.

Those are encodings that TensorStore does not know, and chunk files on a file system that carry a
compression suffix, as cloud-volume writes them: TensorStore would not find them and read zeros.
"""

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box
from mpichunk.volume.address import Address
from mpichunk.volume.attributes import ConfigFacts
from mpichunk.volume.metadata import Metadata, Scale, scale_of
from mpichunk.volume.source import Recipe, VolumeFacts, usable_dtype
from mpichunk.volume.tensor import virtual_store

ENCODINGS = ("raw", "png", "jpeg", "compressed_segmentation")
"""What TensorStore decodes."""

CODECS: Mapping[str, tuple[str, str]] = {
    "raw": ("cloudvolume", "cloud-volume"),
    "png": ("pyspng", "pyspng-seunglab"),
    "jpeg": ("simplejpeg", "simplejpeg"),
    "compressed_segmentation": ("compressed_segmentation", "compressed-segmentation"),
    "compresso": ("compresso", "compresso"),
    "crackle": ("crackle", "crackle-codec"),
    "fpzip": ("fpzip", "fpzip"),
    "kempressed": ("fpzip", "fpzip"),
    "zfpc": ("zfpc", "zfpc"),
    "jxl": ("imagecodecs", "imagecodecs"),
}
"""Module with which cloud-volume decodes each encoding, and the package that brings it."""

SUFFIXES = (".gz", ".br", ".zstd", ".zst", ".xz", ".bz2")
"""What cloud-volume appends to the names of compressed files."""

_one_at_a_time = threading.Lock()


class CloudSource:
    """One scale of a precomputed volume, read by cloud-volume."""

    driver = "cloudvolume"

    def __init__(
        self, address: Address, metadata: Metadata, *, mip: int, given: ConfigFacts
    ) -> None:
        scale = scale_of(address, metadata, mip)
        _require_codec(address, scale.encoding)
        self.location = str(address)
        self._recipe = {
            "url": f"precomputed://{address.place}",
            "info": metadata,
            "mip": mip,
            "address": address,
            "given": given,
        }
        try:
            dtype = np.dtype(metadata["data_type"])
            self._volume = _open(self._recipe)
        except VolumeError:
            raise
        except Exception as error:
            raise VolumeError(f"{address} cannot be opened by cloud-volume: {error}") from error
        self._first = scale.start
        self.facts = VolumeFacts(
            shape=scale.shape,
            num_channels=int(metadata["num_channels"]),
            dtype=usable_dtype(dtype, self.location),
            start=given.voxel_offset or scale.start,
            voxel_size=given.voxel_size or scale.voxel_size,
            chunk_shape=scale.chunk_shape,
        )

    def store(self, num_threads: int | None) -> Any:
        """Return the volume as (c, z, y, x) at its absolute coordinates."""
        assert self.facts.chunk_shape is not None
        return virtual_store(self._fetch, self.facts, num_threads, self.facts.chunk_shape)

    def recipe(self) -> Recipe:
        """Return the URL and the info, which nobody else reads."""
        return self._recipe

    def close(self) -> None:
        """Nothing stays open."""

    def _fetch(self, box: Box) -> npt.NDArray[Any]:
        """Return (c, z, y, x) of a box counted from the first voxel."""
        z, y, x = box.translate(self._first).slices()
        with _quiet():
            part_xyzc = np.asarray(self._volume[x, y, z])
        return part_xyzc.transpose(3, 2, 1, 0)


def reopen_cloud(recipe: Recipe) -> CloudSource:
    """Return the volume that a recipe describes."""
    return CloudSource(recipe["address"], recipe["info"], mip=recipe["mip"], given=recipe["given"])


def needs_cloudvolume(address: Address, scale: Scale) -> bool:
    """Return whether TensorStore would fail on this scale, or read zeros."""
    if scale.encoding not in ENCODINGS:
        return True
    return not scale.is_sharded and has_suffixed_files(address, scale.folder)


def has_suffixed_files(address: Address, scale_folder: str, limit: int = 1000) -> bool:
    """Return whether one of the first chunk files on a file system has a compression suffix."""
    folder = os.path.join(address.path or "", scale_folder)
    if address.path is None or not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(e.name.endswith(SUFFIXES) for e, _ in zip(entries, range(limit), strict=False))


def _require_codec(address: Address, encoding: str) -> None:
    """Refuse an encoding that is unknown, or whose codec is not installed."""
    if encoding not in CODECS:
        raise VolumeError(
            f"{address} has an unknown encoding {encoding!r}; known are {', '.join(CODECS)}"
        )
    module, package = CODECS[encoding]
    if importlib.util.find_spec(module) is None:
        raise VolumeError(
            f"{address} is encoded as {encoding}, whose codec is not installed: pip install "
            f"{package}"
        )


def _open(recipe: Recipe) -> Any:
    """Return the CloudVolume, which shall start neither threads nor processes of its own."""
    with _quiet():
        from cloudvolume import CloudVolume

        return CloudVolume(
            recipe["url"],
            mip=recipe["mip"],
            info=recipe["info"],
            bounded=True,
            fill_missing=True,
            progress=False,
            parallel=1,
            green_threads=False,
            cache=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep cloud-volume's prints off stdout, where verbs put results; one thread at a time."""
    with _one_at_a_time, redirect_stdout(sys.stderr):
        yield
