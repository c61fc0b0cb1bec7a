"""Where a block's result is not finite, and which patch has made it so: for the message.

Knows nothing of how it was computed; nothing here is called before NaN or inf was found.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.geometry.box import Box, Slices, Triple, add, triple

NOT_FINITE = "the result holds NaN or inf"
NOT_FLOAT16 = "the result holds values above 65504, which float16 cannot store"

_CURES = {
    NOT_FINITE: "check the input there, and whether the network handles it",
    NOT_FLOAT16: "write float32, or check the input there",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Voxels that are not finite."""

    num_voxels: int
    """How many; each counts once, however many of its channels are not."""

    voxel: Triple
    """The first of them, z slowest, in the coordinates of the volume."""

    channel: int
    """The first of its channels that is not."""


Patch = tuple[Box, Slices]
"""A patch of a block, by its output box and by where in the block's source its input is."""

Patches = Iterator[Patch]

Blame = Callable[[Triple], str]
"""Says in words which patch has made a voxel what it is."""


def find_spot(place: Box, values_czyx: npt.NDArray[Any]) -> Spot | None:
    """Return what is not finite of the values of a place; None if all are."""
    bad_czyx = ~np.isfinite(values_czyx)
    bad_zyx = bad_czyx.any(axis=0)
    if not bad_zyx.any():
        return None
    first = triple([int(i) for i in np.unravel_index(bad_zyx.argmax(), bad_zyx.shape)])
    return Spot(
        num_voxels=int(np.count_nonzero(bad_zyx)),
        voxel=add(place.start, first),
        channel=int(bad_czyx[(slice(None), *first)].argmax()),
    )


def joined(spots: Iterable[Spot | None]) -> Spot | None:
    """Return what was found in all places, these in order."""
    found = [spot for spot in spots if spot is not None]
    return replace(found[0], num_voxels=sum(s.num_voxels for s in found)) if found else None


def describe(kind: str, core: Box, place: Box, spot: Spot | None, blame: Blame) -> str:
    """Return the message of a failed block; what blocks that fail alike share is `kind` alone.

    Args:
        kind: `NOT_FINITE` or `NOT_FLOAT16`.
        core: of the block.
        place: the first part that is not finite.
        spot: what of the block is not, where its values are still known.
        blame: says which patch it was.
    """
    if spot is None:
        return f"{kind} near {place}; {_CURES[kind]}"
    message = (
        f"{kind}: {spot.num_voxels} of {core.num_voxels} voxels, the first at z, y, x = "
        f"{list(spot.voxel)} in channel {spot.channel}"
    )
    end = f"; {_CURES[kind]}" if kind == NOT_FLOAT16 else f", {blame(spot.voxel)}"
    return message + end


def blame_patch(
    voxel: Triple,
    patches: Patches,
    source_czyx: npt.NDArray[Any],
    are_sound: Callable[[Sequence[Patch]], list[bool]] | None,
) -> str:
    """Return in words which patch has made a voxel NaN or inf, and what to look at.

    Args:
        voxel: which.
        patches: those that were run.
        source_czyx: the block's input.
        are_sound: runs patches again, and returns whether each is finite at the voxel; None where
            that is not for this thread to do.
    """
    there = Box.from_shape(voxel, (1, 1, 1))
    suspects = [(box, seen) for box, seen in patches if box.contains(there)]
    if are_sound is not None and len(suspects) > 1:
        answers = zip(suspects, are_sound(suspects), strict=True)
        suspects = [patch for patch, is_sound in answers if not is_sound] or suspects
    if not suspects:
        return _CURES[NOT_FINITE]
    bad = [box for box, seen in suspects if not _is_finite(source_czyx[(slice(None), *seen)])]
    patch = "from the output patch" if len(suspects) == 1 else "from output patches such as"
    if bad:
        return f"{patch} {bad[0]}, whose input holds NaN or inf, too: fix the input there"
    return (
        f"{patch} {suspects[0][0]}, whose input is finite: check the input there, and whether the "
        "network handles it, also in this compute.precision"
    )


def _is_finite(patch_czyx: npt.NDArray[Any]) -> bool:
    return patch_czyx.dtype.kind != "f" or bool(np.isfinite(patch_czyx).all())
