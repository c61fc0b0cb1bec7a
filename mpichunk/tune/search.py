"""The order of the trials: each kind of variant on top of the best so far, then batch sizes.

Knows nothing of how a variant is measured: that is a function, which never raises.

    baseline -> precisions x layout, backends -> openvino without AVX-512
        -> torch's best + folding, compiling, graphs -> batch sizes
"""

from collections.abc import Callable
from dataclasses import replace

from mpichunk.config.schema import Config
from mpichunk.tune.figures import Row, is_better
from mpichunk.tune.variants import (
    Facts,
    Variant,
    baseline,
    batch_sizes,
    first_round,
    more_kernels,
    narrower,
)

PATIENCE = 2
"""Larger batches in a row that are no faster, before the search for a better one ends."""


class Search:
    """Tries variants one after the other, and remembers all of them."""

    def __init__(
        self, config: Config, facts: Facts, measure: Callable[[Variant], Row], tolerance: float
    ) -> None:
        self._config = config
        self._facts = facts
        self._measure = measure
        self._tolerance = tolerance
        self.rows: list[Row] = []
        """All that was tried, in order; the first is the baseline."""

    def run(self) -> Row:
        """Return the best, which is the baseline itself if nothing is faster."""
        best = start = self._try(baseline(self._config))
        for variant in first_round(self._config, self._facts):
            best = self._better(best, self._try(variant))
        for variant in self._narrower():
            best = self._better(best, self._try(variant))
        # Also where another backend leads so far: with kernels, this one may overtake it.
        return self._best_batch(self._better(best, self._with_kernels(start)))

    @property
    def best(self) -> Row:
        """The best so far, of at least one row."""
        best, *others = self.rows
        for row in others:
            best = self._better(best, row)
        return best

    def _narrower(self) -> list[Variant]:
        """Return what was measured, with narrower instructions, unless that was tried."""
        tried = [row.variant for row in self.rows]
        measured = [row.variant for row in self.rows if not row.refused]
        return [v for v in narrower(measured, self._facts) if v not in tried]

    def _with_kernels(self, best: Row) -> Row:
        """Add kernels to the best variant of the baseline's backend, each that helps."""
        for row in self.rows:
            if row.variant.backend == best.variant.backend:
                best = self._better(best, row)
        for kernel in more_kernels(best.variant, self._facts):
            best = self._better(best, self._try(best.variant.plus(kernel)))
        return best

    def _best_batch(self, best: Row) -> Row:
        """Try smaller and larger batches of the best variant."""
        variant = best.variant
        smaller, larger = batch_sizes(variant.batch_size)
        for sizes in (larger, smaller):
            patience = PATIENCE
            for size in sizes:
                row = self._try(replace(variant, batch_size=size))
                before, best = best, self._better(best, row)
                patience -= best is before
                if row.refused or patience == 0:
                    break
        return best

    def _try(self, variant: Variant) -> Row:
        row = self._measure(variant)
        self.rows.append(row)
        return row

    def _better(self, best: Row, row: Row) -> Row:
        return row if is_better(row, best, self._tolerance) else best
