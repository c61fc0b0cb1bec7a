"""The computed volume as an input like any other, through a virtual TensorStore.

Knows how to wrap it; what it looks like is `synthetic`'s.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple
from mpichunk.volume.address import SYNTHETIC
from mpichunk.volume.attributes import ConfigFacts
from mpichunk.volume.source import Recipe, VolumeFacts
from mpichunk.volume.synthetic import parse_synthetic
from mpichunk.volume.tensor import virtual_store

CHUNK: Triple = (32, 64, 64)
"""What is computed at once."""


class ComputedSource:
    """A volume that is computed on the fly."""

    driver = SYNTHETIC

    def __init__(self, url: str, given: ConfigFacts) -> None:
        try:
            self._volume = parse_synthetic(url)
        except VolumeError as error:
            raise VolumeError(error.message) from error
        self.location = url
        self._given = given
        self.facts = VolumeFacts(
            shape=self._volume.domain.shape,
            num_channels=1,
            dtype=np.dtype(np.uint8),
            start=given.voxel_offset or self._volume.domain.start,
            voxel_size=given.voxel_size or self._volume.voxel_size,
            chunk_shape=CHUNK,
        )

    def store(self, num_threads: int | None) -> Any:
        """Return the volume as (c, z, y, x) at its absolute coordinates."""
        return virtual_store(self._fetch, self.facts, num_threads, CHUNK)

    def recipe(self) -> Recipe:
        """Return the URL, which says it all."""
        return {"url": self.location, "given": self._given}

    def close(self) -> None:
        """Nothing is open."""

    def _fetch(self, box: Box) -> npt.NDArray[Any]:
        """Return (1, z, y, x) of a box counted from the first voxel."""
        return self._volume.image(box.translate(self._volume.domain.start))[None]


def reopen_computed(recipe: Recipe) -> ComputedSource:
    """Return the volume that a recipe describes."""
    return ComputedSource(recipe["url"], recipe["given"])
