"""How well a score tells two classes apart, computed in the plainest way."""

from typing import Any

import numpy as np
import numpy.typing as npt


def auc(score: npt.NDArray[Any], truth: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve.

    It is the probability that a voxel where `truth` holds scores higher than one where it does not;
    a tie counts half (Hanley and McNeil 1982).
    """
    values, rank = np.unique(score, return_inverse=True)
    rank = rank.reshape(-1)
    positives = np.bincount(rank[truth.ravel()], minlength=len(values)).astype(np.float64)
    negatives = np.bincount(rank[~truth.ravel()], minlength=len(values)).astype(np.float64)
    negatives_below = np.cumsum(negatives) - negatives
    pairs_won = (positives * (negatives_below + negatives / 2)).sum()
    return float(pairs_won / (positives.sum() * negatives.sum()))
