"""From blended channels to what is stored: gate, choice of channels, labels or values.

Decides the order; an engine's arrays do the work. Knows no blocks and no networks.

    blended --gate--> channels --argmax, vote, threshold--> labels, as they are
                         `-----> values, quantised
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpichunk.backends.engine import Arrays, DeviceArray
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

    def shut(self, arrays: Arrays, total_czyx: DeviceArray) -> None:
        """Set to zero, in place, what the gate shuts out."""
        if self.gate is not None:
            channel, below = self.gate
            gated = [other for other in self.channels if other != channel]
            arrays.gate(total_czyx, channel, below, gated)

    def store(self, arrays: Arrays, total_czyx: DeviceArray, out_czyx: DeviceArray) -> None:
        """Write a blended and gated part into that of the output; spoils `total_czyx`."""
        if self.kind in ("argmax", "vote"):
            is_vote = self.kind == "vote"
            arrays.best_channel(total_czyx, self.channels, out_czyx[0], is_vote=is_vote)
            return
        for source, target in runs(self.channels):
            total, out = total_czyx[source], out_czyx[target]
            if self.kind == "threshold":
                arrays.above(total, self.threshold, out)
            else:
                arrays.quantise(total, out)


def runs(channels: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield channels that follow one another, and their places among all: one kernel for several.

    (0, 1, 2, 5) gives 0:3 with 0:3, and 5:6 with 3:4.
    """
    first = 0
    for stop in range(1, len(channels) + 1):
        if stop == len(channels) or channels[stop] != channels[stop - 1] + 1:
            yield slice(channels[first], channels[stop - 1] + 1), slice(first, stop)
            first = stop
