"""Benchmarks: what follows from the seconds, and whole ones, which leave nothing behind."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpichunk.backends.engine import Arrays
from mpichunk.backends.stageclock import STAGE_OF, STAGES, UNTIMED
from mpichunk.bench.figures import Pass, RankFigures, combine, pace, suggest
from mpichunk.bench.scratch import scratch_output, scratch_parent
from mpichunk.cli import main
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.errors import UserError, VolumeError
from mpichunk.geometry.box import Box
from mpichunk.job.probing import read_probe, warm_seconds, write_probe
from mpichunk.job.startup import prepare
from mpichunk.plan.prediction import forecast
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import work_of
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.bench import Options, bench_on, choose_blocks
from mpichunk.verbs.run import run_on
from tests.endtoend import files_of, write_config
from tests.geometries import make_config, make_plan
from tests.launch import Launch, finish
from tests.test_run_reference import NET

SHORT = Options(num_repeats=2, num_blocks=2, as_json=True)


def rank(
    whole: list[float],
    bare: list[float],
    *,
    voxels: int = 10**6,
    num_blocks: int = 1,
    device: str = "cpu",
    **stages: float,
) -> Any:
    """Return the figures of one rank that has run 8 patches a repeat."""
    seconds = dict.fromkeys(STAGES, 0.0) | {"forward": 1.0} | stages
    passes = tuple(
        Pass(
            seconds=s,
            num_voxels=voxels,
            num_patches=8,
            num_batches=4,
            nbytes_read=0,
            nbytes_written=0,
            num_blocks=num_blocks,
            read_seconds=num_blocks * seconds["read"],
            write_seconds=num_blocks * seconds["write"],
        )
        for s in whole
    )
    return RankFigures(host="a", device=device, whole=passes, bare=tuple(bare), stages=seconds)


def gpu(*, forward: float, num_blocks: int = 100, **stages: float) -> Any:
    """Return an accelerator's rank: a block takes 10 s, so much of it forwards."""
    whole, bare = [10.0 * num_blocks], [forward * num_blocks]
    how = {"num_blocks": num_blocks, "device": "cuda:0 A"}
    return rank(whole, bare, forward=forward, **how, **stages)


def test_figures_of_one_rank() -> None:
    found = combine([rank([2.0, 4.0, 2.5], [1.8, 2.0, 2.25], accumulate=0.05, write=0.3)])
    assert (found.whole.median, found.whole.least, found.whole.most) == (0.4, 0.25, 0.5)
    assert found.bare.median == 0.5
    assert found.efficiency.median == pytest.approx(0.9)
    assert found.seconds_per_batch == pytest.approx((1.8 + 2 + 2.25) / 12)
    assert found.blending == pytest.approx(0.9 * 0.05)
    assert found.waiting == pytest.approx(1 - 0.9 - 0.045)
    assert (found.bound_by, found.num_patches) == ("the network", 8)


def test_the_slowest_rank_counts() -> None:
    found = combine([rank([2.0], [1.8]), rank([4.0], [3.0])])
    assert found.whole.median == pytest.approx(2 / 4)
    assert found.bare.median == pytest.approx(2 / 3)
    assert found.efficiency.median == pytest.approx(3 / 4)
    assert found.num_patches == 16


def test_shares_are_shares_also_where_noise_has_a_part_outlast_the_whole() -> None:
    found = combine([rank([2.0], [2.4], accumulate=0.05)])
    assert found.efficiency.median == pytest.approx(1.2)
    assert (found.network, found.blending, found.waiting) == (1, 0, 0)
    assert found.is_noise and found.bound_by == "the network"
    assert not combine([rank([2.0], [2.02])]).is_noise


@pytest.mark.parametrize("stages", [{}, {"read": 9.0}, {"write": 3.0, "accumulate": 1.0}])
def test_what_was_measured_predicts_itself(stages: dict[str, float]) -> None:
    """One block of 8 patches in 4 batches, as `rank` has run: it takes as long as it took."""
    config = make_config((50, 50, 50), (100, 100, 100), patch_overlap=(0, 0, 0), patch_batch_size=2)
    ranks = [rank([2.0, 4.0, 2.5], [1.8, 2.0, 2.25], **stages) for _ in range(2)]
    figures = combine(ranks)
    work = work_of(make_plan(config, (100, 100, 100)))
    found = pace(figures, ranks, work, num_blocks=1)
    assert found.num_ranks == 2
    probe = Probe(seconds=figures.seconds_per_batch, nbytes=None, device="cpu", pace=found)
    for num_ranks in (1, 2):
        plan = make_plan(config, (100, 100, 100 * num_ranks))
        expected = forecast(plan, config, work_of(plan), probe, num_ranks=num_ranks)
        assert expected.seconds == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("figures", "bound_by"),
    [
        (rank([2.0], [1.9]), "the network"),
        (rank([2.0], [0.5], accumulate=2.0), "blending"),
        (rank([2.0], [0.5], read=4.0), "reading"),
        (rank([2.0], [0.5], read=1.0, write=4.0), "writing"),
        (rank([2.0], [0.0], forward=0.0, accumulate=2.0, write=0.1), "blending"),
        (rank([2.0], [0.5], read=0.1, write=0.2, host=1.2), "the host"),
        # An accelerator that waits most of its time, while blocks are read and written beside it.
        (gpu(forward=3.0, read=3.0, write=4.0), "the host"),
        (gpu(forward=3.0, read=3.0, write=20.0), "writing"),
        (gpu(forward=3.0, read=24.0, write=1.0), "reading"),
        # Neither keeps two threads busy, but no more than three blocks are on their way.
        (gpu(forward=2.0, read=14.0, write=14.0), "reading"),
    ],
)
def test_bottleneck(figures: RankFigures, bound_by: str) -> None:
    assert combine([figures]).bound_by == bound_by


def test_input_and_output_explain_no_more_than_their_seconds() -> None:
    # The first read and the last write of four blocks hide behind nothing.
    found = combine([gpu(forward=5.0, num_blocks=4, accumulate=1.0, read=1.0, write=3.0, host=4.0)])
    shares = found.network, found.blending, found.waiting, found.host
    assert shares == pytest.approx((0.5, 0.1, 0.1, 0.3))
    assert found.own_host == pytest.approx(0.4)
    # On a CPU they take its cores all the time.
    own = rank([40.0], [20.0], num_blocks=4, forward=5.0, accumulate=1.0, read=1.0, write=2.5)
    found = combine([own])
    assert (found.waiting, found.host) == pytest.approx((0.35, 0.05))


def test_every_operation_of_arrays_is_timed_or_known_to_be_none_of_a_block() -> None:
    operations = {name for name in vars(Arrays) if not name.startswith("_")}
    assert operations == STAGE_OF.keys() | UNTIMED
    assert not STAGE_OF.keys() & UNTIMED
    assert set(STAGE_OF.values()) <= set(STAGES)


def advice_of(figures: RankFigures, *, on_cpu: bool = True, **more: Any) -> list[str]:
    model = {"backend": "pytorch", "path": "/n.pt"}
    config = make_config((8, 8, 8), (16, 16, 16), **({"model": model} | more))
    plan = make_plan(config, (64, 64, 64))
    found = suggest(
        combine([figures]), config, work_of(plan, (32, 32, 32)), on_cpu=on_cpu, num_blocks=4
    )
    return [f"{advice.key}: {advice.message}" for advice in found]


def test_advice_is_about_what_takes_the_time() -> None:
    network = advice_of(rank([2.0], [1.9]))
    assert network[0].startswith("model.backend: 95% of the time is the network's own")
    assert any("openvino" in line for line in network)
    on_device = advice_of(rank([2.0], [1.9]), on_cpu=False)
    assert any(line.startswith("patch.batch_size") for line in on_device)
    assert not any("openvino" in line for line in on_device)
    (blending, *_) = advice_of(rank([2.0], [0.5], accumulate=2.0))
    assert blending.startswith("patch.overlap: the network is so small")
    (reading, *_) = advice_of(rank([2.0], [0.5], read=4.0))
    assert reading.startswith("block.shape: the input arrives more slowly")
    assert "storage chunks are read" in reading
    writing = advice_of(rank([2.0], [0.5], write=4.0))
    assert "uint8 holds a probability" in writing[0]
    assert writing[1].startswith("output.chunk_shape")
    assert "only 4 blocks" in writing[2]
    (busy, *_) = advice_of(rank([2.0], [1.0]))
    assert busy.startswith("compute.threads: 50% of the time is in no stage")
    (between, *_) = advice_of(rank([2.0], [1.0], host=0.9))
    assert between.startswith("patch.shape: 50% of the time is work between the stages")


def test_advice_where_an_accelerator_waits_for_its_host() -> None:
    own = gpu(forward=3.0, read=3.0, write=4.0, host=6.0)
    keys = [line.partition(":")[0] for line in advice_of(own, on_cpu=False)]
    assert keys == ["patch.batch_size", "compute.cuda_graphs"]
    graphs = {"compute": {"cuda_graphs": True}}
    (line,) = advice_of(own, on_cpu=False, **graphs)
    assert "the device waits for the host" in line
    (_, _, busy) = advice_of(replace(own, stages=own.stages | {"host": 0.1}), on_cpu=False)
    assert busy.startswith("compute.threads")


def test_advice_when_nothing_ran() -> None:
    blank = rank([2.0], [0.0], forward=0.0)
    empty = RankFigures(
        host="a",
        device="cpu",
        whole=tuple(
            Pass(
                seconds=1,
                num_voxels=10,
                num_patches=0,
                num_batches=0,
                nbytes_read=0,
                nbytes_written=0,
                num_blocks=1,
                read_seconds=0,
                write_seconds=0,
            )
            for _ in blank.whole
        ),
        bare=(0.0,),
        stages=blank.stages,
    )
    (line,) = advice_of(empty)
    assert line.startswith("roi: no patch ran")


# Blocks and places


def everything(core: Box) -> bool:
    return True


def test_whole_blocks_from_the_middle_are_chosen() -> None:
    plan = make_plan(make_config((4, 4, 4), (8, 8, 8)), (20, 20, 20))
    assert plan.grid.shape == (3, 3, 3)
    # 8 of the 27 are whole; the middle one is block 13.
    assert choose_blocks(plan, everything, num=3) == [13, 0, 1]
    assert sorted(choose_blocks(plan, everything, num=99)) == [0, 1, 3, 4, 9, 10, 12, 13]
    wanted = plan.grid[4]
    assert choose_blocks(plan, lambda core: core == wanted, num=3) == [4]


def test_largest_blocks_are_chosen_where_none_is_whole() -> None:
    plan = make_plan(make_config((4, 4, 4), (8, 8, 8)), (6, 6, 7))
    assert choose_blocks(plan, everything, num=3) == [0]
    plan = make_plan(make_config((4, 4, 4), (8, 8, 8)), (6, 6, 13))
    assert choose_blocks(plan, everything, num=3) == [0]


def test_nothing_to_choose_from() -> None:
    plan = make_plan(make_config((4, 4, 4), (8, 8, 8)), (16, 16, 16))
    with pytest.raises(UserError, match="the mask leaves nothing"):
        choose_blocks(plan, lambda core: False, num=3)


def config_file(folder: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "input": {"volume": "synthetic://membranes?shape=24,40,40&seed=3"},
        "model": {"backend": "pytorch", "path": "net.py:Net", "out_channels": 2},
        "patch": {"shape": [8, 16, 16], "overlap": [2, 4, 4]},
        "block": {"shape": [12, 16, 16]},
        "output": {"volume": "out/pred.zarr", "dtype": "uint8", "chunk_shape": [12, 8, 8]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = write_config(folder, **values)
    (folder / "net.py").write_text(NET)
    return path


@pytest.mark.parametrize(
    "volume",
    [
        "out/pred.zarr",
        "file://out/pred|zarr3:",
        "zarr2://file://out/pred",
        "precomputed://file://out/pred",
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": "out/pred/"}},
    ],
)
def test_scratch_is_like_the_output_and_goes(tmp_path: Path, volume: Any) -> None:
    output = load_config(config_file(tmp_path, output={"volume": volume})).config
    spec = prepare(output).output
    parent = scratch_parent(spec, None)
    assert parent == tmp_path, "the nearest folder that is there"
    with pytest.raises(KeyError), scratch_output(spec, parent) as scratch:
        assert (scratch.dtype, scratch.domain) == (spec.dtype, spec.domain)
        assert any(name.startswith(".mpichunk-bench-") for name in files_of(tmp_path))
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "net.py"]


def test_scratch_elsewhere(tmp_path: Path) -> None:
    spec = prepare(load_config(config_file(tmp_path)).config).output
    assert scratch_parent(spec, tmp_path / ".") == tmp_path
    with pytest.raises(VolumeError, match="is no folder"):
        scratch_parent(spec, tmp_path / "nowhere")
    with (
        pytest.raises(VolumeError, match="cannot be written"),
        scratch_output(spec, tmp_path / "nowhere"),
    ):
        pass


def test_scratch_of_a_bucket_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    spec = prepare(load_config(config_file(tmp_path)).config).output
    spec = replace(spec, volume="gs://bucket-of-nobody/pred|zarr3:")
    parent = scratch_parent(spec, None)
    assert parent == tmp_path / "tmp"
    with scratch_output(spec, parent):
        assert any(name.endswith("zarr.json") for name in files_of(parent))
    assert files_of(parent) == {}


# Whole benchmarks


def run_bench(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert bench_on(SerialCommunicator(), path, overrides, SHORT) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": {"batch_size": 3}, "model": {"augment": ["flip_z", "flip_y"]}},
        {"model": {"activation": "softmax"}, "output": {"reduce": "vote"}},
        {"output": {"volume": "precomputed://file://out/pred"}},
    ],
)
def test_bench_measures_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    path = config_file(tmp_path, **changes)
    found = run_bench(path, capsys)
    assert found["num_ranks"] == 1 and found["num_repeats"] == 2
    assert found["engine"]["backend"] == "pytorch" and found["engine"]["threads"] == 1
    blocks = found["blocks"]
    assert blocks["per_rank"] == 2 and blocks["num_voxels"] == 2 * 12 * 16 * 16
    config = load_config(path).config
    work = prepare(config).estimate().work
    assert found["redundancy"] == work.redundancy
    turns = len(changes.get("model", {}).get("augment", [])) * 2 or 1
    assert found["turns"] == turns
    (own,) = found["ranks"]
    for item in own["whole"]:
        batches = sum(-(-n // config.patch.batch_size) for n in [item["num_patches"] // 2] * 2)
        assert item["num_batches"] == turns * batches
        assert item["seconds"] > 0 and item["nbytes_written"] > 0
    for name in ("bare", "whole"):
        spread = found["mvox_per_second"][name]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert found["efficiency"]["median"] > 0
    assert set(found["stages"]) == set(STAGES) and min(found["stages"].values()) > 0
    assert found["bound_by"] and found["advice"][0]["message"]
    # Nothing but what the forward told.
    left = {name for name in files_of(tmp_path) if "__pycache__" not in name}
    assert left == {"config.yaml", "net.py", "runs/config/probe.json"}


def test_plan_and_run_know_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    assert main(["plan", str(path)]) == 0
    assert "unmeasured" in capsys.readouterr().out
    found = run_bench(path, capsys)
    assert main(["plan", str(path), "--json"]) == 0
    probe = json.loads(capsys.readouterr().out)["probe"]
    assert probe["seconds"] == found["seconds_per_batch"]
    assert probe["nbytes"] > 0 and probe["device"] == "cpu, 1 CPU threads"
    assert main(["plan", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "for one rank, measured on cpu, 1 CPU threads" in text and "unmeasured" not in text
    # Another network, patch or device is another forward; what only follows it is not.
    assert main(["plan", str(path), "--set", "patch.shape=[8,12,12]"]) == 0
    assert "unmeasured" in capsys.readouterr().out
    assert main(["plan", str(path), "--set", "output.dtype=float32"]) == 0
    assert "unmeasured" not in capsys.readouterr().out
    # A run directory with a probe in it is still a new one.
    assert run_on(SerialCommunicator(), path) == 0


def test_bench_of_a_run_that_is_there_touches_nothing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path)
    assert run_on(SerialCommunicator(), path) == 0
    capsys.readouterr()
    before = files_of(tmp_path)
    # What the run's own forward told is replaced: now more is known.
    assert before.pop("runs/config/probe.json")
    run_bench(path, capsys)
    after = files_of(tmp_path)
    assert after.pop("runs/config/probe.json")
    assert after == before


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, model={"augment": ["rot90"]})
    assert bench_on(SerialCommunicator(), path, [], Options(num_repeats=1, num_blocks=1)) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "measured 1 block per rank and repeat, 1 repeat; 8 patches a repeat" in words
    assert "times the network predicts each voxel, 4 of them turned ways" in words
    assert "of the whole's time:" in words and "bound by" in words
    assert max(len(line) for line in text.splitlines()) <= 110


def test_identity_and_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((24, 40, 40), np.uint8)
    mask[14:20, 20:30, 5:10] = 1
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["mask"] = mask
    sizes = {"voxel_size": [4, 4, 4]}
    path = config_file(
        tmp_path,
        input=sizes,
        model={"backend": "identity", "path": None},
        mask={"volume": "mask.h5"} | sizes,
    )
    found = run_bench(path, capsys)
    assert found["engine"]["backend"] == "identity"
    assert found["mvox_per_second"]["whole"]["median"] > 0
    # Only one block is wanted, and it is whole: z from 12, y from 16, x from 0.
    assert found["blocks"]["indices"] == [12]


def test_blank_region_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "zero.h5", "w") as file:
        file["raw"] = np.zeros((24, 32, 32), np.uint8)
    path = config_file(tmp_path, input={"volume": "zero.h5"})
    found = run_bench(path, capsys)
    assert found["advice"][0]["key"] == "roi" and "no patch ran" in found["advice"][0]["message"]
    assert found["seconds_per_batch"] == 0 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.path=gone.py:Net", "gone.py"),
        ("model.out_channels=3", "model.out_channels"),
        ("roi={start: [0,0,0], stop: [99,1,1]}", "roi"),
        ("model.bogus=1", "unknown key"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    path = config_file(tmp_path)
    assert bench_on(SerialCommunicator(), path, [change], SHORT) == 2
    found = capsys.readouterr()
    assert found.out == "" and message in found.err
    assert "Traceback" not in found.err
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


def test_block_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    net = NET.replace("return self.b(", "return float('nan') * self.b(").replace(
        "def forward(self, x):",
        "def forward(self, x):\n        if x.std() > 0.285: return self.b(torch.relu(self.a(x)))",
    )
    (tmp_path / "net.py").write_text(net)
    assert bench_on(SerialCommunicator(), path, [], SHORT) == 2
    assert "failed (BlockError): the result holds NaN" in capsys.readouterr().err
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_bench_leaves_nothing(tmp_path: Path, name: str) -> None:
    path = config_file(tmp_path)

    def interrupt(process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while not any("/c/" in written for written in files_of(tmp_path)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))

    done = finish(
        [sys.executable, "-m", "mpichunk", "bench", path, "--repeats", 1000], meanwhile=interrupt
    )
    assert done.returncode == 1 and "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(".mpichunk-bench" in str(found) for found in tmp_path.iterdir())


def test_two_ranks(tmp_path: Path, mpirun: Launch) -> None:
    path = config_file(tmp_path)
    done = mpirun(2, "-m", "mpichunk", "bench", path, "--repeats", 1, "--blocks", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_ranks"] == len(found["ranks"]) == 2
    assert found["blocks"]["num_voxels"] == 4 * 12 * 16 * 16
    assert len(found["blocks"]["indices"]) == 4
    assert not any(".mpichunk-bench" in name for name in files_of(tmp_path))


def test_two_ranks_and_a_mistake(tmp_path: Path, mpirun: Launch) -> None:
    path = config_file(tmp_path)
    done = mpirun(2, "-m", "mpichunk", "bench", path, "--set", "model.out_channels=5")
    assert done.returncode == 2
    assert done.stderr.count("the network returned 2 channels") == 1


def test_probe_that_is_damaged_is_none(tmp_path: Path) -> None:
    config = Config.model_validate(load_config(config_file(tmp_path)).config.model_dump())
    files = [tmp_path / "net.py"]
    run_dir = tmp_path / "r"
    assert read_probe(run_dir, config, files) is None
    probe = Probe(seconds=0.5, nbytes=None, device="cpu")
    write_probe(run_dir, config, files, probe)
    assert read_probe(run_dir, config, files) == probe
    files[0].write_text(NET + "\n")
    assert read_probe(run_dir, config, files) is None
    (run_dir / "probe.json").write_text("{")
    assert read_probe(run_dir, config, files) is None


@pytest.mark.parametrize(("seconds", "most_forwards"), [(0.001, 20), (0.3, 1)])
def test_a_forward_is_timed_warm_and_a_long_one_is_not_repeated(
    seconds: float, most_forwards: int
) -> None:
    calls: list[int] = []

    def forward() -> None:
        calls.append(1)
        cold = 0.03 if len(calls) <= 2 and most_forwards > 1 else 0.0
        time.sleep(seconds + cold)

    found = warm_seconds(forward)
    assert len(calls) <= most_forwards
    assert seconds <= found
    assert most_forwards == 1 or found < 0.03
