"""Finds by trial which patch sizes and crop suit a network, when those given do not.

Knows no framework: what the network makes of a shape is a parameter.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

_SECONDS = 10
"""After which no more sizes are tried, to find the steps of a network."""

_NEAREST, _NEAR = 4, 8
"""Voxels between a size that suits and a second one: fewer do not tell a border from a scale."""

_NO_CROP = "no patch.crop fits that"
_UNSURE = "right if the network cuts off a border: no other size could be tried to see whether"


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
    output_shape: OutputShape,
    patch_shape: Triple,
    found: Triple,
    crop: Triple,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Cure:
    """Return which patch shape and crop suit a network that returned `found`.

    A network that halves its grid without padding drops the last voxels of some sizes: it loses 44
    of 52, but 42 of 50. Only the least loss is a border of equal width on both sides, so smaller
    sizes are tried, until each axis has told where the next whole step of the network begins. What
    is lost of sizes far apart must be the same: else it is no border, but another scale.

    Args:
        output_shape: runs the network on other patch shapes.
        patch_shape: what went in.
        found: what came out.
        crop: `patch.crop`.
        clock: seconds.
    """
    sight = _look(output_shape, patch_shape, subtract(patch_shape, found), clock)
    if sight.is_late:
        words = f"{_NO_CROP}, as far as {_SECONDS} s of trying other sizes can tell"
        return Cure(key="patch.crop", words=words)
    steps = [_step(losses) for losses in sight.losses]
    border = [step.loss for step in steps]
    if sight.is_scaled or min(found) < 1 or any(n < 0 or n % 2 for n in border):
        return Cure(key="patch.crop", words=_NO_CROP)
    has_border = _loses_alike(output_shape, sight.trial, steps)
    if has_border is False:
        return Cure(key="patch.crop", words=_NO_CROP)
    cure = _cure(patch_shape, crop, steps)
    return cure if has_border else replace(cure, words=f"{cure.words}; {_UNSURE}")


def _cure(patch_shape: Triple, crop: Triple, steps: Sequence["_Step"]) -> Cure:
    """Return what to set for a network that loses a border, and what does not fill its steps."""
    # What returns the patch's own shape may be cut by any crop, and that is the user's choice.
    wanted = [step.loss // 2 for step in steps] if any(step.loss for step in steps) else list(crop)
    set_crop = f"patch.crop: {_axes(wanted)}"
    if not any(step.less for step in steps):
        return Cure(key="patch.crop", words=f"set {set_crop}")
    below = [n - step.less for n, step in zip(patch_shape, steps, strict=True)]
    multiples = [step.multiple for step in steps]
    above = [n + (step.multiple if step.less else 0) for n, step in zip(below, steps, strict=True)]
    remainders = [n % m for n, m in zip(below, multiples, strict=True)]
    nearest = [
        shape
        for shape in (below, above)
        if all(n > 2 * cut for n, cut in zip(shape, wanted, strict=True))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """What was seen of other sizes."""

    trial: Triple
    """The shape that was shortened: the patch's, or one that stands for it."""

    losses: list[Losses]
    """Per axis."""

    is_scaled: bool = False
    """Whether what is lost is no border and what does not fill a step: it grows with the size."""

    is_late: bool = False
    """Whether the time was over before each axis had told where its next step begins."""


def _look(
    output_shape: OutputShape, patch_shape: Triple, loss: Triple, clock: Callable[[], float]
) -> _Sight:
    """Return what is lost of this patch, of one that is a voxel shorter, and so on.

    As far as it takes to see on every axis where the next step begins.
    """
    deadline = clock() + _SECONDS
    per_axis: list[Losses] = [[(0, n)] for n in loss]
    trial = _trial(patch_shape, loss)
    of_trial = _loss(output_shape, trial) if trial != patch_shape else loss
    if of_trial is not None and _is_scaled(subtract(trial, patch_shape), subtract(of_trial, loss)):
        return _Sight(trial=trial, losses=per_axis, is_scaled=True)
    if of_trial != loss:
        trial = patch_shape
    num_failed = 0
    for less in range(1, _LARGEST + 1):
        open_axes = [axis for axis in range(3) if not _step(per_axis[axis]).is_known]
        if not open_axes or num_failed == _NUM_REMAINDERS:
            break
        if clock() > deadline:
            return _Sight(trial=trial, losses=per_axis, is_late=True)
        shape = [n - less if axis in open_axes else n for axis, n in enumerate(trial)]
        found = _loss(output_shape, triple(shape))
        num_failed = num_failed + 1 if found is None else 0
        if found is not None:
            for axis in open_axes:
                per_axis[axis].append((less, found[axis]))
    # Where other sizes do run, one that suits is not far.
    is_endless = any(not _step(seen).is_known and len(seen) > 1 for seen in per_axis)
    pairs = zip(of_trial or loss, loss, per_axis, strict=True)
    is_odd = any(a != b and _LARGEST % _step(seen).multiple == 0 for a, b, seen in pairs)
    return _Sight(trial=trial, losses=per_axis, is_scaled=is_endless or is_odd)


def _trial(patch_shape: Triple, loss: Triple) -> Triple:
    """Return a shape that is quick to try, and that powers of two divide as they do the patch.

    Something is left of it, and of all that are smaller by up to the largest power.
    """
    least = [max(n, 0) + _LARGEST + 1 for n in loss]
    return triple([m + (n - m) % _LARGEST for n, m in zip(patch_shape, least, strict=True)])


def _is_scaled(longer: Triple, lost_more: Triple) -> bool:
    """Return whether a network seems to return another scale, or always the same shape.

    Args:
        longer: by how much one shape is longer than another.
        lost_more: by how much it loses more. One that drops what does not fill a step: less than
            that step, which is no power of two here, so not above half of the largest.
    """
    pairs = zip(longer, lost_more, strict=True)
    return any(2 * abs(lost) >= abs(more) > 0 for more, lost in pairs)


def _loses_alike(output_shape: OutputShape, trial: Triple, steps: Sequence[_Step]) -> bool | None:
    """Return whether a second shape that suits, far from the first, loses the same border.

    None where none can be tried: some networks take a single shape.
    """
    suits = [n - step.less for n, step in zip(trial, steps, strict=True)]
    above = [n + _steps_away(step, _NEAR) for n, step in zip(suits, steps, strict=True)]
    below = []
    for n, step, more in zip(suits, steps, above, strict=True):
        away = _steps_away(step, min(_LARGEST, n - step.loss - 1), is_most=True)
        below.append(n - away if away >= _NEAREST else more)
    found = _loss(output_shape, triple(below))
    if found is None and below != above:
        found = _loss(output_shape, triple(above))
    return None if found is None else found == tuple(step.loss for step in steps)


def _steps_away(step: _Step, distance: int, *, is_most: bool = False) -> int:
    """Return a multiple of a step, at least or at most a distance; any power of two if unknown."""
    multiple = step.multiple if step.is_known else _LARGEST
    return distance // multiple * multiple if is_most else -(-distance // multiple) * multiple


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
            less = 0 if losses[0][1] == loss else less
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
