"""From blended channels to what is stored, part by part, on the device that holds them.

Decides the order; an engine's arrays do the work. Knows no blocks and no networks.
"""

from collections.abc import Iterator, Sequence

from mpichunk.backends.engine import Arrays, DeviceArray
from mpichunk.config.reduction import Reduction


def shut(reduction: Reduction, arrays: Arrays, total_czyx: DeviceArray) -> None:
    """Set to zero, in place, what the gate shuts out."""
    if reduction.gate is not None:
        channel, below = reduction.gate
        gated = [other for other in reduction.channels if other != channel]
        arrays.gate(total_czyx, channel, below, gated)


def store(
    reduction: Reduction, arrays: Arrays, total_czyx: DeviceArray, out_czyx: DeviceArray
) -> None:
    """Write a blended and gated part into that of the output; spoils `total_czyx`."""
    if reduction.kind in ("argmax", "vote"):
        is_vote = reduction.kind == "vote"
        arrays.best_channel(total_czyx, reduction.channels, out_czyx[0], is_vote=is_vote)
        return
    for source, target in runs(reduction.channels):
        total, out = total_czyx[source], out_czyx[target]
        if reduction.kind == "threshold":
            arrays.above(total, reduction.threshold, out)
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
