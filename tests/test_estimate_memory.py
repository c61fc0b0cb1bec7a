"""Memory by part: what a rank, its device and its host hold."""

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest

from mpichunk.geometry.box import Triple
from mpichunk.plan.estimate import Estimate
from mpichunk.plan.memory import START_SPREAD, unexplained_nbytes
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Pace, Probe
from tests.geometries import estimate_of, make_config, make_info, make_plan


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


def test_what_bench_has_found_besides_is_added() -> None:
    """The peak of `bench`, and a tenth, is what is projected of the blocks that it ran."""
    config = make_config((10, 10, 10), (16, 16, 16))
    probe = Probe(seconds=1.0, nbytes=1, device="cpu", resident_nbytes=10**8, start_nbytes=10**9)

    def projected(probe: Probe) -> int:
        found = estimate_of(config, (64, 64, 64), probe=probe)
        return sum(cpu or 0 for cpu, _, _ in memory_of(found).values())

    peak, known = 2 * 10**8, projected(replace(probe, start_nbytes=None))
    plan = make_plan(config, (64, 64, 64))

    premise = Premise(
        plan=plan, config=config, info=make_info(plan.volume), num_blocks=64, probe=probe
    )

    def unexplained(peak: int) -> int:
        return unexplained_nbytes(premise, peak_nbytes=peak, memory="cpu")

    more = unexplained(peak)
    assert more == peak * 11 // 10 - known > 0
    told = replace(probe, start_nbytes=None, more_nbytes=more)
    assert projected(told) == peak * 11 // 10
    assert unexplained(10**7) == 0


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
    most_nbytes = start_nbytes + start_nbytes // START_SPREAD
    assert found.cpu_nbytes == max(most_nbytes, without.cpu_nbytes)
    assert found.host_nbytes == max(most_nbytes, without.host_nbytes)
    assert found.device_nbytes == without.device_nbytes
