"""Estimates of the work against plans that are walked block by block."""

import time
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.config.schema import Config
from mpichunk.errors import UserError
from mpichunk.geometry.box import Box, Grid, Triple, triple
from mpichunk.plan.estimate import estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.work import floor_sum, work_of
from tests.geometries import cases, estimate_of, make_config, make_info, triples

Case = tuple[Config, Box]


@given(
    st.integers(0, 40), st.integers(0, 10**6), st.integers(-(10**9), 10**9), st.integers(1, 10**5)
)
def test_floor_sum(count: int, slope: int, offset: int, divisor: int) -> None:
    expected = sum((offset + i * slope) // divisor for i in range(count))
    assert floor_sum(count, slope, offset, divisor) == expected


def aligned(box: Box, volume: Box, chunk: Triple) -> Box:
    """Return the whole storage chunks that a box touches."""
    start = [v + (a - v) // c * c for a, v, c in zip(box.start, volume.start, chunk, strict=True)]
    stop = [v - (v - b) // c * c for b, v, c in zip(box.stop, volume.start, chunk, strict=True)]
    return Box(start=triple(start), stop=triple(stop)).intersect(volume)


@settings(max_examples=60)
@given(cases(largest=25), triples(1, 9))
def test_work_is_that_of_all_blocks(case: Case, chunk: Triple) -> None:
    plan = Plan.from_config(*case)
    assume(len(plan) <= 2000)
    work = work_of(plan, chunk)
    blocks = list(plan)
    patches = [block.num_patches for block in blocks]
    reads = [block.input_box.intersect(plan.volume) for block in blocks]
    assert work.num_blocks == len(blocks)
    assert work.num_patches == sum(patches)
    assert work.patches_per_block[::2] == (min(patches), max(patches))
    assert work.num_voxels_read == sum(box.num_voxels for box in reads)
    decoded = sum(aligned(box, plan.volume, chunk).num_voxels for box in reads)
    assert work.decode_amplification == decoded / plan.roi.num_voxels
    assert prod(work.input_shape) == max(block.input_box.num_voxels for block in blocks)
    assert prod(work.core_shape) == max(block.core.num_voxels for block in blocks)
    assert work.is_padded == any(not plan.volume.contains(b.input_box) for b in blocks)


def only(axis: int, here: Triple, elsewhere: Sequence[int]) -> Triple:
    """Return a triple that takes one axis from `here` and the others from `elsewhere`."""
    return triple([here[i] if i == axis else elsewhere[i] for i in range(3)])


@settings(max_examples=60)
@given(cases(largest=2000), st.integers(0, 2), st.integers(1, 50))
def test_long_axes_are_counted_without_visiting_every_block(
    case: Case, axis: int, chunk: int
) -> None:
    """Long enough that middle blocks are gathered: compared with every block along one axis."""
    config, domain = case
    roi = config.roi and config.roi.model_copy(
        update={
            "start": only(axis, config.roi.start, domain.start),
            "stop": only(axis, config.roi.stop, [a + 1 for a in domain.start]),
        }
    )
    volume = Box(start=domain.start, stop=only(axis, domain.stop, [a + 1 for a in domain.start]))
    plan = Plan.from_config(config.model_copy(update={"roi": roi}), volume)
    chunk_shape = triple([chunk if i == axis else 1 for i in range(3)])
    work = work_of(plan, chunk_shape).axes[axis]
    blocks = list(plan)
    starts = [block.starts[axis] for block in blocks]
    counts = [len(s) for s in starts]
    reads = [block.input_box.intersect(volume) for block in blocks]
    assert work.num_patches == sum(counts)
    assert (work.least_patches, work.most_patches) == (min(counts), max(counts))
    assert counts.count(work.typical_patches) == max(counts.count(n) for n in set(counts))
    assert work.num_voxels_read == sum(box.shape[axis] for box in reads)
    wide = [aligned(box, volume, chunk_shape).shape[axis] for box in reads]
    assert work.num_voxels_decoded == sum(wide)


@settings(max_examples=40)
@given(cases(largest=25), triples(1, 3), triples(1, 3))
def test_files_and_whole_blocks_are_counted(case: Case, unit: Triple, times: Triple) -> None:
    config, domain = case
    block = config.block.model_copy(
        update={"shape": triple([a * b for a, b in zip(unit, times, strict=True)])}
    )
    output = config.output.model_copy(update={"chunk_shape": unit, "dtype": "uint16"})
    model = config.model.model_copy(update={"out_channels": 3})
    config = config.model_copy(update={"block": block, "output": output, "model": model})
    plan = Plan.from_config(config, domain)
    assume(len(plan) <= 3000)
    found = estimate(Premise(plan=plan, config=config, info=make_info(domain)))
    files = Grid(origin=plan.output_domain.start, step=unit, bounds=plan.roi)
    assert found.num_files == len(files)
    assert found.num_whole_blocks == sum(b.core.shape == plan.block_shape for b in plan)
    assert found.output_nbytes == plan.roi.num_voxels * 3 * 2
    assert found.read_nbytes == found.work.num_voxels_read


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize(
    "shape", [(10**5, 10**5, 10**5), (1, 1, 10**15), (10**7, 1, 10**8), (10, 10**12, 10**2)]
)
def test_petavoxels_take_no_time(stitch: str, shape: Triple) -> None:
    patch = triple([min(n, 997) for n in shape])
    # A rod needs long blocks: no run has more than a billion of them.
    block = triple([min(n, 1021 if n < 10**15 else 10**7 + 19) for n in shape])
    overlap = triple([min(n - 1, 60) for n in patch])
    config = make_config(patch, block, patch_overlap=overlap, block_stitch=stitch)
    started = time.perf_counter()
    found = estimate_of(config, shape, chunk_shape=(61, 67, 71))
    assert time.perf_counter() - started < 5
    assert found.work.redundancy >= 0.9 and found.work.read_amplification >= 1
    assert found.work.decode_amplification is not None
    assert found.work.decode_amplification >= found.work.read_amplification


def test_blocks_of_whole_strides_waste_nothing() -> None:
    config = make_config((20, 20, 20), (32, 48, 64), patch_overlap=(4, 4, 4))
    work = estimate_of(config, (320, 480, 640)).work
    assert work.patches_per_block[1] == 2 * 3 * 4
    assert work.num_patches == 20 * 30 * 40
    assert 1 <= work.redundancy < 1.01


def test_unknown_chunks_are_not_guessed() -> None:
    config = make_config((4, 4, 4), (8, 8, 8))
    assert estimate_of(config, (16, 16, 16)).work.decode_amplification is None


def test_input_that_no_network_reads_is_refused() -> None:
    with pytest.raises(UserError, match="complex64") as caught:
        estimate_of(make_config((4, 4, 4), (8, 8, 8)), (16, 16, 16), dtype=np.dtype("complex64"))
    assert caught.value.key == "input.volume"
