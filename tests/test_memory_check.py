"""Ranks weigh memory together: those that compute share it, and no other one has a say."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpichunk.backends.devices.binding import Binding, Bindings
from mpichunk.backends.engine import EngineRequest
from mpichunk.config.file import load_config
from mpichunk.errors import UserError
from mpichunk.job.host_memory import held_nbytes
from mpichunk.job.memory_check import Crew, check_device, check_host
from mpichunk.job.startup import Job, prepare
from mpichunk.plan.estimate import estimate
from mpichunk.plan.memory import least_nbytes
from mpichunk.processmemory import trim
from mpichunk.ranks.comm import SerialCommunicator
from tests.endtoend import write_config
from tests.engines import make_request

MIB = 1 << 20
NUM_RANKS = 3


class ThreadCommunicator(SerialCommunicator):
    """One of some ranks that are threads of this process: the collectives that weighing needs."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank = rank
        self.alive = tuple(range(len(values)))
        self.local_size = len(values)
        self._values, self._barrier = values, barrier

    def allgather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def bcast(self, value: Any, root: int | None = None) -> Any:
        return self.allgather(value)[root or 0]


def on_ranks(call: Callable[[ThreadCommunicator], None]) -> list[str]:
    """Call on all ranks; return what each was refused for, "" if it was not."""
    values, barrier = [None] * NUM_RANKS, threading.Barrier(NUM_RANKS, timeout=60)

    def refusal(rank: int) -> str:
        try:
            call(ThreadCommunicator(rank, values, barrier))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        return list(pool.map(refusal, range(NUM_RANKS)))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    path = write_config(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=1024,1024,1024&seed=3"},
        model={"backend": "identity"},
        patch={"shape": [64, 64, 64]},
        block={"shape": [512, 512, 512]},
        output={"volume": "out.zarr", "dtype": "uint8"},
    )
    return prepare(load_config(path).config)


def request(device: str) -> EngineRequest:
    return make_request(patch_shape=(64, 64, 64), batch_size=1, out_channels=1, device=device)


@contextmanager
def granted(nbytes: int) -> Iterator[None]:
    """Have Slurm grant so much on this node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        patch.setenv("SLURM_MEM_PER_NODE", f"{nbytes // MIB}")
        yield


def test_a_host_is_shared_by_the_ranks_that_compute(job: Job) -> None:
    def check(ranks: tuple[int, ...]) -> list[str]:
        crew = Crew(num_blocks=8, ranks=ranks, has_probed=True)
        return on_ranks(lambda comm: check_host(comm, job, request("cpu"), crew))

    least = least_nbytes(estimate(job.premise()).memory, "cpu")
    # As ranks do before they say what they hold: tests before this one may have left much.
    trim()
    own = held_nbytes()
    with granted(least + 2 * own + 200 * MIB):
        assert check((1,)) == [""] * NUM_RANKS
        refusals = check((0, 1, 2))
        assert all("shared by 3 ranks" in text for text in refusals)
    # What the two that compute nothing hold is theirs.
    with granted(least + own):
        refusals = check((1,))
        assert all("a rank needs about" in text and "Slurm grants" in text for text in refusals)


def test_an_accelerator_is_shared_by_the_ranks_that_compute(job: Job) -> None:
    bindings = Bindings(
        ranks=tuple(
            Binding(
                rank=rank,
                host="here",
                device="cuda:0",
                device_id="one",
                visible="",
                device_kind="H100",
                threads=1,
                num_cores=1,
            )
            for rank in range(NUM_RANKS)
        ),
        warnings=(),
    )
    needed = estimate(job.premise(num_ranks=2)).device_nbytes

    def check(ranks: tuple[int, ...], free: dict[int, int]) -> list[str]:
        def check_one(comm: ThreadCommunicator) -> None:
            arrays = SimpleNamespace(device_nbytes=lambda: (free[comm.rank], 0))
            engine: Any = SimpleNamespace(arrays=arrays, info=SimpleNamespace(device="cuda:0"))
            check_device(comm, job, engine, bindings, Crew(num_blocks=8, ranks=ranks))

        return on_ranks(check_one)

    much = dict.fromkeys(range(NUM_RANKS), 2 * needed)
    assert check((0, 2), much) == [""] * NUM_RANKS
    assert all("shared by 3 ranks" in text for text in check((0, 1, 2), much))
    # A rank that computes nothing has nothing to say, however little its device has.
    assert check((0, 2), much | {1: 0}) == [""] * NUM_RANKS
    refusals = check((0, 2), much | {2: 0})
    assert len({*refusals}) >= 1 and all("rank 2 on" in text for text in refusals)
