"""Finds by trial which patch sizes and crop suit a network, when those given do not.

Knows no framework: what the network makes of a shape is a parameter.
"""

from collections.abc import Callable, Sequence

from mpichunk.geometry.box import Triple, subtract, triple

Accepts = Callable[[Triple], bool]
"""Whether the network runs on a patch of this shape."""

OutputShape = Callable[[Triple], Triple | None]
"""Shape that the network returns for a patch of this shape, None if it fails."""

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
    if any(remainders):
        rule = f"it takes sizes of {_axes(remainders)} modulo {_axes(multiples)}"
    else:
        rule = f"it takes multiples of {_axes(multiples)}"
    nearest = [s for s in (below, above) if min(s) > 0]
    return f"{rule} (z, y, x): set patch.shape to {' or '.join(_axes(s) for s in nearest)}"


def crop_advice(output_shape: OutputShape, patch_shape: Triple, found: Triple) -> str:
    """Return which crop, and where needed which patch shape, fits a network that returned `found`.

    A network that pools without padding drops the last voxels of some sizes: it loses 44 of 52, but
    42 of 50. Only the least loss is a border of equal width on both sides, so sizes up to 7 smaller
    are tried too.
    """
    losses = [subtract(patch_shape, found)]
    trial = [n if n <= 2 * _TRIAL_SIZE else _TRIAL_SIZE + n % _LARGEST for n in patch_shape]
    for less in range(1, _NUM_REMAINDERS):
        shape = triple([max(1, n - less) for n in trial])
        returned = output_shape(shape)
        worked = returned is not None and min(returned) > 0
        losses.append(subtract(shape, returned) if returned and worked else losses[0])
    per_axis = [[loss[axis] for loss in losses] for axis in range(3)]
    least = [min(axis) for axis in per_axis]
    if any(n < 0 or n % 2 for n in least):
        return "no patch.crop fits that"
    cure = f"patch.crop: {[n // 2 for n in least]}"
    less_per_axis = triple([axis.index(n) for axis, n in zip(per_axis, least, strict=True)])
    if any(less_per_axis):
        cure = f"patch.shape: {list(subtract(patch_shape, less_per_axis))} and {cure}"
    return f"set {cure}"


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
