"""Where output patches start along one axis.

Pure integer arithmetic; knows one axis at a time and no arrays.
"""

from dataclasses import dataclass

from mpichunk.geometry.box import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLattice:
    """Starts of output patches that cover an interval: a, a+s, a+2s, ..., and the last at b-Q.

        a                                  b        Q = patch, s = stride
        [--- Q ---]
             [--- Q ---]
             s    [--- Q ---]
                          [--- Q ---]               the last one is shifted back to b-Q

    Lazy: `len`, `[i]` and `touching` cost O(1).
    """

    first: int
    """Start of patch 0."""

    last: int
    """Start of the last patch; equals `first` when there is one."""

    patch: int
    """Q, voxels of the output patch."""

    stride: int
    """Distance of neighbouring starts, but for the last."""

    def __len__(self) -> int:
        return ceil_div(self.last - self.first, self.stride) + 1

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"patch {index} of a lattice of {len(self)}")
        return min(self.first + index * self.stride, self.last)

    def touching(self, start: int, stop: int) -> range:
        """Return the indices of the patches that contain a voxel of [start, stop), start < stop."""
        num = len(self)
        # Of the regular starts, those with start - Q < a + k*s < stop.
        low = max(0, (start - self.patch - self.first) // self.stride + 1)
        high = min(num - 1, ceil_div(stop - self.first, self.stride))
        touches_last = self.last < stop and self.last + self.patch > start
        if touches_last:
            # The last is nearer than a stride: it may touch although its regular place does not.
            return range(min(low, num - 1), num)
        return range(low, max(low, high))


def axis_lattice(start: int, stop: int, *, low: int, patch: int, stride: int) -> AxisLattice:
    """Return the lattice of the interval [start, stop) inside a volume that begins at `low`.

    An interval shorter than the patch is grown downwards, not below `low`; what one patch at `low`
    holds past the interval is other voxels of the volume, or padding when the volume is shorter.
    """
    first = max(low, min(start, stop - patch))
    return AxisLattice(first=first, last=max(first, stop - patch), patch=patch, stride=stride)
