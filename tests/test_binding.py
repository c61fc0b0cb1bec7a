import pickle
import time
from dataclasses import replace

import pytest

from mpichunk.backends.devices.binding import (
    MOST_ROWS,
    Accelerator,
    RankFacts,
    VisibleDevices,
    bind,
)
from mpichunk.backends.devices.visibility import gpu_hints
from mpichunk.errors import DeviceError

CPU = "cpu AVX512"


def gpu(index, physical_id=None, *, name="NVIDIA H100", kind="cuda"):
    return Accelerator(kind=kind, index=index, name=name, physical_id=physical_id or f"GPU-{index}")


def facts(rank, *gpus, host="a", local_rank=None, cores=(0, 1), num_host_cores=2, **more):
    hints = more.pop("hints", ())
    devices = VisibleDevices(
        accelerators=gpus, cpu_kind=more.pop("cpu", CPU), note=more.pop("note", "")
    )
    return RankFacts(
        rank=rank,
        host=host,
        local_rank=rank if local_rank is None else local_rank,
        cores=tuple(cores),
        num_host_cores=num_host_cores,
        devices=devices,
        gpu_hints=hints,
    )


def decide(ranks, device="auto", *, threads=None, share_device=False):
    return bind(ranks, device=device, threads=threads, share_device=share_device)


def devices(bindings):
    return [binding.device for binding in bindings.ranks]


# ---- Devices -----------------------------------------------------------------------------------


def test_node_local_rank_chooses_among_the_visible_ones():
    four = [gpu(i) for i in range(4)]
    ranks = [facts(r, *four, host="ab"[r // 4], local_rank=r % 4) for r in range(8)]
    found = decide(ranks)
    assert devices(found) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"] * 2
    assert found.device_kinds == ("NVIDIA H100",)
    assert found.warnings == ()


def test_ranks_that_see_one_device_each_take_it():
    # As under --gpus-per-task=1: each sees one device, and each sees it as number 0.
    ranks = [facts(r, gpu(0, f"GPU-{r}")) for r in range(3)]
    assert devices(decide(ranks)) == ["cuda:0"] * 3


def test_ranks_that_see_their_own_two_devices():
    ranks = [facts(r, gpu(0, f"GPU-{r}a"), gpu(1, f"GPU-{r}b")) for r in range(3)]
    assert devices(decide(ranks)) == ["cuda:0"] * 3


def test_ranks_that_see_the_devices_of_their_socket():
    # Dealt out in turn: ranks 0 and 2 on one socket, 1 and 3 on the other.
    sockets = [(gpu(0, "A"), gpu(1, "B")), (gpu(0, "C"), gpu(1, "D"))]
    found = decide([facts(r, *sockets[r % 2]) for r in range(4)])
    assert [b.device_id for b in found.ranks] == ["A", "C", "B", "D"]
    assert devices(found) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]


def test_a_rank_with_a_choice_makes_room():
    ranks = [facts(0, gpu(0, "A"), gpu(1, "B")), facts(1, gpu(0, "A"))]
    assert [b.device_id for b in decide(ranks).ranks] == ["B", "A"]


def test_local_ranks_count_not_ranks():
    four = [gpu(i) for i in range(4)]
    ranks = [facts(r, *four, local_rank=3 - r) for r in range(4)]
    assert devices(decide(ranks)) == ["cuda:3", "cuda:2", "cuda:1", "cuda:0"]


def test_sharing_a_mig_instance_is_refused_with_its_cure():
    # Under --gpus-per-node: a process sees the first instance of its list only.
    both = "CUDA_VISIBLE_DEVICES=MIG-1,MIG-2"
    ranks = [replace(facts(r, gpu(0, "GPU-x")), visible=both) for r in (0, 1)]
    with pytest.raises(DeviceError, match="--gpus-per-task=1"):
        decide(ranks)


def test_shared_devices_are_shared_evenly():
    ranks = [facts(r, gpu(0), gpu(1)) for r in range(4)]
    assert devices(decide(ranks, share_device=True)) == ["cuda:0", "cuda:1"] * 2


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_two_ranks_on_one_physical_device_are_refused_by_its_identity(device):
    ranks = [facts(0, gpu(0, "GPU-x")), facts(1, gpu(0, "GPU-x"))]
    with pytest.raises(DeviceError) as caught:
        decide(ranks, device)
    message = str(caught.value)
    assert caught.value.key == "compute.device"
    for word in ("ranks 0 and 1 on a", "GPU-x", "2 ranks and 1 visible", "share_device: true"):
        assert word in message
    assert devices(decide(ranks, device, share_device=True)) == ["cuda:0", "cuda:0"]


def test_more_ranks_than_devices_are_refused():
    two = gpu(0), gpu(1)
    ranks = [facts(r, *two) for r in range(3)]
    with pytest.raises(DeviceError, match=r"ranks 0 and 2 .* 3 ranks and 2 visible devices"):
        decide(ranks)
    assert devices(decide(ranks, share_device=True)) == ["cuda:0", "cuda:1", "cuda:0"]


def test_the_same_pci_address_on_another_host_is_another_device():
    ranks = [facts(r, gpu(0, "0000:3b:00"), host=h, local_rank=0) for r, h in enumerate("ab")]
    assert devices(decide(ranks)) == ["cuda:0", "cuda:0"]


def test_an_index_is_taken_literally():
    ranks = [facts(0, gpu(0), gpu(1))]
    assert devices(decide(ranks, "cuda:1")) == ["cuda:1"]
    with pytest.raises(DeviceError, match="ranks 0 and 1"):
        decide([facts(r, gpu(0), gpu(1)) for r in range(2)], "cuda:1")


BAD_DEVICES = [
    # device, what is visible, words
    ("cuda", (), ["rank 0 on a", "no device 'cuda'", "no accelerator", "torch 2.13 without CUDA"]),
    ("cuda:3", (gpu(0),), ["no device 'cuda:3'", "cuda:0 NVIDIA H100"]),
    ("xpu", (gpu(0),), ["no device 'xpu'"]),
    ("GPU 1", (gpu(0),), ["'GPU 1' is not a device"]),
    ("", (), ["is not a device"]),
]


@pytest.mark.parametrize(("device", "gpus", "words"), BAD_DEVICES)
def test_a_device_that_is_not_there_is_an_error(device, gpus, words):
    with pytest.raises(DeviceError) as caught:
        decide([facts(0, *gpus, note="torch 2.13 without CUDA")], device)
    assert caught.value.key == "compute.device"
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_auto_on_a_job_that_was_given_devices_which_torch_does_not_see():
    ranks = [facts(0, gpu(0)), facts(1, hints=("SLURM_JOB_GPUS=0,1",), note="driver too old")]
    with pytest.raises(DeviceError) as caught:
        decide(ranks)
    for word in ("rank 1 on a", "SLURM_JOB_GPUS=0,1", "driver too old", "compute.device: cpu"):
        assert word in str(caught.value)
    assert devices(decide(ranks, "cpu")) == ["cpu", "cpu"]


def test_auto_without_accelerators_says_cpu_loudly():
    ranks = [facts(r, *([gpu(0)] if r == 0 else []), host="abc"[r], local_rank=0) for r in range(3)]
    found = decide(ranks)
    assert devices(found) == ["cuda:0", "cpu", "cpu"]
    (loud,) = [w for w in found.warnings if "NO ACCELERATOR" in w]
    assert "on b, c: 2 of 3 ranks" in loud
    (mixed,) = [w for w in found.warnings if "mixed device kinds" in w]
    assert "NVIDIA H100 on a" in mixed and f"{CPU} on b, c" in mixed
    assert decide(ranks, "cpu").warnings == ()


def test_auto_says_cpu_where_nobody_has_an_accelerator():
    (warning,) = decide([facts(r, local_rank=r) for r in range(2)]).warnings
    assert "on the CPU" in warning and "compute.device: cpu" in warning


def test_mixed_kinds_are_warned_about():
    ranks = [
        facts(0, gpu(0), gpu(1, name="NVIDIA A100")),
        facts(1, gpu(0), gpu(1, name="NVIDIA A100")),
    ]
    found = decide(ranks)
    assert found.device_kinds == ("NVIDIA H100", "NVIDIA A100")
    assert any("mixed" in w for w in found.warnings)
    ranks = [facts(r, host="ab"[r], cpu=("cpu AVX2", CPU)[r]) for r in range(2)]
    found = decide(ranks, "cpu")
    assert found.device_kinds == ("cpu AVX2", CPU)
    assert any("mixed" in w for w in found.warnings)


def test_many_hosts_are_not_all_named():
    ranks = [facts(r, host=f"n{r:04d}", local_rank=0) for r in range(1000)]
    ranks.append(facts(1000, gpu(0), host="other", local_rank=0))
    (warning,) = [w for w in decide(ranks).warnings if "NO ACCELERATOR" in w]
    assert "n0000, n0001" in warning and "and 992 more" in warning and len(warning) < 300


# ---- Threads -----------------------------------------------------------------------------------


THREADS = [
    # masks of the ranks of one host, threads of every rank
    ([range(8)], 8),
    ([range(8)] * 2, 4),
    ([range(8)] * 3, 2),
    ([range(4), range(4, 8)], 4),
    ([range(2)] * 5, 1),
    ([range(6), range(4, 10)], 3),
    ([[0], range(1, 8)], 1),
    ([[0, 1], [0, 1], [2, 3, 4]], 1),
]


@pytest.mark.parametrize(("masks", "expected"), THREADS)
def test_threads_are_the_share_of_the_mask(masks, expected):
    ranks = [facts(r, cores=mask, num_host_cores=8) for r, mask in enumerate(masks)]
    assert {b.threads for b in decide(ranks, "cpu").ranks} == {expected}


def test_masks_of_other_hosts_do_not_matter_but_their_minimum_does():
    ranks = [facts(0, cores=range(8), num_host_cores=8)]
    ranks += [facts(r, host="b", cores=range(4), num_host_cores=4) for r in (1, 2)]
    found = decide(ranks, "cpu")
    assert {b.threads for b in found.ranks} == {2}
    assert [b.num_cores for b in found.ranks] == [8, 4, 4]
    (warning,) = found.warnings
    assert "2 threads on every rank" in warning and "on b " in warning and "up to 8" in warning


def test_given_threads_are_kept_and_warned_about():
    ranks = [facts(r, cores=range(4), num_host_cores=4) for r in range(2)]
    assert decide(ranks, "cpu", threads=2).warnings == ()
    found = decide(ranks, "cpu", threads=3)
    assert {b.threads for b in found.ranks} == {3}
    assert "threads per rank: 3" in found.warnings[0] and "2 cores" in found.warnings[0]


def test_a_mask_of_one_core_is_warned_about_when_cores_are_left():
    bound = [facts(r, cores=[r], num_host_cores=8) for r in range(2)]
    (warning,) = decide(bound, "cpu").warnings
    assert "2 of 2 ranks, on a" in warning and "--bind-to none" in warning
    full = [facts(r, cores=[r], num_host_cores=2) for r in range(2)]
    assert decide(full, "cpu").warnings == ()


# ---- The table, hints, size --------------------------------------------------------------------


def test_the_table_has_a_row_per_rank():
    ranks = [facts(0, gpu(0), host="node1"), facts(1, host="node22", local_rank=0)]
    ranks[0] = replace(ranks[0], visible="CUDA_VISIBLE_DEVICES=3")
    lines = decide(ranks).table.splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "host", "device", "id", "visible", "threads", "cores", "kind"],
        ["0", "node1", "cuda:0", "GPU-0", "CUDA_VISIBLE_DEVICES=3", "2", "2", "NVIDIA", "H100"],
        ["1", "node22", "cpu", "-", "all", "2", "2", "cpu", "AVX512"],
    ]
    assert (
        len(
            {
                line.index(word)
                for line, word in zip(lines, ("kind", "NVIDIA", "cpu AVX"), strict=True)
            }
        )
        == 1
    )


def test_the_table_of_many_ranks_is_short_and_counts_the_rest():
    ranks = [facts(r, host=f"node{r // 4}", local_rank=r % 4) for r in range(10 * MOST_ROWS)]
    found = decide(ranks, "cpu")
    *rows, rest = found.table.splitlines()
    assert len(rows) == 1 + MOST_ROWS
    assert f"{9 * MOST_ROWS} ranks more" in rest and f"{10 * MOST_ROWS // 4} hosts" in rest
    assert str(found.of(5)).startswith("rank 5 on node1: cpu")


def test_on_cpus_the_table_is_silent_about_devices():
    lines = decide([facts(0, host="node1")], "cpu").table.splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "host", "device", "threads", "cores", "kind"],
        ["0", "node1", "cpu", "2", "2", "cpu", "AVX512"],
    ]


HINTS = [
    ({}, [], ()),
    ({"SLURM_JOB_GPUS": "0"}, [], ("SLURM_JOB_GPUS=0",)),
    ({"SLURM_STEP_GPUS": "2,3"}, [], ("SLURM_STEP_GPUS=2,3",)),
    ({"SLURM_GPUS_ON_NODE": "0"}, [], ()),
    ({"SLURM_GPUS_ON_NODE": "2"}, [], ("SLURM_GPUS_ON_NODE=2",)),
    ({"SLURM_GPUS_PER_NODE": "a100:2"}, [], ("SLURM_GPUS_PER_NODE=a100:2",)),
    ({"SLURM_GPUS": "a100:0,v100:1"}, [], ("SLURM_GPUS=a100:0,v100:1",)),
    ({"SLURM_GPUS_PER_TASK": "0"}, [], ()),
    ({"SLURM_JOB_GPUS": ""}, [], ()),
    ({}, ["/dev/nvidia1", "/dev/nvidia0"], ("/dev/nvidia0", "/dev/nvidia1")),
    ({"CUDA_VISIBLE_DEVICES": "0"}, ["/dev/nvidia0"], ("/dev/nvidia0",)),
    # Devices are hidden on purpose, so their files say nothing.
    ({"CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidia0"], ()),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ["/dev/nvidia0"], ()),
]


@pytest.mark.parametrize(("environ", "files", "expected"), HINTS)
def test_gpu_hints(environ, files, expected):
    assert gpu_hints(environ, files) == expected


def test_facts_and_decisions_travel():
    found = decide([facts(0, gpu(0))])
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(pickle.dumps(facts(0, gpu(0)))) < 1000


def test_ten_thousand_ranks_take_little_time():
    four = [gpu(i) for i in range(4)]
    ranks = [
        facts(
            r,
            *four,
            host=f"n{r // 4}",
            local_rank=r % 4,
            cores=range(16 * (r % 4), 16 * (r % 4) + 16),
        )
        for r in range(10_000)
    ]
    started = time.monotonic()
    found = decide(ranks)
    assert time.monotonic() - started < 5
    assert {b.threads for b in found.ranks} == {16}
