"""What follows from the seconds of a benchmark, and which blocks it takes."""

from dataclasses import replace
from typing import Any

import pytest

from mpichunk.backends.engine import Arrays
from mpichunk.backends.stageclock import BENCH_STAGES, STAGE_OF
from mpichunk.bench.figures import Pass, RankFigures, combine, pace, suggest
from mpichunk.errors import UserError
from mpichunk.geometry.box import Box
from mpichunk.plan.prediction import forecast
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import work_of
from mpichunk.verbs.bench import choose_blocks
from tests.geometries import make_config, make_info, make_plan


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
    seconds = dict.fromkeys(BENCH_STAGES, 0.0) | {"forward": 1.0} | stages
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
        premise = Premise(
            plan=plan, config=config, info=make_info(plan.volume), num_ranks=num_ranks, probe=probe
        )
        expected = forecast(premise, work_of(plan))
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


UNTIMED = frozenset(
    {
        # No work.
        "finish_nbytes",
        "is_host",
        # Not for blocks, but before and between them.
        "upload",
        "download",
        "peak_nbytes",
        "most_nbytes",
        "device_nbytes",
        "release",
        # Once: the memory is used again.
        "host_bytes",
        # What the clock itself calls.
        "wait",
    }
)
"""Array operations that belong to no stage."""


def test_every_operation_of_arrays_is_timed_or_known_to_be_none_of_a_block() -> None:
    operations = {name for name in vars(Arrays) if not name.startswith("_")}
    assert operations == STAGE_OF.keys() | UNTIMED
    assert not STAGE_OF.keys() & UNTIMED
    assert set(STAGE_OF.values()) <= set(BENCH_STAGES)


def advice_of(figures: RankFigures, *, device: str = "cpu", **more: Any) -> list[str]:
    model = {"backend": "pytorch", "path": "/n.pt"}
    config = make_config((8, 8, 8), (16, 16, 16), **({"model": model} | more))
    plan = make_plan(config, (64, 64, 64))
    found = suggest(
        combine([figures]), config, work_of(plan, (32, 32, 32)), device=device, num_blocks=4
    )
    return [f"{advice.key}: {advice.message}" for advice in found]


def test_advice_is_about_what_takes_the_time() -> None:
    network = advice_of(rank([2.0], [1.9]))
    assert network[0].startswith("model.backend: 95% of the time is the network's own")
    assert any("openvino" in line for line in network)
    on_device = advice_of(rank([2.0], [1.9]), device="cuda:0")
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
    keys = [line.partition(":")[0] for line in advice_of(own, device="cuda:0")]
    assert keys == ["patch.batch_size", "compute.cuda_graphs"]
    graphs = {"compute": {"cuda_graphs": True}}
    (line,) = advice_of(own, device="cuda:0", **graphs)
    assert "the device waits for the host" in line
    (line,) = advice_of(own, device="xpu:0")
    assert "the device waits for the host" in line, "CUDA graphs require an NVIDIA device"
    (_, _, busy) = advice_of(replace(own, stages=own.stages | {"host": 0.1}), device="cuda:0")
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
    with pytest.raises(UserError, match="the mask excludes every block"):
        choose_blocks(plan, lambda core: False, num=3)
