"""How far the values of one network, or of one device, are from those of another.

Knows arrays only, neither networks nor how far is too far.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def relative_difference(found: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """Return the largest |difference| as a share of the largest |reference|; NaN if one holds NaN.

    Both have the same shape.
    """
    scale = max(float(np.abs(reference).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(found - reference).max(initial=0)) / scale
