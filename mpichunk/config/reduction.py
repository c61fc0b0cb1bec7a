"""What a config has made of blended channels: gate, choice of channels, labels or values.

A value only; knows no arrays and no networks. `backends.reduction` does what it says.

    blended --gate--> channels --argmax, vote, threshold--> labels, as they are
                         `-----> values, quantised
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpichunk.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What is made of the network's channels once they are blended.

    Zero in all channels gives zero: what is masked, gated or blank stays so.
    """

    channels: tuple[int, ...]
    """Channels of the network that are written or compared, in order."""

    gate: tuple[int, float] | None = None
    """A channel, and the value below which it must be for the others to count."""

    kind: Literal["values", "argmax", "vote", "threshold"] = "values"
    """What is written of them."""

    threshold: float = 0.0
    """What values must be above, for `threshold`."""

    @classmethod
    def of(cls, config: Config) -> "Reduction":
        """Return what a config asks for."""
        output = config.output
        if output.threshold is not None:
            kind: Literal["values", "argmax", "vote", "threshold"] = "threshold"
        else:
            kind = output.reduce or "values"
        return cls(
            channels=config.used_channels,
            gate=None if output.gate is None else (output.gate.channel, output.gate.below),
            kind=kind,
            threshold=output.threshold or 0.0,
        )

    @property
    def num_channels(self) -> int:
        """Channels that are written."""
        return 1 if self.kind in ("argmax", "vote") else len(self.channels)

    def keeps_sums(self, num_channels: int, dtype: np.dtype[Any]) -> bool:
        """Return whether what is written is what was blended, as it is."""
        every = self.channels == tuple(range(num_channels))
        return self.kind == "values" and every and dtype == np.float32
