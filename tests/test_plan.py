"""Plans against the reference's loops, and what every plan must promise."""

import time
import tracemalloc
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.config.schema import Config
from mpichunk.errors import UserError
from mpichunk.geometry.box import Box, Grid, Triple, triple
from mpichunk.plan.plan import Plan
from tests import reference
from tests.geometries import cases, make_config, make_plan, triples

Case = tuple[Config, Box]


@given(cases())
def test_blocks_tile_the_roi_exactly_once(case: Case) -> None:
    plan = Plan.from_config(*case)
    counts_zyx = np.zeros(plan.roi.shape, dtype=np.uint8)
    for index, block in enumerate(plan):
        assert block.index == index and plan.roi.contains(block.core)
        counts_zyx[block.core.slices(plan.roi.start)] += 1
        if index > 3000:
            return
    assert (counts_zyx == 1).all()


@given(cases(), st.data())
def test_blocks_and_their_patches_are_those_of_the_naive_loops(
    case: Case, data: st.DataObject
) -> None:
    config, domain = case
    plan = Plan.from_config(config, domain)
    cores = reference.cores(config.block.shape, plan.output_domain, plan.roi)
    assert len(plan) == len(cores)
    index = data.draw(st.integers(0, len(plan) - 1))
    block = plan[index]
    assert block.core == cores[index]
    geometry = reference.reference_config_defaults(config)
    for axis in range(3):
        expected = reference.axis_starts(
            config, geometry, domain, plan.output_domain, block.core, axis
        )
        assert list(block.starts[axis]) == expected


@given(cases(), st.data())
def test_patches_cover_the_core_and_stay_inside_the_volume(case: Case, data: st.DataObject) -> None:
    plan = Plan.from_config(*case)
    block = plan[data.draw(st.integers(0, len(plan) - 1))]
    patches = list(block.patches())
    assert len(patches) == block.num_patches == len(set(patches))
    assert patches == sorted(patches, key=lambda box: box.start)
    covered_zyx = np.zeros(block.core.shape, dtype=np.bool_)
    for patch in patches:
        assert patch.shape == plan.output_patch_shape and not patch.intersect(block.core).is_empty
        assert block.output_box.contains(patch)
        covered_zyx[patch.intersect(block.core).slices(block.core.start)] = True
        for axis in range(3):
            low, high = plan.volume.start[axis], plan.volume.stop[axis]
            if high - low >= patch.shape[axis]:
                assert low <= patch.start[axis] and patch.stop[axis] <= high
            else:
                assert patch.start[axis] == low
    assert covered_zyx.all()
    assert block.input_box == block.output_box.grow(plan.crop)


@given(cases(), st.data())
def test_seamless_blocks_share_the_patches_of_the_volume(case: Case, data: st.DataObject) -> None:
    config, domain = case
    config = config.model_copy(
        update={"block": config.block.model_copy(update={"stitch": "seamless"})}
    )
    plan = Plan.from_config(config, domain)
    block = plan[data.draw(st.integers(0, len(plan) - 1))]
    for axis in range(3):
        q, stride = plan.output_patch_shape[axis], plan.stride[axis]
        low, high = domain.start[axis], domain.stop[axis]
        whole = reference.lattice(low, high, low, q, stride)
        a, b = block.core.start[axis], block.core.stop[axis]
        assert list(block.starts[axis]) == [s for s in whole if s < b and s + q > a]


@given(cases(), st.data())
def test_the_roi_only_leaves_patches_out(case: Case, data: st.DataObject) -> None:
    """With `output.domain: input` no voxel's patches depend on the ROI."""
    config, domain = case
    output = config.output.model_copy(update={"domain": "input"})
    config = config.model_copy(update={"output": output})
    part = Plan.from_config(config, domain)
    full = Plan.from_config(config.model_copy(update={"roi": None}), domain)
    block = part[data.draw(st.integers(0, len(part) - 1))]
    position = [
        (a - o) // s
        for a, o, s in zip(block.core.start, domain.start, part.block_shape, strict=True)
    ]
    whole = full[int(np.ravel_multi_index(position, full.grid.shape))]
    assert whole.core.contains(block.core)
    for axis in range(3):
        q, a, b = whole.patch_shape[axis], block.core.start[axis], block.core.stop[axis]
        expected = [s for s in whole.starts[axis] if s < b and s + q > a]
        assert list(block.starts[axis]) == expected


@given(
    st.tuples(st.integers(2, 20), st.integers(0, 19), st.integers(1, 6), st.integers(3, 8)),
    st.integers(-50, 50),
)
def test_blocks_of_whole_strides_run_no_patch_too_many(
    numbers: tuple[int, int, int, int], start: int
) -> None:
    patch, overlap, num_strides, num_blocks = numbers
    overlap = min(overlap, patch - 2)
    stride = patch - overlap
    extent = num_strides * stride
    config = make_config((1, 1, patch), (1, 1, extent), patch_overlap=(0, 0, overlap))
    plan = Plan.from_config(config, Box.from_shape((0, 0, start), (1, 1, num_blocks * extent)))
    reach = ceil(patch / extent)
    for block in list(plan)[reach : num_blocks - reach]:
        assert block.num_patches == num_strides


@given(cases(), triples(1, 4), triples(1, 4))
def test_no_write_unit_is_shared_by_two_blocks(case: Case, unit: Triple, times: Triple) -> None:
    config, domain = case
    shape = triple([a * b for a, b in zip(unit, times, strict=True)])
    config = config.model_copy(
        update={
            "block": config.block.model_copy(update={"shape": shape}),
            "output": config.output.model_copy(update={"chunk_shape": unit}),
        }
    )
    assert config.write_unit == unit
    plan = Plan.from_config(config, domain)
    for axis in range(3):
        roi = plan.roi
        line = Box(
            start=triple([roi.start[i] for i in range(3)]),
            stop=triple([roi.stop[i] if i == axis else roi.start[i] + 1 for i in range(3)]),
        )
        units = Grid(origin=plan.output_domain.start, step=unit, bounds=line)
        cores = Grid(origin=plan.output_domain.start, step=plan.block_shape, bounds=line)
        for cell in units:
            assert sum(not core.intersect(cell).is_empty for core in cores) == 1


@settings(max_examples=20)
@given(st.sampled_from(["crop", "seamless"]), st.integers(0, 10**15))
def test_a_petavoxel_plan_costs_nothing(stitch: str, position: int) -> None:
    config = make_config(
        (20, 256, 256),
        (128, 1000, 1000),
        patch_overlap=(4, 64, 64),
        patch_crop=(0, 3, 3),
        block_stitch=stitch,
    )
    domain = Box.from_shape((-77, 5, 10**6), (10**5 + 1, 10**5 + 3, 10**5))
    tracemalloc.start()
    started = time.perf_counter()
    plan = Plan.from_config(config, domain)
    num_blocks = len(plan)
    blocks = [plan[0], plan[position % num_blocks], plan[num_blocks - 1]]
    seconds = time.perf_counter() - started
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_blocks == 782 * 101 * 100
    assert blocks[0].core.start == domain.start and blocks[2].core.stop == domain.stop
    assert all(0 < block.num_patches < 1000 for block in blocks)
    assert seconds < 0.5 and peak_nbytes < 100_000


def test_small_volume_has_one_padded_patch() -> None:
    config = make_config((8, 8, 8), (16, 16, 16), patch_crop=(1, 1, 1))
    plan = Plan.from_config(config, Box.from_shape((-3, 0, 5), (2, 6, 40)))
    block = plan[0]
    assert block.starts[0] == (-3,) and block.starts[1] == (0,)
    assert block.output_box.start == (-3, 0, 5) and block.output_box.shape[:2] == (6, 6)
    assert block.input_box.start == (-4, -1, 4)


def test_grid_is_anchored_to_the_output() -> None:
    roi = {"start": [5, 6, 7], "stop": [30, 31, 32]}
    anchored = {}
    for domain in ("input", "roi"):
        config = make_config((4, 4, 4), (10, 10, 10), roi=roi, output_domain=domain)
        anchored[domain] = make_plan(config, (40, 40, 40))
    assert anchored["input"][0].core.shape == (5, 4, 3)
    assert anchored["roi"][0].core.shape == (10, 10, 10)
    assert anchored["roi"].output_domain == anchored["input"].roi


def test_defaults_are_a_quarter_and_half_of_it() -> None:
    plan = make_plan(make_config((20, 256, 66), (32, 64, 64), patch_crop=(0, 0, 1)), (99, 999, 999))
    assert plan.output_patch_shape == (20, 256, 64)
    assert plan.overlap == (5, 64, 16) and plan.margin == (2, 32, 8)
    assert plan.stride == (15, 192, 48) and plan.patch_shape == (20, 256, 66)


@pytest.mark.parametrize(
    ("start", "stop"),
    [((0, 0, 0), (11, 10, 10)), ((-1, 0, 0), (5, 5, 5)), ((20, 0, 0), (21, 1, 1))],
)
def test_roi_outside_is_refused(start: Triple, stop: Triple) -> None:
    config = make_config((4, 4, 4), (5, 5, 5), roi={"start": start, "stop": stop})
    with pytest.raises(UserError, match="not inside the input; the input covers") as caught:
        make_plan(config, (10, 10, 10))
    assert caught.value.key == "roi"


def test_empty_input_is_refused() -> None:
    with pytest.raises(UserError, match="empty") as caught:
        make_plan(make_config((4, 4, 4), (5, 5, 5)), (0, 10, 10))
    assert caught.value.key == "input.volume"


def test_num_patches_is_a_product_over_axes() -> None:
    plan = make_plan(make_config((6, 6, 6), (7, 8, 9)), (30, 31, 32))
    per_block = [block.num_patches for block in plan]
    assert all(n == prod(map(len, plan[i].starts)) for i, n in enumerate(per_block))
