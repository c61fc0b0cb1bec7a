"""Which output voxels a coarser mask wants.

Pure arithmetic over boxes and numpy arrays; knows no files.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpichunk.errors import UserError
from mpichunk.geometry.box import Box, Triple, ceil_div, triple
from mpichunk.geometry.volumeinfo import VolumeInfo

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskGrid:
    """How mask voxels lie over output voxels: m = floor(p * numerator / denominator).

    Coordinates are absolute on both sides, so a mask may cover another region than the output.
    """

    domain: Box
    """Voxels that the mask has; outside it the mask counts as zero."""

    numerator: Triple
    """Mask voxels per output voxel where the mask is finer, else 1."""

    denominator: Triple
    """Output voxels per mask voxel where the mask is coarser, else 1."""

    invert: bool
    """Whether the zero voxels are wanted instead."""

    @classmethod
    def between(cls, volume: VolumeInfo, mask: VolumeInfo, *, invert: bool) -> "MaskGrid":
        """Return how `mask` lies over the voxels of `volume`.

        Raises:
            UserError: the mask has several channels, a voxel size is missing on one side, or on
                both though the mask does not cover the volume, or one size is not a whole multiple
                of the other.
        """
        if mask.num_channels != 1:
            raise UserError(
                f"{mask.location} has {mask.num_channels} channels; a mask has one",
                key="mask.volume",
            )
        if (volume.voxel_size is None) != (mask.voxel_size is None):
            which = "the mask" if mask.voxel_size is None else "the input"
            section = "mask" if mask.voxel_size is None else "input"
            raise UserError(
                f"the voxel size of {which} is not known, so the two cannot be aligned; set "
                f"{section}.voxel_size: [z, y, x] in nm",
                key=f"{section}.volume",
            )
        if volume.voxel_size is None and not mask.domain.contains(volume.domain):
            raise UserError(
                f"the mask covers {mask.domain} and the input {volume.domain}, and neither has a "
                "voxel size; set input.voxel_size and mask.voxel_size, [z, y, x] in nm (the same "
                "for both if the mask is as fine as the input)",
                key="mask.volume",
            )
        size = volume.voxel_size or (1.0, 1.0, 1.0)
        mask_size = mask.voxel_size or (1.0, 1.0, 1.0)
        ratios = [_whole_ratio(a, b) for a, b in zip(size, mask_size, strict=True)]
        if None in ratios:
            raise UserError(
                f"voxel size {mask_size} nm is not a whole multiple or fraction of the output's "
                f"{size} nm; choose a mip of the mask that is",
                key="mask.volume",
            )
        fractions = [ratio for ratio in ratios if ratio is not None]
        return cls(
            domain=mask.domain,
            numerator=triple([n for n, _ in fractions]),
            denominator=triple([d for _, d in fractions]),
            invert=invert,
        )

    def source_box(self, box: Box) -> Box:
        """Return the mask voxels under these output voxels, clipped to the mask; may be empty."""
        covering = Box(
            start=triple([self._floor(axis, box.start[axis]) for axis in range(3)]),
            stop=triple([self._floor(axis, box.stop[axis] - 1) + 1 for axis in range(3)]),
        )
        return covering.intersect(self.domain)

    def output_box(self) -> Box:
        """Return the output voxels whose mask voxel lies in the mask's domain."""
        corners = [
            [
                ceil_div(corner[axis] * self.denominator[axis], self.numerator[axis])
                for axis in range(3)
            ]
            for corner in (self.domain.start, self.domain.stop)
        ]
        return Box(start=triple(corners[0]), stop=triple(corners[1]))

    def expand(self, mask_zyx: npt.NDArray[np.generic], inside: Box, box: Box) -> BoolArray:
        """Return whether each output voxel of `box` is wanted.

        Args:
            mask_zyx: the mask over `inside`.
            inside: what `source_box(box)` returned.
            box: output voxels.

        Returns:
            (z, y, x) bool of the shape of `box`.
        """
        wanted = np.zeros(box.shape, dtype=np.bool_)
        axes = [self._axis_index(axis, inside, box) for axis in range(3)]
        index, within = zip(*axes, strict=True)
        values = (mask_zyx != 0)[np.ix_(*index)]
        wanted[np.ix_(*within)] = values
        return ~wanted if self.invert else wanted

    def wants_any(self, mask_zyx: npt.NDArray[np.generic], inside: Box, box: Box) -> bool:
        """Return whether any output voxel of `box` is wanted, in time of the mask's voxels.

        Args as in `expand`.
        """
        if not self.invert:
            return bool(mask_zyx.any())
        return not (self.output_box().contains(box) and bool(mask_zyx.all()))

    def _axis_index(
        self, axis: int, inside: Box, box: Box
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return mask indices into `inside`, and the places in `box` that they belong to."""
        position = np.arange(box.start[axis], box.stop[axis], dtype=np.int64)
        source = position * self.numerator[axis] // self.denominator[axis]
        within = np.flatnonzero((source >= inside.start[axis]) & (source < inside.stop[axis]))
        return source[within] - inside.start[axis], within

    def _floor(self, axis: int, position: int) -> int:
        return position * self.numerator[axis] // self.denominator[axis]


def _whole_ratio(size: float, mask_size: float) -> tuple[int, int] | None:
    """Return size / mask_size as a fraction with 1 above or below, or None when it is none."""
    for ratio, make in (
        (mask_size / size, lambda n: (1, n)),
        (size / mask_size, lambda n: (n, 1)),
    ):
        whole = round(ratio)
        if whole >= 1 and abs(ratio - whole) < 1e-6 * whole:
            return make(whole)
    return None
