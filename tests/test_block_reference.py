"""Every block through the real inference, without ranks and files, against the reference."""

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.backends import get_backend
from mpichunk.block.inference import BlockInference, scaling_for
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box, Triple, triple
from mpichunk.geometry.masking import MaskGrid
from mpichunk.geometry.padding import pad, source_box
from mpichunk.plan.plan import Plan
from tests.engines import make_request
from tests.geometries import cases, make_info
from tests.reference import ReferenceMask, reference

VOXEL_SIZE, MASK_VOXEL_SIZE = (4.0, 4.0, 8.0), (8.0, 8.0, 4.0)


def with_settings(config: Config, pad_mode: str, window: str) -> Config:
    """Return the config with two channels, a sigmoid and batches of three."""
    patch = config.patch.model_copy(update={"batch_size": 3, "window": window})
    model = config.model.model_copy(update={"out_channels": 2, "activation": "sigmoid"})
    volume = config.input.model_copy(update={"pad": pad_mode})
    return config.model_copy(update={"patch": patch, "model": model, "input": volume})


def inference_of(config: Config, plan: Plan) -> BlockInference:
    request = make_request(
        patch_shape=plan.patch_shape,
        crop=plan.crop,
        batch_size=config.patch.batch_size,
        out_channels=config.model.out_channels,
    )
    return BlockInference(
        get_backend("identity").load(config.model, request),
        request,
        scaling=scaling_for(np.dtype(np.uint8), None),
        window_name=config.patch.window,
        activation=config.model.activation,
        skip_blank=config.model.skip_blank,
    )


def sparse(seed: int, shape: Triple) -> Any:
    """Return a volume that is mostly zero, so that some patches are blank."""
    random = np.random.default_rng(seed)
    return (random.integers(1, 256, shape) * (random.random(shape) < 0.05)).astype(np.uint8)


@settings(max_examples=50)
@given(
    cases(largest=14),
    st.sampled_from(["reflect", "edge", "zero"]),
    st.sampled_from(["bump", "gaussian", "hann", "uniform"]),
    st.sampled_from([None, False, True]),
    st.integers(0, 1000),
)
def test_blocks_are_those_of_the_reference(
    case: tuple[Config, Box], pad_mode: str, window: str, invert: bool | None, seed: int
) -> None:
    config, domain = with_settings(case[0], pad_mode, window), case[1]
    plan = Plan.from_config(config, domain)
    assume(len(plan) < 100 and sum(block.num_patches for block in plan) < 2000)
    volume_czyx = sparse(seed, domain.shape)[None]
    mask_box = Box.from_shape(triple([a // 2 - 1 for a in domain.start]), (5, 5, 5))
    mask_zyx = sparse(seed + 1, mask_box.shape)
    mask = grid = None
    if invert is not None:
        mask = ReferenceMask(
            mask_zyx=mask_zyx,
            domain=mask_box,
            voxel_size=MASK_VOXEL_SIZE,
            output_voxel_size=VOXEL_SIZE,
            invert=invert,
        )
        grid = MaskGrid.between(
            make_info(domain, voxel_size=VOXEL_SIZE),
            make_info(mask_box, voxel_size=MASK_VOXEL_SIZE),
            invert=invert,
        )
    expected = reference(volume_czyx, domain, lambda p: np.repeat(p, 2, axis=0), config, mask=mask)

    inference = inference_of(config, plan)
    found_czyx = np.zeros_like(expected.values_czyx)
    num_patches = 0
    for block in plan:
        wanted_zyx = None
        if grid is not None:
            inside = grid.source_box(block.output_box)
            part = (
                np.zeros(inside.shape)
                if inside.is_empty
                else mask_zyx[inside.slices(mask_box.start)]
            )
            wanted_zyx = grid.expand(part, inside, block.output_box)
            if not wanted_zyx[block.core.slices(block.output_box.start)].any():
                continue
        inside = source_box(block.input_box, domain)
        raw_czyx = volume_czyx[(slice(None), *inside.slices(domain.start))]
        source_czyx = pad(raw_czyx, inside, block.input_box, domain, config.input.pad)
        done = inference.run(block, source_czyx, wanted_zyx, np.dtype(np.float32))
        num_patches += done.num_patches
        found_czyx[(slice(None), *block.core.slices(plan.output_domain.start))] = done.core()
    np.testing.assert_allclose(found_czyx, expected.values_czyx, atol=1e-5)
    assert num_patches == expected.num_patches
