"""What was measured of each variant, and which of them is the one to take.

Pure arithmetic. Knows no networks and no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpichunk.bench.figures import Spread
from mpichunk.tune.variants import MOST_PATCHES, Variant

GAIN = 1.03
"""A variant must be faster by this factor to be preferred to a plainer one."""

HEADROOM = 0.1
"""Share of the memory that is left free."""

Outputs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two activated outputs, as shares of the range of values of the exact one."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant, measured or refused."""

    variant: Variant
    refused: str = ""
    """Why it was not measured; empty if it was."""

    is_tried: bool = True
    """False if there was no time for it, which says nothing about it."""

    seconds: Spread | None = None
    """Of one patch."""

    speedup: Spread | None = None
    """Patches per second, in multiples of the baseline measured in turns with it."""

    difference: Difference | None = None
    """From the baseline."""

    nbytes: int | None = None
    """Memory of a rank, where the network computes; None where it could not be measured."""

    def is_exact_enough(self, tolerance: float) -> bool:
        """Return whether its values are those of the baseline, as far as is asked for."""
        return self.difference is not None and self.difference.largest <= tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """How many patches fit into the memory at a time, up to the most that is tried."""

    num_patches: int
    is_run: bool
    """Whether so many were run; else it is an extrapolation."""


def difference(found: Outputs, expected: Outputs) -> Difference:
    """Return how far outputs are apart; inf where there is NaN or inf."""
    scale = max(float(np.ptp(expected)), float(np.finfo(np.float32).tiny))
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Difference(largest=float("inf"), mean=float("inf"))
    apart = np.abs(found - expected, dtype=np.float64)
    return Difference(largest=float(apart.max()) / scale, mean=float(apart.mean()) / scale)


def is_better(row: Row, best: Row, tolerance: float) -> bool:
    """Return whether a variant should take the place of the best so far."""
    if row.speedup is None or best.speedup is None or not row.is_exact_enough(tolerance):
        return False
    return row.speedup.median >= GAIN * best.speedup.median


def verdict(row: Row, best: Row, tolerance: float) -> str:
    """Return in a few words what speaks for or against a variant."""
    if row.refused:
        return f"refused: {row.refused}" if row.is_tried else f"not tried: {row.refused}"
    assert row.speedup is not None and row.difference is not None and best.speedup is not None
    if row is best:
        return "the best"
    if not np.isfinite(row.difference.largest):
        return "refused: its values hold NaN or inf"
    if not row.is_exact_enough(tolerance):
        return f"refused: differs by {row.difference.largest:.1e}, {tolerance:g} is allowed"
    share = row.speedup.median / best.speedup.median
    if share > 1:
        return f"faster by {share - 1:.1%} only, which is too little to count"
    if share > 1 / GAIN:
        return "as fast as the best"
    return f"slower than the best by {1 / share:.2f}"


def largest_batch(
    rows: Sequence[Row], available: int | None, is_fitting: Callable[[int], bool | None]
) -> Largest | None:
    """Return how many patches fit: extrapolated, then run, and fewer of them until they do.

    None where fewer than two sizes of one variant were measured.

    Args:
        rows: one variant with several batch sizes.
        available: memory that a rank may take, bytes.
        is_fitting: runs so many patches and tells whether they fit; None if it could not.
    """
    extrapolated = extrapolated_batch(rows, available)
    if extrapolated is None or available is None:
        return None
    size = min(extrapolated, MOST_PATCHES)
    known = max((r.variant.batch_size for r in rows if _fits(r, available)), default=0)
    while size > known:
        fits = is_fitting(size)
        if fits is None:
            return Largest(num_patches=size, is_run=False)
        if fits:
            break
        size = known + (size - known) // 2
    # None fits with so much to spare, or so it seems.
    most = max(size, known)
    return Largest(num_patches=most, is_run=True) if most else None


def extrapolated_batch(rows: Sequence[Row], available: int | None) -> int | None:
    """Return how many patches fit if the memory grows as it did between two batch sizes.

    None where fewer than two sizes of one variant were measured.
    """
    known = sorted({(r.variant.batch_size, r.nbytes) for r in rows if r.nbytes is not None})
    if len(known) < 2 or available is None:
        return None
    (few, few_nbytes), (many, many_nbytes) = known[0], known[-1]
    if many == few or many_nbytes <= few_nbytes:
        return None
    each = (many_nbytes - few_nbytes) / (many - few)
    room = (1 - HEADROOM) * available - many_nbytes
    return max(0, many + int(room // each))


def _fits(row: Row, available: int) -> bool:
    """Return whether a batch was run, and left free what must be."""
    return row.nbytes is not None and row.nbytes <= (1 - HEADROOM) * available
