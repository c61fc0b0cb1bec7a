"""One rank, one physical device, however Slurm deals out the GPUs of a node."""

import re

import pytest

from tests.endtoend import write_config
from tests.slurm.site import openmpi_under_srun

ONE_EACH = "--gpus-per-task=1"
BOTH = "--gpus-per-node=2"
MIG = "export CUDA_VISIBLE_DEVICES=MIG-5c0f-$SLURM_LOCALID; "
ROCM = "unset CUDA_VISIBLE_DEVICES; "
NOTHING = "unset CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES; "

MODES = {
    # options of srun, shell before the program, what ranks 0 and 1 take: device, id, visible
    "per-task": ((ONE_EACH,), "", [("cuda:0", "0", "=0"), ("cuda:0", "1", "=1")]),
    "per-node": ((BOTH,), "", [("cuda:0", "0", "=0,1"), ("cuda:1", "1", "=0,1")]),
    "bind-single": (
        (BOTH, "--gpu-bind=single:1"),
        "",
        [("cuda:0", "0", "=0"), ("cuda:0", "1", "=1")],
    ),
    "bind-map": (
        (BOTH, "--gpu-bind=map_gpu:1,0"),
        "",
        [("cuda:0", "1", "=1"), ("cuda:0", "0", "=0")],
    ),
    # Rank 0 sees both, rank 1 the first only: rank 0 makes room.
    "bind-overlap": (
        (BOTH, "--gpu-bind=mask_gpu:0x3,0x1"),
        "",
        [("cuda:1", "1", "=0,1"), ("cuda:0", "0", "=0")],
    ),
    "mig": ((BOTH,), MIG, [("cuda:0", "MIG-5c0f-0", "=MIG"), ("cuda:0", "MIG-5c0f-1", "=MIG")]),
    "rocm": ((ONE_EACH,), ROCM, [("cuda:0", "0", "ROCR"), ("cuda:0", "1", "ROCR")]),
    "none": ((), NOTHING, [("cuda:0", "0", "all"), ("cuda:1", "1", "all")]),
}


def run_on_gpus(cluster, site, folder, options, shell, *, num_nodes=1, gpu_list=None):
    config = write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=8,32,32&seed=4"},
        model={"backend": "identity"},
        patch={"shape": [8, 16, 16]},
        block={"shape": [8, 16, 16]},
        output={"volume": "out/v.zarr", "dtype": "uint8", "chunk_shape": [8, 16, 16]},
        run_dir="runs/v",
    )
    env = openmpi_under_srun(site) | {"MPICHUNK_TEST_GPUS": "0,1"}
    if gpu_list:
        env["MPICHUNK_TEST_GPU_LIST"] = gpu_list
    return cluster.run(
        *("srun", f"--nodes={num_nodes}", "--ntasks-per-node=2", "--mpi=pmix", *options),
        *("sh", "-c", f'{shell}exec "$@"', "sh", site.python, "-m", "mpichunk", "run", config),
        env=env,
    )


def table(stderr):
    """Return (host, device, id, visible) of each rank, as they were printed."""
    lines = [line.removeprefix("mpichunk: ").split() for line in stderr.splitlines()]
    (heading,) = [line for line in lines if line[:2] == ["rank", "host"]]
    assert heading[:5] == ["rank", "host", "device", "id", "visible"]
    rows = lines[lines.index(heading) + 1 :]
    return [tuple(row[1:5]) for row in rows if row[0].isdigit() and row[1].startswith("node")]


@pytest.mark.parametrize("mode", MODES)
def test_each_task_gets_its_gpu(cluster, openmpi, folder, mode):
    options, shell, expected = MODES[mode]
    gpu_list = "ROCR_VISIBLE_DEVICES" if mode == "rocm" else None
    done = run_on_gpus(cluster, openmpi, folder, options, shell, gpu_list=gpu_list)
    assert done.returncode == 0, done.stderr
    for (host, device, name, visible), wanted in zip(table(done.stderr), expected, strict=True):
        assert (device, name.removeprefix("GPU-").removeprefix(f"{host}-")) == wanted[:2]
        assert wanted[2] in visible


def test_gpus_of_several_nodes_have_the_same_numbers(cluster, openmpi, folder):
    done = run_on_gpus(cluster, openmpi, folder, (ONE_EACH,), "", num_nodes=4)
    assert done.returncode == 0, done.stderr
    ids = [row[2] for row in table(done.stderr)]
    assert ids == [f"GPU-node{n}-{k}" for n in (1, 2, 3, 4) for k in (0, 1)]


@pytest.mark.parametrize("options", [["--gpus-per-node=1"], [BOTH, "--gpu-bind=map_gpu:0,0"]])
def test_two_tasks_on_one_gpu_are_refused_with_the_cure(cluster, openmpi, folder, options):
    done = run_on_gpus(cluster, openmpi, folder, options, "")
    assert done.returncode == 2, done.stderr
    # On whichever node is free.
    shared = r"ranks 0 and 1 on (node\d) would share one device, Fake GPU \(GPU-\1-0\)"
    assert re.search(shared, done.stderr), done.stderr
    assert "start no more ranks per node than it has devices, or set compute.share_device" in (
        done.stderr
    )
    assert not (folder / "out").exists()
