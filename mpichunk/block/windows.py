"""The weights of each output patch of a block, as shares of all the weight that a voxel gets.

The lattice of a block is known, and so is the sum of weights at each voxel: shares add up to one,
and what is blended needs no division. Knows no patches' values, and no arrays but an engine's.
"""

from mpichunk.backends.engine import Arrays, DeviceArray, Vectors
from mpichunk.geometry.blending import shares
from mpichunk.geometry.box import Box
from mpichunk.plan.plan import Block


class Windows:
    """Weights by patch, made when they are asked for.

    Args:
        arrays: The engine's.
        block: Whose patches they are.
        vectors: Weights of an output patch along z, y and x.
    """

    def __init__(self, arrays: Arrays, block: Block, vectors: Vectors) -> None:
        self._arrays = arrays
        self._by_start: list[dict[int, DeviceArray]] = []
        for starts, weights in zip(block.starts, vectors, strict=True):
            # All patches that are not near the ends have the same.
            once: dict[bytes, DeviceArray] = {}
            by_start = {}
            for start, share in zip(starts, shares(starts, weights), strict=True):
                key = share.tobytes()
                if key not in once:
                    once[key] = arrays.vector(share)
                by_start[start] = once[key]
            self._by_start.append(by_start)
        self._made_of: list[DeviceArray] = []
        self._window: DeviceArray = None

    def of(self, box: Box) -> DeviceArray:
        """Return the weights of an output patch, which hold until the next call."""
        vectors = [by[start] for by, start in zip(self._by_start, box.start, strict=True)]
        is_same = [id(vector) for vector in vectors] == [id(vector) for vector in self._made_of]
        if not is_same:
            self._made_of = vectors
            z, y, x = vectors
            self._window = self._arrays.window(z, y, x)
        return self._window
