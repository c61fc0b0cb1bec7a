"""Which blocks a mask leaves anything of, asked before they are leased.

Reads the mask alone; knows no ranks.
"""

import numpy as np

from mpichunk.geometry.box import Box
from mpichunk.geometry.masking import MaskGrid
from mpichunk.plan.plan import Plan
from mpichunk.volume import Reader


def masked_blocks(plan: Plan, grid: MaskGrid, mask: Reader, *, limit: int) -> int | None:
    """Count the blocks that the mask excludes, or return None for more than `limit` blocks."""
    if len(plan) > limit:
        return None
    return sum(not is_wanted(grid, mask, core) for core in plan.grid)


def is_wanted(grid: MaskGrid, mask: Reader, core: Box) -> bool:
    """Return whether the mask wants any voxel of a core."""
    inside = grid.source_box(core)
    values = np.zeros((1, *inside.shape)) if inside.is_empty else mask.read(inside).result()
    return grid.wants_any(values, inside, core)
