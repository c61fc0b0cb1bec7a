"""What was measured of each variant, and which of them is the one to take.

Pure arithmetic. Knows no networks and no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpichunk.bench.figures import Spread
from mpichunk.tune.variants import Variant

GAIN = 1.03
"""A variant must be faster by this factor to be preferred to a plainer one."""

HEADROOM = 0.1
"""Share of the memory that is left free."""

Outputs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two outputs, as shares of the range of values of the exact one."""

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


def largest_batch(rows: Sequence[Row], available: int | None) -> int | None:
    """Return how many patches fit, the memory growing as it did between two batch sizes.

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
