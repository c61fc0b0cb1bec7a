"""What does not fit is refused, and what is named instead fits; limits of kernel and of Slurm."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.errors import UserError
from mpichunk.geometry.box import triple
from mpichunk.job.host_memory import MemoryGroup, host_room, memory_groups, slurm_nbytes
from mpichunk.job.memory_check import device_room
from mpichunk.plan.estimate import estimate
from mpichunk.plan.fit import Room, find_doubt, find_refusal
from mpichunk.plan.memory import Memory, MemoryPart, least_nbytes, memory_of, total_nbytes
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.suggestion import with_block
from tests.geometries import make_config, make_info, make_plan

MIB = 1 << 20
MODEL = {"backend": "pytorch", "path": "/n.pt", "out_channels": 3}


def premise_of(batch: int = 4, block: int = 64, *, nbytes: int | None = 40 * MIB) -> Premise:
    config = make_config(
        (20, 20, 20),
        (block, block, block),
        patch_overlap=(4, 4, 4),
        patch_batch_size=batch,
        model=MODEL,
        output_chunk_shape=(16, 16, 16),
    )
    plan = make_plan(config, (1024, 1024, 1024))
    probe = None if nbytes is None else Probe(seconds=1.0, nbytes=nbytes, device="cpu")
    return Premise(
        plan=plan,
        config=config,
        info=make_info(plan.volume),
        num_ranks=2,
        model_nbytes=MIB,
        probe=probe,
    )


def refusal(premise: Premise, nbytes: int, memory: Memory = "cpu") -> UserError | None:
    return find_refusal(premise, Room(nbytes=nbytes, words="so it is here"), memory=memory)


def doubt(premise: Premise, nbytes: int, memory: Memory = "cpu") -> str | None:
    return find_doubt(premise, Room(nbytes=nbytes, words="so it is here"), memory=memory)


def parts(premise: Premise) -> tuple[MemoryPart, ...]:
    return memory_of(premise, premise.work)


def needed(premise: Premise, memory: Memory = "cpu") -> int:
    return total_nbytes(parts(premise), memory)


@pytest.mark.parametrize("memory", ["cpu", "host", "device"])
def test_what_fits_to_the_byte_is_not_refused(memory: Memory) -> None:
    premise = premise_of()
    told = estimate(premise)
    least = least_nbytes(parts(premise), memory)
    assert least <= needed(premise, memory) == getattr(told, f"{memory}_nbytes")
    assert refusal(premise, least, memory) is None
    assert doubt(premise, needed(premise, memory), memory) is None
    error = refusal(premise, least - 1, memory)
    assert error is not None and error.key in ("patch.batch_size", "block.shape", "patch.shape")
    assert doubt(premise, least - 1, memory) is None


def test_between_what_all_need_and_what_some_need_there_is_doubt() -> None:
    premise = premise_of(1, 512)
    least, most = least_nbytes(parts(premise), "cpu"), needed(premise)
    doubtful = [part for part in parts(premise) if not part.is_certain]
    assert [part.name for part in doubtful] == [
        "output being encoded",
        "more, a guess until `bench` is run",
    ]
    assert most - least == total_nbytes(doubtful, "cpu") > 0
    for nbytes in (least, most - 1):
        assert refusal(premise, nbytes) is None
        words = doubt(premise, nbytes)
        assert words is not None and "may be killed for lack of memory" in words
        assert "so it is here" in words and "block.shape (" in words
    assert least_nbytes(parts(premise), "device") == needed(premise, "device")


def test_few_blocks_need_less_than_many() -> None:
    """As many in flight as a rank gets; of one block little more than it."""
    premise = premise_of(1, 512)
    core = 512**3 * 3 * 4
    sizes = [
        needed(replace(premise, num_blocks=num_blocks, num_ranks=num_ranks))
        for num_blocks, num_ranks in [(1, 4), (4, 4), (5, 4), (9, 4), (10**6, 4)]
    ]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] == sizes[4] == needed(premise)
    assert core < sizes[0] < 1.5 * core < 3 * core < sizes[4] < 3.5 * core
    one = replace(premise, num_blocks=1)
    assert refusal(one, 2 * core) is None and refusal(premise, 2 * core) is not None


@pytest.mark.parametrize("memory", ["cpu", "device"])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.3])
def test_the_largest_batch_that_fits_is_named(share: float, memory: Memory) -> None:
    premise = premise_of(1000, nbytes=10_000 * MIB)
    limit = int(share * least_nbytes(parts(premise), memory))
    error = refusal(premise, limit, memory)
    assert error is not None and error.key == "patch.batch_size"
    match = re.search(r"patch\.batch_size (\d+), not 1000", str(error))
    assert match, error
    batch = int(match[1])
    assert total_nbytes(parts(premise.for_batch(batch)), memory) <= limit
    assert total_nbytes(parts(premise.for_batch(batch + 1)), memory) > limit
    assert "so it is here" in str(error) and "inside the network" in str(error)


def test_a_block_that_fits_is_named() -> None:
    premise = premise_of(1, 512)
    limit = needed(premise) // 2
    error = refusal(premise, limit)
    assert error is not None and error.key == "block.shape"
    match = re.search(r"block\.shape \((\d+), (\d+), (\d+)\), not \(512, 512, 512\)", str(error))
    assert match, error
    config = with_block(premise.config, triple([int(n) for n in match.groups()]))
    plan = Plan.from_config(config, premise.plan.volume)
    told = estimate(replace(premise, plan=plan, config=config))
    assert told.cpu_nbytes <= limit


def test_where_nothing_fits_the_patch_is_too_large() -> None:
    error = refusal(premise_of(), 10 * MIB)
    assert error is not None and error.key == "patch.shape"
    assert "fewer ranks per node" in str(error)
    error = refusal(premise_of(), 1000, "device")
    assert error is not None and "fewer ranks" not in str(error) and "accelerator" in str(error)


def test_before_the_first_forward_its_memory_does_not_count() -> None:
    unknown, known = premise_of(nbytes=None), premise_of(nbytes=500 * MIB)
    # And half of it, for what it may take more in a run than alone.
    assert needed(known) == needed(unknown) + 750 * MIB
    assert refusal(unknown, needed(unknown)) is None
    assert refusal(known, needed(unknown)) is not None


def test_ranks_share_what_their_device_has_free() -> None:
    device = SimpleNamespace(device_nbytes=lambda: (900, 100))
    engine: Any = SimpleNamespace(arrays=device, info=SimpleNamespace(device="cuda:0 H200"))
    for num_sharing, nbytes in ((1, 1000), (3, 400)):
        found = device_room(engine, num_sharing)
        assert found is not None and found.nbytes == nbytes and "H200" in found.words
    engine.arrays = NumpyArrays()
    assert device_room(engine) is None


# ---- Limits -----------------------------------------------------------------------------------


def room(*args: Any, **more: Any) -> int:
    return host_room(*args, environ=more.pop("environ", {}), own_nbytes=10, **more).nbytes


def test_ranks_share_what_the_host_has() -> None:
    assert room(1, available_nbytes=1000) == 1010
    assert room(4, available_nbytes=1000) == 260
    own = MemoryGroup(ident=1, nbytes=300)
    assert room(4, [(own, 1)], available_nbytes=1000) == 260
    assert room(4, [(own, 4)], available_nbytes=1000) == 85
    assert room(4, [(own, 4), (MemoryGroup(ident=2, nbytes=8), 2)], available_nbytes=1000) == 14


def test_what_idle_ranks_hold_is_theirs() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "100"}
    known = {"environ": environ, "available_nbytes": 1 << 50}
    assert room(2, idle_nbytes=40 * MIB, **known) == 30 * MIB
    assert room(2, idle_nbytes=400 * MIB, **known) == 0
    # The host's and the groups' is already taken off.
    assert room(2, idle_nbytes=40, available_nbytes=1000) == 510


def test_this_machine_has_memory() -> None:
    assert host_room(2, environ={}).nbytes > MIB
    assert host_room(2, environ={}, own_nbytes=0).nbytes <= host_room(1, environ={}).nbytes


@pytest.mark.parametrize(
    ("environ", "nbytes"),
    [
        ({}, None),
        ({"SLURM_MEM_PER_NODE": "100"}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "100"}, 100 * MIB),
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100"}, None),
        (
            {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "3"},
            300 * MIB,
        ),
    ],
)
def test_slurm_grants(environ: dict[str, str], nbytes: int | None) -> None:
    assert slurm_nbytes(environ) == nbytes
    if nbytes is not None:
        # Of all that the ranks take, also what they hold already.
        assert room(2, environ=environ, available_nbytes=1 << 50) == nbytes // 2


def write_group(
    folder: Path, version: int, limit: str, used: int, cached: int, lately: int = 0
) -> None:
    """Write the files of a control group as the kernel has them."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    lines = f"anon 5\n{names[2]}inactive_file {cached}\n{names[2]}active_file {lately}\n"
    (folder / "memory.stat").write_text(lines)


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_what_is_below_them(tmp_path: Path, version: int) -> None:
    top = tmp_path / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
    line = "4:memory:/job/step\n1:cpu:/job" if version == 1 else "0::/job/step"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    assert list(memory_groups(tmp_path)) == []
    write_group(top / "job/step", version, "max" if version == 2 else str(2**63 - 4096), 50, 0)
    assert list(memory_groups(tmp_path)) == []
    write_group(top / "job", version, "1000", 700, 100)
    (found,) = memory_groups(tmp_path)
    assert found.nbytes == 400 and found.ident == (top / "job").stat().st_ino
    # More is used than allowed: then nothing is left.
    write_group(top / "job/step", version, "500", 900, 10)
    assert [group.nbytes for group in memory_groups(tmp_path)] == [0, 400]
    # Files that were used lately are given back, too.
    write_group(top / "job/step", version, "500", 450, 10, 200)
    assert [group.nbytes for group in memory_groups(tmp_path)] == [260, 400]


def test_a_container_shows_its_own_group_at_the_top(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/../../kubepods/pod1\n")
    write_group(tmp_path / "sys/fs/cgroup", 2, "1000", 100, 0)
    assert [group.nbytes for group in memory_groups(tmp_path)] == [900]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(memory_groups(tmp_path)) == []
