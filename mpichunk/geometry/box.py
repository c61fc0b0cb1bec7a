"""Half-open boxes and lazy grids of them.

Pure integer arithmetic in voxels, zyx. Knows no patches, no blocks, no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

Triple = tuple[int, int, int]
Slices = tuple[slice, slice, slice]


def triple(values: "tuple[int, ...] | list[int]") -> Triple:
    """Return three ints as a tuple that the type checker knows to have three."""
    z, y, x = (int(v) for v in values)
    return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The voxels p with start <= p < stop on every axis.

    An axis with stop <= start makes the box empty; empty boxes are allowed, since intersections
    produce them.
    """

    start: Triple
    """First voxel, zyx."""

    stop: Triple
    """One past the last voxel, zyx."""

    @classmethod
    def from_shape(cls, start: Triple, shape: Triple) -> "Box":
        """Return the box of `shape` voxels that begins at `start`."""
        return cls(start=start, stop=add(start, shape))

    @property
    def shape(self) -> Triple:
        """Voxels per axis, never negative."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return max(0, d - a), max(0, e - b), max(0, f - c)

    @property
    def num_voxels(self) -> int:
        """Voxels in the box."""
        return prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no voxel."""
        return self.num_voxels == 0

    def intersect(self, other: "Box") -> "Box":
        """Return the voxels that are in both boxes."""
        (a, b, c), (d, e, f) = self.start, self.stop
        (i, j, k), (p, q, r) = other.start, other.stop
        return Box(
            start=(max(a, i), max(b, j), max(c, k)),
            stop=(min(d, p), min(e, q), min(f, r)),
        )

    def contains(self, other: "Box") -> bool:
        """Return whether every voxel of `other` is in this box."""
        return other.is_empty or self.intersect(other) == other

    def grow(self, width: Triple) -> "Box":
        """Return the box with `width` voxels more on both sides of each axis."""
        return Box(start=subtract(self.start, width), stop=add(self.stop, width))

    def translate(self, offset: Triple) -> "Box":
        """Return the box moved by `offset`."""
        return Box(start=add(self.start, offset), stop=add(self.stop, offset))

    def slices(self, origin: Triple = (0, 0, 0)) -> Slices:
        """Return the index of this box in a (z, y, x) array whose first voxel is `origin`."""
        (a, b, c), (d, e, f) = subtract(self.start, origin), subtract(self.stop, origin)
        return slice(a, d), slice(b, e), slice(c, f)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.start))}) to [{', '.join(map(str, self.stop))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells of a regular grid that touch a box, each clipped to it, in C order (z slowest).

    Lazy: `len` and `[i]` cost O(1), so that a petabyte costs nothing.

        origin        origin+step   origin+2*step
        |             |             |             |
             [........ bounds ..........]              -> cells [..), [....), [..)
    """

    origin: Triple
    """Where the grid is anchored; any cell begins at origin + k * step."""

    step: Triple
    """Shape of a whole cell."""

    bounds: Box
    """Cells are clipped to this box; those that do not touch it do not exist."""

    @property
    def first(self) -> Triple:
        """Grid coordinates, zyx, of cell 0."""
        (a, b, c), (i, j, k), (p, q, r) = self.bounds.start, self.origin, self.step
        return (a - i) // p, (b - j) // q, (c - k) // r

    @property
    def shape(self) -> Triple:
        """Cells per axis."""
        if self.bounds.is_empty:
            return 0, 0, 0
        (a, b, c), (i, j, k), (p, q, r) = self.bounds.stop, self.origin, self.step
        last = ceil_div(a - i, p), ceil_div(b - j, q), ceil_div(c - k, r)
        return subtract(last, self.first)

    def __len__(self) -> int:
        return prod(self.shape)

    def __getitem__(self, index: int) -> Box:
        # Written out: the coordinator asks for the core of every block that is done.
        nz, ny, nx = self.shape
        if not 0 <= index < nz * ny * nx:
            raise IndexError(f"cell {index} of a grid of {len(self)}")
        (i, j, k), (p, q, r) = self.first, self.step
        z = self.origin[0] + (i + index // (ny * nx)) * p
        y = self.origin[1] + (j + index // nx % ny) * q
        x = self.origin[2] + (k + index % nx) * r
        (a, b, c), (d, e, f) = self.bounds.start, self.bounds.stop
        return Box(
            start=(max(z, a), max(y, b), max(x, c)),
            stop=(min(z + p, d), min(y + q, e), min(x + r, f)),
        )

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))


def add(a: Triple, b: Triple) -> Triple:
    """Return a + b per axis."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def subtract(a: Triple, b: Triple) -> Triple:
    """Return a - b per axis."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def multiply(a: Triple, b: Triple) -> Triple:
    """Return a * b per axis."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, exactly, for any sign of a."""
    return -(-a // b)
