"""The plan: every block of a run and every patch of a block, lazily.

Pure arithmetic over config and volume extents; knows no arrays, no files, no ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from mpichunk.config.schema import Config
from mpichunk.config.types import Stitch
from mpichunk.errors import UserError
from mpichunk.geometry.box import Box, Grid, Triple, add, multiply, subtract, triple
from mpichunk.geometry.lattice import AxisLattice, axis_lattice

Starts = tuple[int, ...]

MOST_BLOCKS = 10**9
"""A run keeps a byte per block in memory, and a line in its journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One unit of scheduling and writing.

    Along one axis, with two output patches (`crop` shown for the network's own border):

        input_box    [..crop..|                          |..crop..]
        output_box            [--- Q ---]
                                    [------ Q ------]
        core                     [=============]                     what is written
    """

    index: int
    """Place in the plan."""

    core: Box
    """What the block writes, clipped to the ROI: whole write units, but at the ROI's faces."""

    starts: tuple[Starts, Starts, Starts]
    """Starts of the output patches that touch the core, per axis; the block runs their product."""

    patch_shape: Triple
    """Q, shape of an output patch."""

    crop: Triple
    """Border between an output patch and what the network sees."""

    @property
    def num_patches(self) -> int:
        """Output patches that touch the core."""
        return prod(len(starts) for starts in self.starts)

    @property
    def output_box(self) -> Box:
        """The bounding box of all output patches; may reach past the volume."""
        first = triple([starts[0] for starts in self.starts])
        last = triple([starts[-1] for starts in self.starts])
        return Box(start=first, stop=add(last, self.patch_shape))

    @property
    def input_box(self) -> Box:
        """What the network sees of all patches; may reach past the volume, where it is padding."""
        return self.output_box.grow(self.crop)

    def patches(self) -> Iterator[Box]:
        """Yield the output boxes in lattice order, z slowest."""
        for start in product(*self.starts):
            yield Box.from_shape(start, self.patch_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All blocks of a run: `len(plan)` and `plan[i]` cost O(1) of time and memory."""

    volume: Box
    """The input's domain."""

    roi: Box
    """What is computed and written."""

    output_domain: Box
    """What the output volume covers; its start anchors the block grid."""

    block_shape: Triple
    """Shape of a whole block."""

    output_patch_shape: Triple
    """Q, what is left of a patch once `crop` is cut off."""

    crop: Triple
    """Border of a patch that is cut off each side."""

    overlap: Triple
    """Overlap of neighbouring output patches."""

    stitch: Stitch
    """How blocks are joined."""

    margin: Triple
    """What is computed around a core and cropped away (`crop` only)."""

    @classmethod
    def from_config(cls, config: Config, volume: Box) -> "Plan":
        """Return the plan of `config` over an input with this domain.

        Raises:
            UserError: the ROI is empty or not inside the volume, or the volume is empty.
        """
        roi = volume
        if config.roi is not None:
            roi = Box(start=config.roi.start, stop=config.roi.stop)
            if roi.is_empty or not volume.contains(roi):
                raise UserError(
                    f"{roi} is {'empty' if roi.is_empty else 'not inside the input'}; the input "
                    f"covers {volume}, stop excluded: leave roi out, or give a start and a stop "
                    "within that",
                    key="roi",
                )
        if volume.is_empty:
            raise UserError(f"the input is empty: it covers {volume}", key="input.volume")
        plan = cls(
            volume=volume,
            roi=roi,
            output_domain=volume if config.output.domain == "input" else roi,
            block_shape=config.block.shape,
            output_patch_shape=config.output_patch_shape,
            crop=config.patch.crop,
            overlap=config.overlap,
            stitch=config.block.stitch,
            margin=config.margin,
        )
        num_blocks = prod(plan.grid.shape)
        if num_blocks > MOST_BLOCKS:
            raise UserError(
                f"{config.block.shape} cuts {roi} into {num_blocks:.1e} blocks; expected at most "
                f"{MOST_BLOCKS:.0e}: choose larger blocks",
                key="block.shape",
            )
        return plan

    @property
    def stride(self) -> Triple:
        """Distance of neighbouring output patches."""
        return subtract(self.output_patch_shape, self.overlap)

    @property
    def patch_shape(self) -> Triple:
        """What the network sees."""
        return add(self.output_patch_shape, multiply(self.crop, (2, 2, 2)))

    @property
    def grid(self) -> Grid:
        """The cores of all blocks."""
        return Grid(origin=self.output_domain.start, step=self.block_shape, bounds=self.roi)

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, index: int) -> Block:
        core = self.grid[index]
        return Block(
            index=index,
            core=core,
            starts=(
                self._axis_starts(0, core),
                self._axis_starts(1, core),
                self._axis_starts(2, core),
            ),
            patch_shape=self.output_patch_shape,
            crop=self.crop,
        )

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def _axis_starts(self, axis: int, core: Box) -> Starts:
        """Return the starts on one axis of the output patches that touch the core."""
        lattice = self.axis_lattice(axis, core.start[axis])
        return tuple(lattice[i] for i in lattice.touching(core.start[axis], core.stop[axis]))

    def axis_lattice(self, axis: int, position: int) -> AxisLattice:
        """Return the lattice that serves the block whose core holds `position` on this axis.

        `seamless` has one lattice, that of the volume. With `crop` each block has its own, over its
        whole core clipped to the volume only, grown by the margin and clipped to the volume again:
        the ROI decides which of its patches run, never where they are.
        """
        low, high = self.volume.start[axis], self.volume.stop[axis]
        start, stop = low, high
        if self.stitch == "crop":
            origin, step = self.output_domain.start[axis], self.block_shape[axis]
            corner = origin + (position - origin) // step * step
            margin = self.margin[axis]
            start = max(low, max(low, corner) - margin)
            stop = min(high, min(high, corner + step) + margin)
        return axis_lattice(
            start, stop, low=low, patch=self.output_patch_shape[axis], stride=self.stride[axis]
        )
