"""Two ranks of a node are never on one core: nothing binds a thread closer than its rank is bound.

Looks at the affinity masks of all threads of both ranks from outside, while they compute. An
engine that pins its threads pins those of every rank to the same first cores, and then two ranks
take turns on one core while another is idle. Whether threads are pinned shows on two cores or more.
"""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from tests import onnx_maker
from tests.endtoend import block_lines, write_config
from tests.launch import Launch
from tests.optional import need

SHAPE = 64, 192, 192
NUM_BLOCKS = 16
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x)
"""
WEIGHTS = {
    "conv.weight": np.ones((2, 1, 3, 3, 3), np.float32),
    "conv.bias": np.zeros(2, np.float32),
}


def masks_of(pid: int) -> dict[int, frozenset[int]]:
    """Return the cores that each thread of a process may run on."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            found[int(task.name)] = frozenset(os.sched_getaffinity(int(task.name)))
    return found


class Watch:
    """Looks at the ranks of a job until it ends."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.num_looks = 0
        """How often both ranks were seen at work."""

        self.masks: set[frozenset[int]] = set()
        """All masks that a thread has had meanwhile."""

    def __call__(self, process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < end:
            self._look(process)
            time.sleep(0.003)

    def _look(self, process: subprocess.Popen[str]) -> None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            family = psutil.Process(process.pid).children(recursive=True)
            ranks = [p.pid for p in family if "mpichunk" in p.cmdline()]
            masks = [masks_of(pid) for pid in ranks]
            done = {line["rank"] for line in block_lines(self.run_dir)}
            if len(ranks) == 2 and done == {0, 1}:
                self.num_looks += 1
                self.masks |= {mask for own in masks for mask in own.values()}


def watch(
    folder: Path, mpirun: Launch, backend: str, **options: Any
) -> tuple[Watch, frozenset[int]]:
    """Run two ranks of one thread each; return what was seen, and which cores they were given."""
    model: dict[str, Any] = {"backend": backend, "out_channels": 2, "options": options}
    if backend == "pytorch":
        (folder / "net.py").write_text(NET)
        save_file(WEIGHTS, folder / "net.safetensors")
        model |= {"path": "net.py:Net", "weights": "net.safetensors"}
    else:
        need(backend)
        model["path"] = str(onnx_maker.convolution(folder / "net.onnx"))
    config = write_config(
        folder,
        input={"volume": f"synthetic://membranes?shape={','.join(map(str, SHAPE))}&seed=5"},
        model=model,
        patch={"shape": [16, 96, 96], "overlap": [8, 48, 48]},
        block={"shape": [16, 96, 96]},
        output={"volume": "out.zarr"},
        compute={"device": "cpu", "threads": 1},
        schedule={"mode": "static"},
        run_dir="run",
    )
    seen = Watch(folder / "run")
    done = mpirun(2, "-m", "mpichunk", "run", config, meanwhile=seen)
    assert done.returncode == 0, done.stderr
    assert len(block_lines(folder / "run")) == NUM_BLOCKS
    assert seen.num_looks > 5, "the ranks were hardly seen at work"
    return seen, frozenset(os.sched_getaffinity(0))


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime", "openvino"])
def test_no_thread_is_bound_closer_than_its_rank(
    tmp_path: Path, mpirun: Launch, backend: str
) -> None:
    seen, cores = watch(tmp_path, mpirun, backend)
    assert seen.masks == {cores}


def test_threads_that_are_pinned_are_seen(tmp_path: Path, mpirun: Launch) -> None:
    seen, cores = watch(tmp_path, mpirun, "openvino", ENABLE_CPU_PINNING=True)
    assert len(cores) == 1 or any(len(mask) == 1 for mask in seen.masks)
