"""Blocks for inference: plans, sources, engines, and what should come out, patch by patch."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mpichunk.backends.identity import IdentityEngine
from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.block.inference import BlockInference
from mpichunk.config.scaling import Scaling
from mpichunk.geometry.blending import window
from mpichunk.geometry.box import Box
from mpichunk.plan.plan import Plan
from tests import engines

FLOAT32 = np.dtype(np.float32)


def make_plan(**changes):
    """Return a plan of eight blocks that patches do not fit, as the volume does not fit blocks."""
    volume = changes.get("volume", Box(start=(-3, 5, 7), stop=(8, 27, 35)))
    values = {
        "volume": volume,
        "roi": volume,
        "output_domain": volume,
        "block_shape": (7, 16, 14),
        "output_patch_shape": (5, 8, 9),
        "crop": (1, 0, 2),
        "overlap": (2, 3, 0),
        "stitch": "seamless",
        "margin": (0, 0, 0),
    }
    return Plan(**values | changes)


def make_request(plan, **changes):
    """Return what a plan asks of a network that makes three channels of two."""
    values = {"patch_shape": plan.patch_shape, "crop": plan.crop, "batch_size": 3}
    return engines.make_request(**values | {"in_channels": 2, "out_channels": 3} | changes)


class Mix(nn.Module):
    """Three channels of two, and something that depends on the place in the patch."""

    def forward(self, batch):
        place = torch.linspace(0, 1, batch.shape[-1])
        return torch.stack([batch[:, 0], batch[:, 1] * place, batch[:, 0] - 2 * batch[:, 1]], dim=1)


def mix(patch_czyx):
    place = np.linspace(0, 1, patch_czyx.shape[-1])
    return np.stack([patch_czyx[0], patch_czyx[1] * place, patch_czyx[0] - 2 * patch_czyx[1]])


def identity(patch_czyx):
    return patch_czyx[[0, 1, 0]]


ENGINES = {
    "identity": (IdentityEngine, identity),
    "pytorch": (lambda request: TorchEngine(Mix().eval(), request), mix),
}
each_engine = pytest.mark.parametrize("name", ENGINES)

ACTIVATIONS = {
    "none": lambda a: a,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "softmax": lambda a: np.exp(a) / np.exp(a).sum(axis=0),
}


def brute_force(
    block, source_czyx, net, *, window_name="bump", activation="none", divide=255, mask=None
):
    """Blend in float64 over the whole output box, patch by patch, with a weight volume."""
    origin = block.output_box.start
    total_czyx = np.zeros((3, *block.output_box.shape))
    weight_zyx = np.zeros(block.output_box.shape)
    z, y, x = (window(window_name, n).astype(np.float64) for n in block.patch_shape)
    w_zyx = z[:, None, None] * y[None, :, None] * x
    num_run = 0
    for start in itertools.product(*block.starts):
        box = Box.from_shape(start, block.patch_shape)
        at = box.slices(origin)
        seen = source_czyx[(slice(None), *box.grow(block.crop).slices(block.input_box.start))]
        weight_zyx[at] += w_zyx
        if not seen.any() or (mask is not None and not mask[at].any()):
            continue
        num_run += 1
        scaled = seen.astype(np.float32) / np.float32(divide)
        out = net(scaled.astype(np.float64))
        inner = tuple(slice(c, n - c) for c, n in zip(block.crop, out.shape[1:], strict=True))
        total_czyx[(slice(None), *at)] += w_zyx * ACTIVATIONS[activation](
            out[(slice(None), *inner)]
        )
    blended = np.where(weight_zyx > 0, total_czyx / np.maximum(weight_zyx, 1e-300), np.nan)
    if mask is not None:
        blended = np.where(mask, blended, 0)
    return blended[(slice(None), *block.core.slices(origin))], num_run


def make_inference(plan, name="identity", **changes):
    """Return the inference of an engine; `request` are changes of what is asked of it."""
    request_changes = changes.pop("request", {})
    request = make_request(plan, **request_changes)
    values = {
        "scaling": Scaling(divide=255.0),
        "window_name": "bump",
        "activation": "none",
        "skip_blank": True,
    }
    return BlockInference(ENGINES[name][0](request), request, **values | changes)


def make_source(block, seed=0, dtype=np.uint8):
    """Return an input of a block without blank voxels, (c, z, y, x)."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (2, *block.input_box.shape)).astype(dtype)


def raw_values(shape, dtype):
    """Return values of all sizes that the dtype has."""
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return (rng.normal(size=shape) * 1e4).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


RAW_DTYPES = [
    *("uint8", "int8", "int16", "int32", "float32"),  # divided at once
    *("uint16", "uint32", "float16", "float64"),
]


class Records(nn.Module):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batch):
        self.batches.append(batch.clone())
        return batch[:, [0, 1, 0]]
