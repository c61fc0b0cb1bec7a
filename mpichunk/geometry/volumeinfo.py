"""What is known of a volume without reading a voxel of it.

A frozen value that `volume` fills in and the plan, the fingerprint and the journal read.
"""

from dataclasses import dataclass

import numpy as np

from mpichunk.geometry.box import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeInfo:
    """Identity and extent of one scale of a volume; coordinates zyx in voxels of that scale."""

    location: str
    """Resolved location, absolute: what the fingerprint holds."""

    driver: str
    """TensorStore driver, or `hdf5`, `synthetic`, `cloudvolume`."""

    domain: Box
    """Voxels that the volume has, in absolute coordinates (its voxel offset is the start)."""

    num_channels: int
    """Channels; 1 for a (z, y, x) volume."""

    dtype: np.dtype
    """Type of the stored values, native byte order."""

    voxel_size: tuple[float, float, float] | None
    """zyx in nm; None when neither the volume nor the config tells."""

    mip: int = 0
    """Scale level that was opened."""

    chunk_shape: tuple[int, int, int] | None = None
    """Storage chunk zyx (read chunk when sharded), for read amplification; None when unknown."""
