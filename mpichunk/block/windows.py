"""The weights of each output patch of a block, as shares of all the weight that a voxel gets.

The lattice of a block is known, and so is the sum of weights at each voxel: shares add up to one,
and what is blended needs no division. Knows no patches' values, and no arrays but an engine's.
"""

import numpy as np

from mpichunk.backends.engine import Arrays, DeviceArray, Vectors
from mpichunk.geometry.blending import shares
from mpichunk.geometry.box import Box, triple
from mpichunk.geometry.buffers import most_windows
from mpichunk.plan.plan import Block

_MOST_VECTORS = 64
"""Vectors that are kept: far more than the lattices of one plan have."""

_Key = tuple[bytes, bytes, bytes]
"""Bytes of the shares along z, y and x: patches that are not near the ends have the same."""


class Windows:
    """Weights by patch, made when they are first asked for and kept from block to block.

    Args:
        arrays: The engine's.
        vectors: Weights of an output patch along z, y and x.
    """

    def __init__(self, arrays: Arrays, vectors: Vectors) -> None:
        self._arrays = arrays
        self._host_vectors = vectors
        self._shape = triple([len(vector) for vector in vectors])
        self._num_kept = 1
        self._shares: tuple[dict[int, bytes], ...] = ()
        self.clear()

    def clear(self) -> None:
        """Forget all memory of the device."""
        self._vectors: dict[bytes, DeviceArray] = {}
        self._windows: dict[_Key, DeviceArray] = {}

    def begin(self, block: Block) -> None:
        """Let what comes next be patches of this block."""
        self._shares = tuple(
            {
                start: share.tobytes()
                for start, share in zip(starts, shares(starts, weights), strict=True)
            }
            for starts, weights in zip(block.starts, self._host_vectors, strict=True)
        )
        # On a host one is as soon made as read from memory that no cache holds.
        if not self._arrays.is_host:
            self._num_kept = most_windows(self._shape, block.num_patches)
        while len(self._windows) > self._num_kept:
            self._oldest()

    def of(self, box: Box) -> DeviceArray:
        """Return the weights of an output patch, which hold until the next call."""
        (z, y, x), (by_z, by_y, by_x) = box.start, self._shares
        key = by_z[z], by_y[y], by_x[x]
        # Put in last, so that the first is always the oldest.
        window = self._windows.pop(key, None)
        self._windows[key] = self._made(key) if window is None else window
        return self._windows[key]

    def _made(self, key: _Key) -> DeviceArray:
        """Return a window that is not there, in memory of the oldest where there are enough."""
        used = self._oldest() if len(self._windows) == self._num_kept else None
        z, y, x = (self._vector(share) for share in key)
        return self._arrays.window(z, y, x, used)

    def _oldest(self) -> DeviceArray:
        """Return the window that was not asked for the longest, and forget it."""
        return self._windows.pop(next(iter(self._windows)))

    def _vector(self, share: bytes) -> DeviceArray:
        """Return shares on the device; bringing them there takes pinned memory and a copy."""
        if share not in self._vectors:
            if len(self._vectors) == _MOST_VECTORS:
                self._vectors.clear()
            self._vectors[share] = self._arrays.vector(np.frombuffer(share, np.float32).copy())
        return self._vectors[share]
