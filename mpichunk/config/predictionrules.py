"""What must hold between the channels of a network and what is made of them.

Pure functions of single values, as in `config.rules`. Knows no arrays and no networks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpichunk.config.rules import hint, rule
from mpichunk.geometry.box import Triple
from mpichunk.geometry.symmetry import STRAIGHT, partner, turns_of

_BEFORE: Sequence[Triple] = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
_Affinities = tuple[int, int, int] | Mapping[int, Triple] | None


def channel_offsets(affinities: _Affinities) -> dict[int, Triple]:
    """Return the offset of each affinity channel; three channels join to the voxel before."""
    if affinities is None:
        return {}
    if isinstance(affinities, Mapping):
        return dict(affinities)
    return dict(zip(affinities, _BEFORE, strict=True))


def written_channels(
    num_channels: int, channels: Sequence[int] | None, gate: Any
) -> tuple[int, ...]:
    """Return the channels that are written or compared: those named, or all but the gate's."""
    if channels is not None:
        return tuple(channels)
    shut = None if gate is None else gate.channel
    return tuple(channel for channel in range(num_channels) if channel != shut)


# Augmentation


@rule("model.augment", "patch.shape", "patch.crop")
def _rotated_patch_is_square(names: Sequence[str], shape: Triple, crop: Triple) -> str | None:
    if "rot90" not in names or (shape[1] == shape[2] and crop[1] == crop[2]):
        return None
    found = f"patch.shape {shape}" if shape[1] != shape[2] else f"patch.crop {crop}"
    return f"`rot90` exchanges y and x, so they must be equal, which they are not in {found}"


@rule("model.affinity_channels", "model.out_channels")
def _affinity_channels_exist(affinities: _Affinities, num_channels: int) -> str | None:
    if affinities is None:
        return None
    numbers = list(affinities)
    if len(set(numbers)) < len(numbers):
        return f"{tuple(numbers)} names a channel twice"
    if any(offset == (0, 0, 0) for offset in channel_offsets(affinities).values()):
        return "the offset (0, 0, 0) joins a voxel to itself"
    return _missing_channels(numbers, num_channels)


@rule("model.augment", "model.affinity_channels")
def _affinities_have_partners(names: Sequence[str], affinities: _Affinities) -> str | None:
    offsets = channel_offsets(affinities)
    for channel, offset in offsets.items():
        for turn in turns_of(names):
            try:
                partner(turn, channel, offsets)
            except ValueError as error:
                return (
                    f"{list(names)} turns the offset {list(offset)} of channel {channel} into one "
                    f"that the network does not predict: {error}; remove what turns it"
                )
    alike = _alike(offsets)
    if alike and any(turn.swaps_yx for turn in turns_of(names)):
        return (
            f"`rot90` cannot tell the channels {alike[0]} and {alike[1]} apart, which have the "
            "same offset"
        )
    return None


def _alike(offsets: Mapping[int, Triple]) -> tuple[int, int] | None:
    """Return two channels that join the same voxels, if there are such."""
    seen: dict[frozenset[Triple], int] = {}
    for channel, (z, y, x) in offsets.items():
        pair = frozenset({(z, y, x), (-z, -y, -x)})
        if pair in seen:
            return seen[pair], channel
        seen[pair] = channel
    return None


@hint("model.augment", "model.affinity_channels", "model.out_channels")
def _affinities_are_named(
    names: Sequence[str], affinities: _Affinities, num_channels: int
) -> str | None:
    if turns_of(names) == (STRAIGHT,) or affinities is not None or num_channels < 3:
        return None
    return (
        "every channel is averaged as it lies; if the network predicts affinities, name their "
        "channels in model.affinity_channels, else write `affinity_channels: {}`"
    )


@hint("model.affinity_channels", "model.augment")
def _affinity_channels_are_used(affinities: _Affinities, names: Sequence[str]) -> str | None:
    if not affinities or names:
        return None
    return "has no effect without `augment`"


# What is written


@rule("output.channels", "model.out_channels")
def _channels_exist(channels: Sequence[int] | None, num_channels: int) -> str | None:
    if channels is None:
        return None
    if len(set(channels)) < len(channels):
        return f"{tuple(channels)} names a channel twice"
    return _missing_channels(channels, num_channels)


@rule("output.gate.channel", "model.out_channels", "output.channels")
def _gate_leaves_channels(
    channel: int, num_channels: int, channels: Sequence[int] | None
) -> str | None:
    if channel < num_channels and num_channels == 1 and channels is None:
        return "the network's only channel is that of the gate, which leaves nothing to write"
    return _missing_channels([channel], num_channels)


@rule("output.threshold", "output.reduce")
def _reduced_one_way(threshold: float | None, reduce: str | None) -> str | None:
    if threshold is None or reduce is None:
        return None
    return (
        f"{threshold} cannot be applied to the labels of `reduce: {reduce}`; leave one of them out"
    )


@rule("output.dtype", "output.reduce", "model.out_channels", "output.channels", "output.gate")
def _dtype_holds_labels(
    dtype: str, reduce: str | None, num_channels: int, channels: Sequence[int] | None, gate: Any
) -> str | None:
    if reduce is None or dtype.startswith("float"):
        return None
    largest = len(written_channels(num_channels, channels, gate)) - (reduce == "argmax")
    if largest <= np.iinfo(dtype).max:
        return None
    return f"{dtype!r} ends at {np.iinfo(dtype).max}, but labels go up to {largest}; use 'uint16'"


@hint("output.reduce", "model.out_channels", "output.channels", "output.gate")
def _reduced_from_several(
    reduce: str | None, num_channels: int, channels: Sequence[int] | None, gate: Any
) -> str | None:
    if reduce is None or len(written_channels(num_channels, channels, gate)) > 1:
        return None
    return f"{reduce!r} of one channel is the same everywhere; did you mean `threshold`?"


def _missing_channels(channels: Sequence[int], num_channels: int) -> str | None:
    """Return what is wrong with channels that the network does not have."""
    missing = [channel for channel in channels if channel >= num_channels]
    if not missing:
        return None
    return (
        f"there is no channel {missing[0]}: model.out_channels is {num_channels}, so the last "
        f"channel is {num_channels - 1}"
    )
