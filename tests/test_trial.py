"""What one rank measures for a benchmark, without other ranks."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from mpichunk.bench.trial import BlockTrial
from mpichunk.block.inference import BlockInference
from mpichunk.config.file import load_config
from mpichunk.errors import UserError
from mpichunk.job.assembly import bind_ranks, engine_request, load_engine, prepare_network
from mpichunk.job.startup import prepare
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs import bench
from tests.smallrun import config_file


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[BlockInference]:
    """Inferences that were made."""
    made: list[BlockInference] = []
    make = bench.make_inference

    def note(*how):
        made.append(make(*how))
        return made[-1]

    monkeypatch.setattr(bench, "make_inference", note)
    return made


@pytest.fixture
def trial(tmp_path: Path, made: list[BlockInference]):
    job = prepare(load_config(config_file(tmp_path)).config)
    request = engine_request(job, bind_ranks(SerialCommunicator(), job).of(0))
    engine = load_engine(job, request, prepare_network(job, request))
    with ExitStack() as stack:
        yield bench._open(stack, job, engine, request, tmp_path)


def test_memory_is_fresh_for_the_first_pass_only(
    trial: BlockTrial, made: list[BlockInference]
) -> None:
    passes = [trial.whole([13]), trial.whole([13, 13]), trial.whole([13])]
    once = passes[0].num_batches
    assert [item.num_batches for item in passes] == [once, 2 * once, once]
    assert once > 0 and len(made) == 1
    trial.stages(13)
    assert trial._inference is None, "what stays is none of the blocks"


def test_what_an_interrupted_pass_may_still_use_is_not_used_again(
    trial: BlockTrial, made: list[BlockInference], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BlockInference.run

    def fail(*block):
        raise OSError("no such chunk")

    monkeypatch.setattr(BlockInference, "run", fail)
    with pytest.raises(UserError, match="no such chunk"):
        trial.whole([13])
    monkeypatch.setattr(BlockInference, "run", run)
    assert trial.whole([13]).num_batches > 0
    assert len(made) == 2
