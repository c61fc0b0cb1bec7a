"""Finds by trial which patch sizes and crop suit a network, when those given do not.

Knows no framework: what the network makes of a shape is a parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mpichunk.geometry.box import Triple, subtract, triple

Accepts = Callable[[Triple], bool]
"""Whether the network runs on a patch of this shape."""

OutputShape = Callable[[Triple], Triple | None]
"""Shape that the network returns for a patch of this shape, None if it fails."""

Losses = list[tuple[int, int]]
"""By how many voxels a patch was shorter, and how many it lost, on one axis."""

_MULTIPLES = 1, 2, 4, 8, 16, 32
_LARGEST = _MULTIPLES[-1]
_NUM_REMAINDERS = 8
_TRIAL_SIZE = 64


def size_advice(accepts: Accepts, patch_shape: Triple) -> str:
    """Return which sizes the network takes and the nearest that would do, or "" if none was found.

    Networks that halve their grid n times take sizes of r modulo 2^n: r = 0 with padding, another
    without. Small shapes are tried, so that this costs seconds; at most 26 forwards.
    """
    base = _accepted_base(accepts, patch_shape)
    if base is None:
        return ""
    multiples = [_needed_multiple(accepts, base, axis) for axis in range(3)]
    remainders = [n % m for n, m in zip(base, multiples, strict=True)]
    below = _nearest(patch_shape, multiples, remainders, down=True)
    above = _nearest(patch_shape, multiples, remainders, down=False)
    if below == patch_shape:
        return ""
    rule = _rule(multiples, remainders)
    nearest = [s for s in (below, above) if min(s) > 0]
    return f"{rule} (z, y, x): set patch.shape to {' or '.join(_axes(s) for s in nearest)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cure:
    """What to change in a config, for a network that returns another shape than it should."""

    key: str
    """The key that is at fault."""

    words: str
    """What the network needs, and what to set."""


def shape_advice(
    output_shape: OutputShape, patch_shape: Triple, found: Triple, crop: Triple
) -> Cure:
    """Return which patch shape and crop suit a network that returned `found`.

    A network that halves its grid without padding drops the last voxels of some sizes: it loses 44
    of 52, but 42 of 50. Only the least loss is a border of equal width on both sides, so smaller
    sizes are tried, until each axis has told where the next whole step of the network begins.

    Args:
        output_shape: runs the network on other patch shapes.
        patch_shape: what went in.
        found: what came out.
        crop: `patch.crop`.
    """
    per_axis = _losses(output_shape, patch_shape, subtract(patch_shape, found))
    steps = [_step(losses) for losses in per_axis]
    border = [step.loss for step in steps]
    if any(n < 0 or n % 2 for n in border) or min(found) < 1:
        return Cure(key="patch.crop", words="no patch.crop fits that")
    wanted = [n // 2 for n in border]
    set_crop = f"patch.crop: {_axes(wanted)}"
    if not any(step.less for step in steps):
        return Cure(key="patch.crop", words=f"set {set_crop}")
    below = [n - step.less for n, step in zip(patch_shape, steps, strict=True)]
    multiples = [step.multiple for step in steps]
    above = [n + (step.multiple if step.less else 0) for n, step in zip(below, steps, strict=True)]
    remainders = [n % m for n, m in zip(below, multiples, strict=True)]
    nearest = [
        shape for shape in (below, above) if min(subtract(triple(shape), triple(border))) > 0
    ]
    set_shape = f"patch.shape: {' or '.join(_axes(shape) for shape in nearest)}"
    rule = _rule(multiples, remainders)
    if wanted == list(crop):
        return Cure(key="patch.shape", words=f"{rule} (z, y, x): set {set_shape}")
    return Cure(key="patch.crop", words=f"{rule} (z, y, x): set {set_shape} and {set_crop}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """How the sizes that suit a network follow one another on one axis."""

    loss: int
    """What it loses of a size that suits, both sides together."""

    multiple: int = 1
    """From one size that suits to the next."""

    less: int = 0
    """By how much the patch is longer than the nearest that suits."""

    is_known: bool = False
    """Whether a step was seen."""


def _losses(output_shape: OutputShape, patch_shape: Triple, loss: Triple) -> list[Losses]:
    """Return per axis what is lost of this patch, of one that is a voxel shorter, and so on.

    As far as it takes to see on every axis where the next step begins.
    """
    per_axis: list[Losses] = [[(0, n)] for n in loss]
    trial = _trial(output_shape, patch_shape, loss)
    num_failed = 0
    for less in range(1, _LARGEST + 1):
        open_axes = [axis for axis in range(3) if not _step(per_axis[axis]).is_known]
        if not open_axes or num_failed == _NUM_REMAINDERS:
            break
        shape = [n - less if axis in open_axes else n for axis, n in enumerate(trial)]
        found = _loss(output_shape, triple(shape))
        num_failed = num_failed + 1 if found is None else 0
        if found is not None:
            for axis in open_axes:
                per_axis[axis].append((less, found[axis]))
    return per_axis


def _trial(output_shape: OutputShape, patch_shape: Triple, loss: Triple) -> Triple:
    """Return a shape that is quick to try, and that powers of two divide as they do the patch.

    Something is left of it, and of all that are smaller by up to the largest power.
    """
    least = [max(n, 0) + _LARGEST + 1 for n in loss]
    trial = triple([m + (n - m) % _LARGEST for n, m in zip(patch_shape, least, strict=True)])
    return trial if _loss(output_shape, trial) == loss else patch_shape


def _loss(output_shape: OutputShape, shape: Triple) -> Triple | None:
    """Return what the network loses of a patch; None if it fails, or nothing is left."""
    returned = output_shape(shape) if min(shape) > 0 else None
    return subtract(shape, returned) if returned is not None and min(returned) > 0 else None


def _step(losses: Losses) -> _Step:
    """Return the sizes that suit on one axis; where no step is seen, as if all did.

    A voxel less is a voxel less lost, until the next step begins.
    """
    for last, first in pairwise(losses):
        multiple = first[1] - last[1] + first[0] - last[0]
        if multiple:
            # A network that rounds up lengthens all of a step but its first.
            less, loss = first if last[1] < 0 and multiple > 1 else last
            return _Step(loss=loss, multiple=max(1, multiple), less=less, is_known=True)
    return _Step(loss=losses[0][1])


def _rule(multiples: Sequence[int], remainders: Sequence[int]) -> str:
    """Return which sizes the network takes, in words."""
    if any(remainders):
        return f"it takes sizes of {_axes(remainders)} modulo {_axes(multiples)}"
    return f"it takes multiples of {_axes(multiples)}"


def _accepted_base(accepts: Accepts, patch_shape: Triple) -> Triple | None:
    """Return some shape that is accepted: multiples of the largest power, plus a remainder."""
    whole = [-(-min(n, _TRIAL_SIZE) // _LARGEST) * _LARGEST for n in patch_shape]
    for remainder in range(_NUM_REMAINDERS):
        shape = triple([n + remainder for n in whole])
        if accepts(shape):
            return shape
    return None


def _needed_multiple(accepts: Accepts, base: Triple, axis: int) -> int:
    """Return the smallest step on one axis that leads from one accepted size to the next."""
    for multiple in _MULTIPLES[:-1]:
        shape = list(base)
        shape[axis] += multiple
        if accepts(triple(shape)):
            return multiple
    return _LARGEST


def _nearest(
    shape: Triple, multiples: Sequence[int], remainders: Sequence[int], *, down: bool
) -> Triple:
    """Return the nearest shape of these remainders, per axis below or above."""
    return triple(
        [
            n - (n - r) % m if down else n + (r - n) % m
            for n, m, r in zip(shape, multiples, remainders, strict=True)
        ]
    )


def _axes(values: Sequence[int]) -> str:
    return str(list(values))
