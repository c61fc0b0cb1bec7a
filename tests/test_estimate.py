"""Estimates against plans that are walked block by block, and advice against what it promises."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.config.schema import Config
from mpichunk.errors import UserError
from mpichunk.geometry.box import Box, Grid, Triple, triple
from mpichunk.plan.estimate import Estimate, estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.probe import Pace, Probe
from mpichunk.plan.work import floor_sum, work_of
from tests.geometries import cases, make_config, make_info, make_plan, triples

Case = tuple[Config, Box]


def estimate_of(config: Config, domain: Box | Triple, **more: Any) -> Estimate:
    """Return the estimate over a domain; keywords as of `estimate` or of `make_info`."""
    plan = make_plan(config, domain)
    told = {key: more.pop(key) for key in ("model_nbytes", "num_ranks", "probe") if key in more}
    return estimate(plan, config, make_info(plan.volume, **more), **told)


def advice_of(config: Config, domain: Box | Triple) -> dict[str, str]:
    return {advice.key: advice.message for advice in estimate_of(config, domain).advice}


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
    found = estimate(plan, config, make_info(domain))
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


# ---- Memory -----------------------------------------------------------------------------------


def memory_of(found: Estimate) -> dict[str, tuple[int | None, int | None, int | None]]:
    return {p.name: (p.cpu_nbytes, p.host_nbytes, p.device_nbytes) for p in found.memory}


def test_memory_by_part() -> None:
    config = make_config(
        (10, 10, 10),
        (16, 16, 16),
        patch_overlap=(2, 2, 2),
        patch_batch_size=4,
        output_dtype="uint8",
        model={"backend": "pytorch", "path": "/n.pt", "out_channels": 3},
    )
    found = estimate_of(
        config, (160, 160, 160), dtype=np.dtype("uint16"), num_channels=2, model_nbytes=777
    )
    parts = memory_of(found)
    # Two patches of 10 with a stride of 8 are 18 voxels.
    source = 18**3 * 2 * 2
    core = 16**3 * 3
    # Inputs are the larger ones: at the peak two more blocks have been read.
    assert parts["input of the blocks in flight"] == (3 * source, 3 * 2**15 + source, 0)
    # Memory for outputs is kept for the next block; torch pins powers of two.
    assert parts["output of the blocks in flight"] == (3 * core, 3 * 2**14, 0)
    assert "output being encoded" not in parts
    slab, window = 3 * 10 * 16**2 * 4, 10**3 * 4
    # A block has eight patches, each with another window; on a CPU, one is there at a time.
    blending = parts["blending: windows, and a slab as high as a patch"]
    assert blending == (slab + window, 0, slab + 8 * window)
    raw, layer = 4 * 2 * 10**3 * 2, 2 * 10 * 18**2 * 2
    assert parts["raw patches, and the layers that they are cut from"] == (0, 0, raw + 2 * layer)
    assert "mask of the blocks in flight" not in parts
    batch = 4 * (2 + 3) * 1000 * 4
    assert parts["batch into and out of the network"] == (batch, 0, batch)
    assert parts["weights"] == (777, 0, 777)
    assert parts["inside the network"] == (None, 0, None)
    assert "padded copy of one input" not in parts
    assert found.cpu_nbytes == sum(cpu or 0 for cpu, _, _ in parts.values())


def test_a_rank_holds_no_more_blocks_than_it_gets() -> None:
    config = make_config((10, 10, 10), (16, 16, 16), patch_overlap=(2, 2, 2))
    # 16 blocks.
    core, source = 16**3 * 4, prod(estimate_of(config, (32, 32, 64)).work.input_shape)
    for num_ranks, held in ((1, (3, 1, 2)), (8, (2, 1, 1)), (16, (1, 1, 1)), (99, (1, 1, 1))):
        parts = memory_of(estimate_of(config, (32, 32, 64), num_ranks=num_ranks))
        assert parts["output of the blocks in flight"][0] == held[0] * core
        assert parts["input of the blocks in flight"][0] == held[1] * source
        assert parts["output being encoded"][0] == held[2] * core
        pinned = held[0] * 2**14, held[0] * 2**13 + source
        assert parts["output of the blocks in flight"][1] == pinned[0]
        assert parts["input of the blocks in flight"][1] == pinned[1]


def test_memory_of_identity_has_no_torch() -> None:
    config = make_config((10, 10, 10), (16, 16, 16), patch_crop=(1, 0, 0))
    found = estimate_of(config, (64, 64, 64))
    parts = memory_of(found)
    # Outputs are the larger ones: at the peak two blocks are being written.
    assert parts["output of the blocks in flight"] == (3 * 16**3 * 4, 3 * 16**3 * 4, 0)
    assert parts["output being encoded"] == (2 * 16**3 * 4, 2 * 16**3 * 4, 0)
    assert not {"torch", "weights", "inside the network"} & set(parts)
    # Blocks at the faces of the volume need what lies outside it.
    assert parts["padded copy of one input"][0] == prod(found.work.input_shape)


def test_memory_of_large_inputs_peaks_while_reading() -> None:
    config = make_config((20, 20, 20), (8, 8, 8), block_margin=(12, 12, 12), mask={"volume": "m"})
    found = estimate_of(config, (160, 160, 160), num_channels=4)
    parts, num_voxels = memory_of(found), prod(found.work.input_shape)
    assert parts["input of the blocks in flight"][0] == 3 * 4 * num_voxels
    assert parts["mask of the blocks in flight"][0] == 3 * num_voxels
    assert "output being encoded" not in parts


def test_memory_of_the_device_does_not_grow_with_the_length_of_a_block() -> None:
    found = []
    for length in (32, 320):
        config = make_config(
            (20, 64, 64), (length, 192, 192), model={"backend": "pytorch", "path": "/n.pt"}
        )
        found.append(estimate_of(config, (640, 384, 384), model_nbytes=777))
    assert found[1].device_nbytes == found[0].device_nbytes
    assert found[1].host_nbytes > found[0].host_nbytes + 200 * 192**2 * 4


def test_a_probe_fills_in_what_only_a_forward_can_tell() -> None:
    config = make_config((10, 10, 10), (16, 16, 16), model={"backend": "pytorch", "path": "/n.pt"})
    probe = Probe(seconds=0.5, nbytes=10**9, device="cpu")
    assert memory_of(estimate_of(config, (64, 64, 64), probe=probe))["inside the network"] == (
        (10**9, 0, 10**9)
    )


@pytest.mark.parametrize(
    ("write_seconds", "threads", "shard", "num_cores", "num_encoded"),
    [
        (None, None, None, 3, 2),
        (1.0, None, None, 3, 2),
        (1e-9, None, None, 2, 1),
        (None, 1, (16, 16, 16), 3, 4),
    ],
)
def test_quick_writing_needs_less_memory(
    write_seconds: float | None,
    threads: int | None,
    shard: Triple | None,
    num_cores: int,
    num_encoded: int,
) -> None:
    more = {} if shard is None else {"output_shard_shape": shard}
    config = make_config(
        (10, 10, 10),
        (16, 16, 16),
        compute={"threads": threads},
        output_chunk_shape=(8, 8, 8),
        **more,
    )
    pace = None
    if write_seconds is not None:
        pace = Pace(
            patch_seconds=0.0,
            finish_seconds=0.0,
            read_seconds=0.0,
            write_seconds=write_seconds,
            scale=1.0,
            num_ranks=1,
        )
    probe = Probe(seconds=1.0, nbytes=1, device="cpu", pace=pace)
    parts = memory_of(estimate_of(config, (64, 64, 64), probe=probe))
    core = 16**3 * 4
    assert parts["output of the blocks in flight"][0] == num_cores * core
    assert parts["output being encoded"][0] == num_encoded * core


def test_what_a_loaded_rank_holds_replaces_what_was_guessed() -> None:
    config = make_config((10, 10, 10), (16, 16, 16), model={"backend": "pytorch", "path": "/n.pt"})

    def found(**told: Any) -> Estimate:
        probe = Probe(seconds=0.5, nbytes=10**6, device="cpu", **told)
        return estimate_of(config, (64, 64, 64), probe=probe, model_nbytes=777)

    guessed, known = found(), found(resident_nbytes=10**9)
    parts = memory_of(known)
    assert parts["program and network, idle"] == (10**9, 10**9, 0)
    # On an accelerator the weights are not in the host's memory.
    assert parts["weights"] == (0, 0, 777) and memory_of(guessed)["weights"] == (777, 0, 777)
    assert not {"torch", "Python, MPI and storage libraries"} & set(parts)
    assert known.device_nbytes == guessed.device_nbytes
    assert known.cpu_nbytes - known.host_nbytes == guessed.cpu_nbytes - guessed.host_nbytes - 777


@pytest.mark.parametrize("start_nbytes", [1, 10**9, 3 * 10**9])
def test_a_rank_takes_at_least_what_loading_takes(start_nbytes: int) -> None:
    config = make_config((10, 10, 10), (16, 16, 16), model={"backend": "pytorch", "path": "/n.pt"})
    probe = Probe(seconds=0.5, nbytes=10**6, device="cpu", resident_nbytes=10**9)
    without = estimate_of(config, (64, 64, 64), probe=probe)
    found = estimate_of(config, (64, 64, 64), probe=replace(probe, start_nbytes=start_nbytes))
    # And a tenth, by which starts differ.
    most_nbytes = start_nbytes + start_nbytes // 10
    assert found.cpu_nbytes == max(most_nbytes, without.cpu_nbytes)
    assert found.host_nbytes == max(most_nbytes, without.host_nbytes)
    assert found.device_nbytes == without.device_nbytes


# ---- Advice -----------------------------------------------------------------------------------


def test_good_geometry_needs_no_advice() -> None:
    config = make_config((20, 256, 256), (128, 1152, 1152), patch_overlap=(4, 64, 64))
    assert advice_of(config, (1280, 11520, 11520)) == {}
    # One block takes the whole axis: the stride does not matter.
    assert advice_of(make_config((20, 20, 20), (64, 64, 64)), (64, 64, 64)) == {}


def suggested_shape(message: str) -> Triple:
    match = re.search(r"fits: block\.shape \((\d+), (\d+), (\d+)\)", message)
    assert match, message
    return triple([int(n) for n in match.groups()])


def test_misfit_names_the_nearest_block_that_fits_and_its_saving() -> None:
    config = make_config((20, 256, 256), (128, 1024, 1024), patch_overlap=(4, 64, 64))
    domain = Box.from_shape((0, 0, 0), (1280, 23040, 23040))
    message = advice_of(config, domain)["block.shape"]
    assert "on y and x" in message
    shape = suggested_shape(message)
    assert shape == (128, 960, 960)
    better = make_config((20, 256, 256), shape, patch_overlap=(4, 64, 64))
    now = estimate_of(config, domain).work.num_patches
    then = estimate_of(better, domain).work.num_patches
    assert f"{1 - then / now:.1%} fewer patches ({then:,})" in message


@given(triples(6, 40), triples(8, 100), triples(0, 20), triples(1, 8))
def test_suggested_blocks_fit_stride_and_write_unit(
    patch: Triple, block: Triple, overlap: Triple, unit: Triple
) -> None:
    overlap = triple([min(o, q - 2) for o, q in zip(overlap, patch, strict=True)])
    block = triple([max(1, n // u) * u for n, u in zip(block, unit, strict=True)])
    config = make_config(patch, block, patch_overlap=overlap, output_chunk_shape=unit)
    message = advice_of(config, (1000, 1000, 1000)).get("block.shape", "")
    if "fits: block.shape" not in message:
        return
    shape = suggested_shape(message)
    changed_overlap = re.search(r"patch\.overlap \((\d+), (\d+), (\d+)\)", message)
    if changed_overlap:
        overlap = triple([int(n) for n in changed_overlap.groups()])
    stride = triple([q - o for q, o in zip(patch, overlap, strict=True)])
    for axis in range(3):
        assert shape[axis] % unit[axis] == 0
        assert block[axis] <= 2 * shape[axis] <= 4 * block[axis]
        is_misfit = block[axis] % (patch[axis] - config.overlap[axis]) != 0
        if is_misfit and (shape[axis] != block[axis] or overlap[axis] != config.overlap[axis]):
            assert shape[axis] % stride[axis] == 0


def test_where_no_block_fits_an_overlap_is_named() -> None:
    # The stride 47 and the shard 64 meet at 3008 voxels only; overlap 32 has a stride of 32.
    config = make_config(
        (64, 64, 64),
        (64, 64, 64),
        patch_overlap=(16, 16, 17),
        output_chunk_shape=(32, 32, 64),
        output_volume="file:///out/|zarr3:",
    )
    message = advice_of(config, (640, 640, 640))["block.shape"]
    assert "block.shape (96, 96, 64) with patch.overlap (16, 16, 32)" in message


def test_seamless_cost_names_larger_blocks() -> None:
    config = make_config((20, 64, 64), (16, 64, 64), block_stitch="seamless")
    message = advice_of(config, (200, 2000, 2000))["block.shape"]
    assert "(32, 128, 128)" in message and "fewer patches" in message


@pytest.mark.parametrize(
    ("margin", "words"), [((0, 0, 0), "less than half"), ((4, 4, 4), "more than half")]
)
def test_unusual_margins_are_weighed(margin: Triple, words: str) -> None:
    config = make_config((8, 8, 8), (24, 24, 24), block_margin=margin)
    assert words in advice_of(config, (96, 96, 96))["block.margin"]


def test_thin_last_layer() -> None:
    config = make_config((16, 16, 16), (48, 48, 48), patch_overlap=(4, 4, 4))
    message = advice_of(config, (48 * 3 + 3, 96, 96))["block.shape"]
    assert "the last layer of blocks on z is only 3 voxels thick" in message
    assert "stop at 144" in message


def test_batches_that_do_not_fill() -> None:
    config = make_config((8, 8, 8), (12, 12, 12), patch_batch_size=16)
    message = advice_of(config, (96, 96, 96))["patch.batch_size"]
    assert "8 patches" in message and "8 fits" in message


def test_small_volume_and_missing_overlap() -> None:
    config = make_config((8, 8, 8), (8, 8, 8), patch_overlap=(0, 0, 0))
    found = advice_of(config, (5, 64, 64))
    assert "on z: the network sees padding" in found["patch.shape"]
    assert "no overlap on y and x" in found["patch.overlap"]


def test_too_many_files() -> None:
    config = make_config((64, 64, 64), (192, 192, 192), patch_overlap=(16, 16, 16))
    assert (
        "shard_shape (192, 192, 192)" in advice_of(config, (9600, 9600, 9600))["output.shard_shape"]
    )
