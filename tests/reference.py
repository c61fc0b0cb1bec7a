"""The brute-force reference: the whole volume in float64, every rule written out as a loop.

Shares nothing with mpichunk but the config's keys and the Box: lattices, windows, padding, mask and
quantisation are written here a second time, from the rules, so that they can disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import cos, exp, pi
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box, Triple, triple

Array = npt.NDArray[Any]
Net = Callable[[npt.NDArray[np.float32]], Array]
"""Scaled patch (c, z, y, x) float32 -> prediction (c', z', y', x'), not yet cut or activated."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The numbers of a config with every default written out; (z, y, x)."""

    patch: Triple
    crop: Triple
    out: Triple  # the output patch
    overlap: Triple
    block: Triple
    margin: Triple


@dataclass(frozen=True, kw_only=True)
class ReferenceMask:
    """A mask and where it lies: `domain` in mask voxels, sizes in nm."""

    mask_zyx: Array
    domain: Box
    voxel_size: tuple[float, float, float]
    output_voxel_size: tuple[float, float, float]
    invert: bool = False


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a run must give."""

    domain: Box
    """What the output volume covers."""

    values_czyx: npt.NDArray[np.float64]
    """Blended and masked, before quantisation; zero outside the ROI."""

    output_czyx: Array
    """As stored, in the output's dtype."""

    num_blocks: int
    """Blocks that touch the ROI, the masked ones too."""

    num_patches: int
    """Patches that went through the network."""


def reference_config_defaults(config: Config) -> Geometry:
    """Return the geometry with the documented defaults: overlap Q // 4, margin overlap // 2."""
    patch, crop = config.patch.shape, config.patch.crop
    out = triple([p - 2 * c for p, c in zip(patch, crop, strict=True)])
    overlap = config.patch.overlap or triple([q // 4 for q in out])
    margin = config.block.margin or triple([o // 2 for o in overlap])
    return Geometry(
        patch=patch, crop=crop, out=out, overlap=overlap, block=config.block.shape, margin=margin
    )


def reference(
    volume_czyx: Array, domain: Box, net: Net, config: Config, *, mask: ReferenceMask | None = None
) -> Reference:
    """Return the output of a run of `config` over a volume that is all in memory."""
    g = reference_config_defaults(config)
    roi = Box(start=config.roi.start, stop=config.roi.stop) if config.roi else domain
    out_domain = domain if config.output.domain == "input" else roi
    # Pad once, wide enough for any patch: its border, and what it reaches past a small volume.
    pad = [g.crop[i] + max(0, g.out[i] - domain.shape[i]) for i in range(3)]
    mode: Any = {"reflect": "reflect", "edge": "edge", "zero": "constant"}[config.input.pad]
    padded_czyx = np.pad(volume_czyx, [(0, 0), *((n, n) for n in pad)], mode=mode)
    corner = [a - n for a, n in zip(domain.start, pad, strict=True)]
    wanted_zyx = wanted_voxels(mask, corner, padded_czyx.shape[1:])
    w_zyx = window(config.patch.window, g.out)

    values_czyx = np.zeros((config.model.out_channels, *out_domain.shape))
    num_blocks = num_patches = 0
    for core in cores(g.block, out_domain, roi):
        num_blocks += 1
        if not wanted_zyx[region(core, corner)].any():
            continue
        total_czyx = np.zeros((config.model.out_channels, *padded_czyx.shape[1:]))
        weight_zyx = np.zeros(padded_czyx.shape[1:])
        starts = [axis_starts(config, g, domain, out_domain, core, axis) for axis in range(3)]
        for start in product(*starts):
            box = Box.from_shape(triple(start), g.out)
            if not wanted_zyx[region(box, corner)].any():
                continue
            source_czyx = padded_czyx[(slice(None), *region(box.grow(g.crop), corner))]
            weight_zyx[region(box, corner)] += w_zyx
            if config.model.skip_blank and not source_czyx.any():
                continue
            num_patches += 1
            scaled_czyx = scale(source_czyx, config)
            predicted_czyx = activate(cut(net(scaled_czyx), g), config.model.activation)
            total_czyx[(slice(None), *region(box, corner))] += w_zyx * predicted_czyx
        inside = region(core, corner)
        # Only voxels that the mask excludes may have no patch.
        weight = np.where(wanted_zyx[inside], weight_zyx[inside], 1)
        assert (weight > 0).all(), f"{core} is not covered"
        blended_czyx = total_czyx[(slice(None), *inside)] / weight
        target = (slice(None), *region(core, list(out_domain.start)))
        values_czyx[target] = np.where(wanted_zyx[inside], blended_czyx, 0)
    return Reference(
        domain=out_domain,
        values_czyx=values_czyx,
        output_czyx=quantise(values_czyx, config.output.dtype),
        num_blocks=num_blocks,
        num_patches=num_patches,
    )


def region(box: Box, corner: list[int]) -> tuple[slice, ...]:
    """Return the index of a box in an array whose first voxel is `corner`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(box.start, box.stop, corner, strict=True))


def cores(block: Triple, out_domain: Box, roi: Box) -> list[Box]:
    """Return the cores of all blocks in order, z slowest; their grid starts with the output."""
    corners = [range(out_domain.start[i], out_domain.stop[i], block[i]) for i in range(3)]
    boxes = [Box.from_shape(triple(start), block).intersect(roi) for start in product(*corners)]
    return [box for box in boxes if not box.is_empty]


def axis_starts(
    config: Config, g: Geometry, domain: Box, out_domain: Box, core: Box, axis: int
) -> list[int]:
    """Return where the output patches of a block start on one axis."""
    v0, v1 = domain.start[axis], domain.stop[axis]
    q, stride = g.out[axis], g.out[axis] - g.overlap[axis]
    if config.block.stitch == "seamless":
        starts = lattice(v0, v1, v0, q, stride)
    else:
        # The whole block that this core is a part of, clipped to the volume but not to the ROI.
        first = out_domain.start[axis]
        while first + g.block[axis] <= core.start[axis]:
            first += g.block[axis]
        a, b = max(v0, first), min(v1, first + g.block[axis])
        a, b = max(v0, a - g.margin[axis]), min(v1, b + g.margin[axis])
        starts = lattice(a, b, v0, q, stride)
    return [s for s in starts if s < core.stop[axis] and s + q > core.start[axis]]


def lattice(a: int, b: int, v0: int, q: int, stride: int) -> list[int]:
    """Return the output patch starts that cover [a, b) in a volume that begins at v0."""
    while b - a < q and a > v0:
        a -= 1
    if b - a <= q:
        return [a]
    starts = [a]
    while starts[-1] + q < b:
        starts.append(starts[-1] + stride)
    starts[-1] = b - q
    return starts


def window(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the blending weights of one output patch as a whole (z, y, x) array."""
    z, y, x = (window_axis(name, n) for n in shape)
    return z[:, None, None] * y[None, :, None] * x[None, None, :]


def window_axis(name: str, q: int) -> npt.NDArray[np.float64]:
    """Return the weights of one axis: over their maximum, not below a millionth."""
    formulas: dict[str, Callable[[int], float]] = {
        "bump": lambda k: exp(-1 / (1 - (2 * (k + 1) / (q + 1) - 1) ** 2)),
        "gaussian": lambda k: exp(-0.5 * ((k - (q - 1) / 2) / (q / 8)) ** 2),
        "hann": lambda k: (1 - cos(2 * pi * (k + 0.5) / q)) / 2,
        "uniform": lambda k: 1.0,
    }
    weights = [formulas[name](k) for k in range(q)]
    return np.array([max(w / max(weights), 1e-6) for w in weights])


def scale(source_czyx: Array, config: Config) -> npt.NDArray[np.float32]:
    """Return raw values as the network's float32 input."""
    normalize = config.input.normalize
    if normalize is not None:
        if normalize.clip is not None:
            source_czyx = np.clip(source_czyx.astype(np.float64), *normalize.clip)
        shifted = source_czyx.astype(np.float32) - np.float32(normalize.subtract)
        return (shifted / np.float32(normalize.divide)).astype(np.float32)
    if np.issubdtype(source_czyx.dtype, np.integer):
        largest = np.float32(np.iinfo(source_czyx.dtype).max)
        return (source_czyx.astype(np.float32) / largest).astype(np.float32)
    return source_czyx.astype(np.float32)


def cut(predicted_czyx: Array, g: Geometry) -> npt.NDArray[np.float64]:
    """Cut the border off a prediction, unless the network has cut it itself."""
    if predicted_czyx.shape[1:] == g.patch:
        inner = [slice(c, n - c) for c, n in zip(g.crop, g.patch, strict=True)]
        predicted_czyx = predicted_czyx[(slice(None), *inner)]
    assert predicted_czyx.shape[1:] == g.out, (predicted_czyx.shape, g)
    return predicted_czyx.astype(np.float64)


def activate(predicted_czyx: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """Return the prediction through its activation."""
    if name == "sigmoid":
        return 1 / (1 + np.exp(-predicted_czyx))
    if name == "softmax":
        powers = np.exp(predicted_czyx - predicted_czyx.max(axis=0, keepdims=True))
        return np.asarray(powers / powers.sum(axis=0, keepdims=True))
    return predicted_czyx


def wanted_voxels(
    mask: ReferenceMask | None, corner: list[int], shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Return, for every output voxel from `corner` on, whether the mask wants it."""
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    nonzero = mask.mask_zyx != 0
    for axis in range(3):
        size, mask_size = mask.output_voxel_size[axis], mask.voxel_size[axis]
        ratio = Fraction(size / mask_size).limit_denominator(10_000)
        first, num = mask.domain.start[axis], mask.domain.shape[axis]
        m = np.array([(corner[axis] + i) * ratio // 1 - first for i in range(shape[axis])])
        outside = (m < 0) | (m >= num)
        nonzero = np.take(nonzero, np.clip(m, 0, num - 1).astype(int), axis=axis)
        np.moveaxis(nonzero, axis, 0)[outside] = False
    return np.asarray(nonzero != mask.invert)


def quantise(values_czyx: npt.NDArray[np.float64], name: str) -> Array:
    """Return the values as stored: integers are the part of their maximum, half to even."""
    dtype = np.dtype(name)
    values = values_czyx.astype(np.float32)
    if np.issubdtype(dtype, np.integer):
        values = np.rint(np.clip(values, 0, 1) * np.float32(np.iinfo(dtype).max))
    return values.astype(dtype)
