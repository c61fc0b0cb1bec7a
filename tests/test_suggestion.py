"""Suggested blocks: each is one that a config may have, and their order is that of brute force."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.config.rules import find_problems
from mpichunk.config.schema import Config, flatten
from mpichunk.geometry.box import Box, Triple, triple
from mpichunk.plan.estimate import estimate
from mpichunk.plan.fit import Room
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.suggestion import (
    SAME_TIME,
    Suggestion,
    Suggestions,
    chunk_for,
    suggest,
    with_block,
)
from mpichunk.plan.suggestionreport import nothing_words, render_suggestions, suggestions_json
from mpichunk.words import parse_size
from tests.endtoend import write_config
from tests.geometries import cases, make_config, make_info, make_plan, triples
from tests.test_prediction import PACE, brute_seconds, deal

Case = tuple[Config, Box]
ROOM = Room(nbytes=2 << 30, words="as asked for")


def suggestions(plan: Plan, config: Config, **more: Any) -> Suggestions:
    """Return the suggestions over the plan's volume, with plenty of memory unless it is given."""
    known = {"limit_nbytes": 1 << 40, "memory": "cpu"}
    info = make_info(plan.volume, chunk_shape=more.pop("chunk_shape", (4, 4, 4)))
    premise = Premise(
        plan=plan,
        config=config,
        info=info,
        num_ranks=more.pop("num_ranks", 3),
        probe=more.pop("probe", None),
    )
    return suggest(premise, **(known | more))


def with_unit(case: Case, unit: Triple, times: Triple, shard: bool) -> Case:
    """Return a case whose output has chunks of this shape, or shards of two of them."""
    config, domain = case
    whole = triple([(2 if shard else 1) * n for n in unit])
    block = triple([a * b for a, b in zip(whole, times, strict=True)])
    output = config.output.model_copy(
        update={
            "volume": "file:///out|zarr3:",
            "chunk_shape": unit,
            "shard_shape": whole if shard else None,
        }
    )
    return with_block(config, block).model_copy(update={"output": output}), domain


@settings(max_examples=25, deadline=None)
@given(cases(largest=12), triples(1, 4), triples(1, 3), st.booleans(), st.booleans(), st.data())
def test_every_shape_is_one_that_a_config_may_have(
    case: Case, unit: Triple, times: Triple, shard: bool, is_open: bool, data: st.DataObject
) -> None:
    config, domain = with_unit(case, unit, times, shard)
    plan = Plan.from_config(config, domain)
    info = make_info(domain, chunk_shape=(4, 4, 4))
    everything = suggestions(plan, config, is_chunk_open=is_open, most=99)
    assert everything.rows and everything.num_tried >= len(everything.rows)
    least = everything.smallest_nbytes
    limit = data.draw(st.integers(least, max(row.nbytes for row in everything.rows) + 1))
    found = suggestions(plan, config, is_chunk_open=is_open, limit_nbytes=limit)
    for row in found.rows:
        assert row.nbytes <= limit
        other = with_block(config, row.block_shape, row.chunk_shape)
        assert find_problems(flatten(other)) == []
        for axis in range(3):
            assert row.block_shape[axis] % plan.stride[axis] == 0
            assert row.block_shape[axis] % other.write_unit[axis] == 0
        # What is told is what `plan` tells once the shape is chosen.
        plan_of_other = Plan.from_config(other, domain)
        told = estimate(Premise(plan=plan_of_other, config=other, info=info, num_ranks=3))
        assert (row.nbytes, row.work) == (told.cpu_nbytes, told.work)
    now = estimate(Premise(plan=plan, config=config, info=info, num_ranks=3))
    assert (found.now.nbytes, found.now.work) == (now.cpu_nbytes, now.work)


def brute(row: Suggestion, plan: Plan, config: Config, num_ranks: int) -> float:
    other = with_block(config, row.block_shape, row.chunk_shape)
    return deal(brute_seconds(Plan.from_config(other, plan.volume), other), num_ranks)


@settings(max_examples=20, deadline=None)
@given(cases(largest=14), st.integers(1, 6), st.integers(1, 3))
def test_the_order_is_that_of_all_patches_counted_one_by_one(
    case: Case, num_ranks: int, batch: int
) -> None:
    config, domain = case
    patch = config.patch.model_copy(update={"batch_size": batch})
    output = config.output.model_copy(update={"chunk_shape": (1, 1, 1)})
    config = config.model_copy(update={"patch": patch, "output": output})
    plan = Plan.from_config(config, domain)
    found = suggestions(plan, config, num_ranks=num_ranks, most=99)
    assume(max(row.work.num_blocks for row in found.rows) <= 3000)
    times = [brute(row, plan, config, num_ranks) for row in found.rows]
    assert times == pytest.approx([row.forecast.seconds for row in found.rows])
    for earlier, later in pairwise(times):
        assert earlier <= later * (1 + 2 * SAME_TIME)
    # Nothing that was tried is better, and all multiples of a short axis were tried.
    shapes = [range(s, n + s, s) for s, n in zip(plan.stride, domain.shape, strict=True)]
    every = [
        brute(
            replace(found.now, block_shape=(z, y, x), chunk_shape=(1, 1, 1)),
            plan,
            config,
            num_ranks,
        )
        for z in shapes[0][:3]
        for y in shapes[1][-2:]
        for x in shapes[2][:2]
    ]
    assert min(times) <= min(every) * (1 + 1e-9)


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize("probe", [None, Probe(seconds=1.0, nbytes=1, device="cpu", pace=PACE)])
def test_petavoxels_take_seconds(stitch: str, probe: Probe | None) -> None:
    config = make_config(
        (20, 256, 256), (128, 1024, 1024), patch_overlap=(4, 64, 64), block_stitch=stitch
    )
    plan = make_plan(config, (10**5, 10**5, 10**5))
    started = time.perf_counter()
    found = suggestions(
        plan,
        config,
        num_ranks=1000,
        limit_nbytes=8 << 30,
        chunk_shape=(64, 64, 64),
        probe=probe,
        is_chunk_open=True,
    )
    assert time.perf_counter() - started < 10
    assert len(found.rows) == 6 and found.num_tried > 100


def test_ranks_are_weighed_against_patches() -> None:
    """Large seamless blocks repeat fewer patches; with many ranks they leave most of them idle."""
    config = make_config((8, 8, 8), (12, 12, 12), patch_overlap=(2, 2, 2), block_stitch="seamless")
    config = config.model_copy(
        update={"output": config.output.model_copy(update={"chunk_shape": (6, 6, 6)})}
    )
    plan = make_plan(config, (48, 48, 48))
    alone, many = (suggestions(plan, config, num_ranks=n).rows[0] for n in (1, 64))
    assert alone.work.redundancy < many.work.redundancy
    assert many.forecast.idle_share < 0.5 and many.work.num_blocks >= 64


def test_an_open_chunk_is_chosen_with_the_block() -> None:
    assert chunk_for(960) == 64 and chunk_for(384) == 64 and chunk_for(95) == 95
    config = make_config((64, 64, 64), (128, 128, 128), patch_overlap=(16, 16, 17))
    plan = make_plan(config, (600, 600, 600))
    fixed = suggestions(plan, config)
    # A stride of 47 and a chunk of 64 meet at 3008 voxels.
    assert {row.block_shape[2] for row in fixed.rows} == {3008}
    opened = suggestions(plan, config, is_chunk_open=True)
    for row in opened.rows:
        assert row.block_shape[2] % 47 == 0 and row.block_shape[2] < 3008
        assert row.block_shape[2] % row.chunk_shape[2] == 0 and row.chunk_shape[2] >= 47


def test_nothing_fits() -> None:
    config = make_config((8, 8, 8), (16, 16, 16))
    plan = make_plan(config, (64, 64, 64))
    found = suggestions(plan, config, limit_nbytes=1000)
    assert found.rows == () and found.smallest_nbytes > 1000
    # The table says what is needed now; the error that follows says that nothing fits.
    text = render_suggestions(plan, config, found, room=ROOM, memory="cpu", probe=None)
    assert "now" in text and "no shape fits" not in text and "nothing here" not in text
    text = nothing_words(found, ROOM, None)
    assert "no shape fits" in text and "patch.batch_size" in text


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (None, "x best"),
        (Probe(seconds=1.0, nbytes=1, device="cuda:0 H200"), "network alone"),
        (
            Probe(seconds=1.0, nbytes=1, device="cpu", pace=PACE),
            "predicted by `bench` with 2 ranks",
        ),
    ],
)
def test_text_and_json(probe: Probe | None, words: str) -> None:
    config = make_config((20, 256, 256), (128, 1024, 1024), patch_overlap=(4, 64, 64))
    plan = make_plan(config, (1000, 4096, 4096))
    found = suggestions(
        plan, config, num_ranks=60, limit_nbytes=4 << 30, probe=probe, is_chunk_open=True
    )
    text = render_suggestions(plan, config, found, room=ROOM, memory="cpu", probe=probe)
    assert words in " ".join(text.split()) and "fewer patches" in text
    assert max(map(len, text.splitlines())) <= 110 and text.isascii() and text.endswith("\n")
    assert not any(line != line.rstrip() for line in text.splitlines())
    told = json.loads(json.dumps(suggestions_json(found, room=ROOM, memory="cpu")))
    assert [tuple(item["block_shape"]) for item in told["suggestions"]] == [
        row.block_shape for row in found.rows
    ]
    assert (told["now"]["seconds"] is None) == (probe is None)
    for item in told["suggestions"]:
        assert item["options"][0] in text and item["reasons"][0].split(";")[0][:20] in text


def config_file(folder: Path, **output: Any) -> Path:
    return write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=96,400,400&seed=1"},
        model={"backend": "identity"},
        patch={"shape": [16, 64, 64], "overlap": [4, 16, 16]},
        block={"shape": [40, 100, 100]},
        output={"volume": "out.zarr", "dtype": "uint8", **output},
    )


@pytest.mark.parametrize(
    "output",
    [
        {},
        {"chunk_shape": [20, 50, 50]},
        {"chunk_shape": None},
        {"shard_shape": [40, 50, 100]},
        {"chunk_shape": [20, 25, 25], "shard_shape": [40, 50, 50]},
    ],
)
def test_options_can_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: dict[str, Any]
) -> None:
    path = config_file(tmp_path, **output)
    before = path.read_bytes()
    command = ["plan", str(path), "--suggest", "--ranks", "4", "--memory", "300MB", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["limit_nbytes"] == 300_000_000 and told["suggestions"]
    chunk = output.get("chunk_shape")
    for item in told["suggestions"]:
        config = load_config(path, item["options"]).config
        assert list(config.block.shape) == item["block_shape"]
        assert list(config.chunk_shape) == item["chunk_shape"]
        assert chunk is None or list(config.chunk_shape) == chunk
        overrides = [word for option in item["options"] for word in ("--set", option)]
        assert main(["plan", str(path), "--json", "--ranks", "4", *overrides]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["patches"]["num"] == item["num_patches"]
        assert plan["memory"]["cpu_nbytes"] == item["nbytes"] <= 300_000_000
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_memory_of_this_machine_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path)
    assert main(["plan", str(path), "--suggest"]) == 0
    text = capsys.readouterr().out
    assert "this machine" in text and "--set 'block.shape=[" in text
    # Of an accelerator nobody knows before something was measured.
    network = [
        "--set",
        "model={backend: pytorch, path: net.py:Net}",
        "--set",
        "compute.device=cuda",
    ]
    (tmp_path / "net.py").write_text("")
    assert main(["plan", str(path), "--suggest", *network]) == 2
    assert "--memory 80GB" in capsys.readouterr().err
    assert main(["plan", str(path), "--suggest", "--memory", "1GiB", *network]) == 0
    assert "accelerator memory" in capsys.readouterr().out


def test_beside_an_accelerator_the_host_must_suffice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path)
    (tmp_path / "net.py").write_text("")
    network = "model={backend: pytorch, path: net.py:Net, out_channels: 3}"
    command = ["plan", str(path), "--suggest", "--set", network, "--set", "compute.device=cuda"]
    command += ["--set", "output.dtype=float32", "--memory", "4GiB", "--ranks", "2"]
    found = {}
    for limit in ("64GiB", "440MiB"):
        assert main([*command, "--host-memory", limit, "--json"]) == 0
        found[limit] = json.loads(capsys.readouterr().out)
        assert found[limit]["memory"] == "device" and found[limit]["suggestions"]
        assert found[limit]["host_limit_nbytes"] == parse_size(limit)
    most = {
        limit: max(row["host_nbytes"] for row in told["suggestions"])
        for limit, told in found.items()
    }
    assert most["440MiB"] <= 440 << 20 < most["64GiB"]
    # What fits is what `plan` says of it.
    for row in found["440MiB"]["suggestions"]:
        words = [word for option in row["options"] for word in ("--set", option)]
        plain = [word for word in command if word != "--suggest"]
        del plain[plain.index("--memory") : plain.index("--memory") + 2]
        assert main([*plain, "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["memory"]["host_nbytes"] == row["host_nbytes"]
    assert main([*command, "--host-memory", "1MiB"]) == 2
    out, err = capsys.readouterr()
    assert "no shape fits" not in out
    text = " ".join(err.split())
    assert "no shape fits 1.0 MiB of the host's memory" in text and "set --host-memory" in text
    assert main(command) == 0
    assert "host memory: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "lots", "3XB", "-3GB", "16GBs", "16", "0GB"])
def test_no_sizes_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "x.yaml", "--suggest", f"--memory={text}"])
    assert "16GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16B", 16),
        ("16GB", 16 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("500m", 500 << 20),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes
