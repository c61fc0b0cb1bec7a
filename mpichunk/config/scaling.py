"""How raw input becomes what a network sees, and how steps with fixed numbers make one of it.

Pure arithmetic: raw -> clip -> subtract -> divide, as in `input.normalize`. Knows no arrays, and no
description of a network.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

_MOST = 3.4028234663852886e38
"""The largest float32, for a clip that has no bound on one side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The value (clip(raw) - subtract) / divide; raw values themselves by default."""

    clip: tuple[float, float] | None = None
    """Raw values are clipped to this range first."""

    subtract: float = 0.0
    """Taken off the raw value."""

    divide: float = 1.0
    """What the rest is divided by, above zero (a true float32 division)."""

    def normalised(self, mean: float, deviation: float) -> "Scaling":
        """Return (value - mean) / deviation.

        Raises:
            ValueError: the deviation is not above zero.
        """
        if not (deviation > 0 and math.isfinite(mean) and math.isfinite(deviation)):
            raise ValueError(f"a division by {deviation:g}, which must be above 0")
        return replace(
            self,
            subtract=self.subtract + mean * self.divide,
            divide=self.divide * deviation,
        )

    def mapped(self, gain: float, offset: float) -> "Scaling":
        """Return value * gain + offset.

        Raises:
            ValueError: the gain is not above zero.
        """
        if not (gain > 0 and math.isfinite(gain) and math.isfinite(offset)):
            raise ValueError(f"a gain of {gain:g}, which must be above 0")
        divide = self.divide / gain
        return replace(self, subtract=self.subtract - offset * divide, divide=divide)

    def clipped(self, low: float | None, high: float | None) -> "Scaling":
        """Return the value between two bounds, None for none.

        Raises:
            ValueError: only one value, or none, is left between them.
        """
        lowest, highest = self.clip or (-_MOST, _MOST)

        def raw(value: float) -> float:
            return min(max(value * self.divide + self.subtract, lowest), highest)

        after = lowest if low is None else raw(low), highest if high is None else raw(high)
        if not after[0] < after[1]:
            raise ValueError(f"a clip that leaves only the value {after[0]:g}")
        return replace(self, clip=after)

    def settings(self) -> dict[str, Any]:
        """Return `input.normalize`."""
        clip = {} if self.clip is None else {"clip": list(self.clip)}
        return {"subtract": self.subtract, "divide": self.divide, **clip}
