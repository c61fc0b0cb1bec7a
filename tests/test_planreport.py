"""What `plan` prints: every number that was asked for, in words, and the same as JSON."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.estimate import Estimate, estimate
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Peak, Probe
from mpichunk.plan.report import plan_json, render_plan
from tests.geometries import make_config, make_info

MODEL = {"backend": "pytorch", "path": "/nets/net.pt", "out_channels": 3}
Case = tuple[Plan, Config, VolumeInfo, Estimate]


def case(probe: Probe | None = None, **more: Any) -> Case:
    """Return the arguments of a report: 128 blocks that do not fit their stride."""
    config = make_config(
        (20, 256, 256),
        (128, 1024, 1024),
        **({"patch_overlap": (4, 64, 64), "model": MODEL, "output_dtype": "uint8"} | more),
    )
    info = make_info(
        Box.from_shape((-5, 0, 0), (1000, 4096, 4096)),
        voxel_size=(40.0, 4.0, 4.0),
        chunk_shape=(64, 64, 64),
        dtype=np.dtype("uint8"),
    )
    plan = Plan.from_config(config, info.domain)
    premise = Premise(plan=plan, config=config, info=info, model_nbytes=10**6, probe=probe)
    return plan, config, info, estimate(premise)


def row(text: str, name: str) -> str:
    """Return the rest of the first line that begins with a name, single-spaced."""
    lines = [line.strip() for line in text.splitlines()]
    found = next((line for line in lines if line.startswith(name)), None)
    assert found is not None, text
    return " ".join(found.removeprefix(name).split())


def test_text_tells_everything() -> None:
    text = render_plan(*case())
    assert row(text, "input") == "1,000 4,096 4,096 uint8, 1 channel, voxels of 40 x 4 x 4 nm"
    assert row(text, "starts at").startswith("-5 0 0")
    assert row(text, "output").endswith("uint8, 3 channels")
    assert row(text, "stride").startswith("16 192 192")
    assert row(text, "margin").startswith("2 32 32")
    assert row(text, "blocks") == "128 8 x 4 x 4; 112 whole, 16 clipped by the ROI"
    assert row(text, "patches per block").startswith("288 in most; from")
    assert row(text, "patches to run").startswith("36,288 1.31 times the 27,783")
    assert row(text, "written") == "46.9 GiB before compression, in 65,536 files (chunks)"
    assert row(text, "network time").startswith("unmeasured")
    assert row(text, "inside the network") == "unmeasured - unmeasured"
    assert "block.shape (128, 960, 960)" in " ".join(text.split())
    assert "every voxel 1.13 times; 2.27 times in whole storage chunks" in text


def test_lines_stay_readable() -> None:
    for more in ({}, {"block_stitch": "seamless"}, {"patch_crop": (1, 2, 3)}):
        text = render_plan(*case(**more), num_ranks=1000, num_masked=7)
        assert max(map(len, text.splitlines())) <= 110
        assert not any(line != line.rstrip() for line in text.splitlines())
        assert text.endswith("\n") and text.isascii()


def test_what_does_not_apply_is_not_shown() -> None:
    text = render_plan(*case(model={"backend": "identity"}, block_stitch="seamless"))
    for name in ("margin", "crop", "network time", "torch", "With", "masked", "ROI"):
        assert not any(line.strip().startswith(name) for line in text.splitlines())
    assert "accelerator" not in text and "on a CPU" in text
    assert "  together  " in text


def test_device_chooses_the_memory_columns() -> None:
    assert "on a CPU" in render_plan(*case(compute_device="cpu"))
    text = render_plan(*case(compute_device="cuda"))
    assert "on a CPU" not in text and "accelerator" in text


def test_what_a_run_took_stands_below_what_it_is_of() -> None:
    name = "measured, last run, largest rank"
    peak = Peak(nbytes=3 << 30, device_nbytes=5 << 30)
    probe = Probe(seconds=1.0, nbytes=1, device="cuda:0 H100", free_nbytes=1 << 36)
    assert row(render_plan(*case(probe, compute_device="cuda"), peak=peak), name) == (
        "3.0 GiB 5.0 GiB"
    )
    text = render_plan(*case(probe, compute_device="cuda"), peak=replace(peak, device_nbytes=None))
    assert row(text, name) == "3.0 GiB unmeasured"
    text = render_plan(*case(compute_device="cpu"), peak=Peak(nbytes=3 << 30))
    assert row(text, name) == "3.0 GiB"
    memory = plan_json(*case(), peak=peak)["memory"]
    assert (memory["measured_nbytes"], memory["measured_device_nbytes"]) == (3 << 30, 5 << 30)


def test_ranks_share_the_blocks() -> None:
    text = render_plan(*case(), num_ranks=60)
    assert row(text, "blocks per rank").startswith("2 or 3 28.9% of the ranks' time is idle")
    assert "60 ranks on a node" in text
    assert row(render_plan(*case(), num_ranks=64), "blocks per rank").startswith("2 as many")
    assert "more ranks than blocks" in render_plan(*case(), num_ranks=200)


def test_mask_leaves_blocks_out() -> None:
    text = render_plan(*case(), num_ranks=64, num_masked=64)
    assert row(text, "masked blocks").startswith("64 skipped, about 18,144 patches")
    assert row(text, "blocks per rank").startswith("1 as many")
    render_plan(*case(), num_ranks=64, num_masked=128)


def test_probe_tells_time_and_memory() -> None:
    text = render_plan(*case(Probe(seconds=2.0, nbytes=3 << 30, device="cuda:0 NVIDIA H200")))
    assert row(text, "network time") == "20 h 10 min for one rank, measured on cuda:0 NVIDIA H200"
    assert row(text, "inside the network") == "3.0 GiB - 3.0 GiB"
    assert "  together  " in text


def test_shards_and_roi_are_named() -> None:
    text = render_plan(
        *case(
            output_shard_shape=(128, 512, 512),
            output_chunk_shape=(64, 64, 64),
            output_volume="file:///out|zarr3:",
            roi={"start": (0, 10, 10), "stop": (90, 3000, 3000)},
        )
    )
    assert row(text, "chunk").startswith("64 64 64 smallest piece")
    assert row(text, "shard").startswith("128 512 512 one file")
    assert row(text, "ROI to").startswith("90 3,000 3,000")
    assert "in 36 files (shards)" in text


@pytest.mark.parametrize("num_masked", [None, 5])
def test_json_holds_the_same(num_masked: int | None) -> None:
    arguments = case()
    found = json.loads(json.dumps(plan_json(*arguments, num_ranks=60, num_masked=num_masked)))
    assert found["blocks"] == {
        "num": 128,
        "grid": [8, 4, 4],
        "num_whole": 112,
        "num_masked": num_masked,
    }
    assert found["patches"]["num"] == 36288 and found["patches"]["fewest"] == 27783
    assert found["patches"]["per_block"]["typical"] == 288
    assert found["write"] == {"nbytes": 3 * 1000 * 4096**2, "num_files": 65536}
    assert found["roi"] == {"start": [-5, 0, 0], "stop": [995, 4096, 4096]}
    assert found["memory"]["is_complete"] is False
    parts = {part["name"]: part for part in found["memory"]["parts"]}
    assert parts["inside the network"]["cpu_nbytes"] is None
    assert found["memory"]["cpu_nbytes"] == sum(p["cpu_nbytes"] or 0 for p in parts.values())
    assert found["ranks"]["most_blocks"] == 3
    assert [advice["key"] for advice in found["advice"]] == ["block.shape"]
