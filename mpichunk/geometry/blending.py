"""Blending windows and their shares: three vectors each, never a volume.

A window is a product over the axes, so the sum of weights at a voxel is a product of three per-axis
sums, and a share of it one of per-axis shares. numpy only; knows no networks and no volumes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

FLOOR = 1e-6
"""Weights are never below this share of the maximum: the first voxel of a volume has one patch."""


def window(name: str, length: int) -> Vector:
    """Return the weights of one axis of an output patch, strictly positive, maximum 1.

    Args:
        name: `bump`, `gaussian`, `hann` or `uniform`.
        length: Q, voxels of the output patch on this axis.

    Returns:
        (Q,) float32, divided by the maximum, then floored at 1e-6; the formulas stand below.

    Raises:
        KeyError: the name is none of these.
    """
    k = np.arange(length, dtype=np.float64)
    weights = _WINDOWS[name](k, length)
    floored: npt.NDArray[np.float64] = np.maximum(weights / weights.max(), FLOOR)
    return floored.astype(np.float32)


def shares(starts: Sequence[int], weights: Vector) -> list[Vector]:
    """Return, for each output patch of one axis, its weights over the sum of all weights there.

    Args:
        starts: first voxel of each output patch on this axis, in order.
        weights: (Q,) window of one output patch.

    Returns:
        (Q,) float32 for each start; at every voxel they add up to one.
    """
    length = len(weights)
    total = np.zeros(starts[-1] - starts[0] + length, dtype=np.float64)
    for start in starts:
        total[start - starts[0] :][:length] += weights
    return [(weights / total[start - starts[0] :][:length]).astype(np.float32) for start in starts]


def _bump(k: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """chunkflow's bump function (chunkflow/chunk/image/convnet/patch/patch_mask.py)."""
    u = 2 * (k + 1) / (length + 1) - 1
    return np.exp(-1 / (1 - u**2))


def _gaussian(k: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Gaussian with a standard deviation of Q/8, as nnU-Net's and MONAI's importance maps."""
    return np.exp(-(((k - (length - 1) / 2) / (length / 8)) ** 2) / 2)


def _hann(k: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Hann window sampled at voxel centres, so that no weight is zero."""
    return np.sin(np.pi * (k + 0.5) / length) ** 2


def _uniform(k: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Plain mean of the patches."""
    return np.ones_like(k)


_WINDOWS: dict[str, Callable[[npt.NDArray[np.float64], int], npt.NDArray[np.float64]]] = {
    "bump": _bump,
    "gaussian": _gaussian,
    "hann": _hann,
    "uniform": _uniform,
}
