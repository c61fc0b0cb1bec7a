"""What every kind of stored volume must tell and do before it can be read.

Knows no format: HDF5, cloud-volume, TensorStore and computed volumes each bring one `Source`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple

VoxelSize = tuple[float, float, float]
Recipe = dict[str, Any]
"""Small picklable values that say how another rank opens the same volume."""

Fetch = Callable[[Box], npt.NDArray[Any]]
"""Returns (c, z, y, x) for a box whose (0, 0, 0) is the volume's first voxel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFacts:
    """What a volume says about itself, axes already turned to zyx, the config's word included."""

    shape: Triple
    """Voxels per axis."""

    num_channels: int
    """Channels; 1 for a (z, y, x) volume."""

    dtype: np.dtype[Any]
    """Type of the values as they are handed out: native byte order; float32 for bool, unscaled."""

    start: Triple
    """Absolute coordinates of the first voxel."""

    voxel_size: VoxelSize | None
    """zyx in nm; None if the volume does not tell."""

    chunk_shape: Triple | None
    """The least that is read at once; None when unknown."""


class Source(Protocol):
    """An opened volume: its metadata are read once, its voxels through a store."""

    driver: str
    """As in `VolumeInfo.driver`."""

    location: str
    """As in `VolumeInfo.location`."""

    facts: VolumeFacts
    """What the volume says about itself."""

    def store(self, num_threads: int | None) -> Any:
        """Return a TensorStore with axes c, z, y, x at absolute coordinates."""

    def recipe(self) -> Recipe:
        """Return how another rank opens it, with as little reading of metadata as can be."""

    def close(self) -> None:
        """Close files."""


def usable_dtype(dtype: np.dtype[Any], location: str) -> np.dtype[Any]:
    """Return the type in which values are handed out.

    Raises:
        VolumeError: values that are not integers, booleans or floats of at most 64 bits.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(
            f"{location} holds {dtype} values; expected integers, booleans or floats "
            "of at most 64 bits: convert it first"
        )
    return np.dtype(np.float32) if dtype.kind == "b" else dtype.newbyteorder("=")


@contextmanager
def keyed(section: str) -> Iterator[None]:
    """Put the config section before the key of any VolumeError; `volume` is the default key.

    What the file system refuses is one, too.
    """
    try:
        yield
    except OSError as error:
        raise VolumeError(
            f"{error.filename or section}: {error.strerror}; choose a place that this job may use",
            key=f"{section}.volume",
        ) from error
    except VolumeError as error:
        raise VolumeError(error.message, key=f"{section}.{error.key or 'volume'}") from error
