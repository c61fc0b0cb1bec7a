"""Counters as ranks add them up."""

import numpy as np

from mpichunk.schedule.progress import COUNTERS, totals


def summed(**counters):
    """Return sums; those that are not given are 0."""
    return totals(np.array([float(counters.get(name, 0)) for name in COUNTERS]))
