"""A small run whose blocks take a while each, as those of a network would; for signals and disks.

`start` arguments run `tests.faults.program`: like `python -m mpichunk run CONFIG`, only slower.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.endtoend import write_config
from tests.faults.program import VARIABLE

NUM_BLOCKS = 3 * 4 * 4
DEPTH = 3
"""Blocks that a rank holds at the same time."""


def slow_config(folder: Path, **sections: Any) -> Path:
    """Write the config of a run of `NUM_BLOCKS` blocks."""
    return write_config(
        folder,
        input={"volume": "synthetic://membranes?shape=24,64,64&seed=4"},
        model={"backend": "identity"},
        patch={"shape": [8, 16, 16], "overlap": [2, 4, 4]},
        block={"shape": [8, 16, 16], "stitch": "seamless"},
        output={"volume": "out/v.zarr", "dtype": "uint8", "chunk_shape": [8, 16, 16]},
        run_dir="runs/v",
        **sections,
    )


def program(config: Path, seconds: float = 0.1, **told: Any) -> dict[str, Any]:
    """Return `args` and `env` for the fixtures that start ranks."""
    whole = {"folder": str(config.parent), "faults": [], "nan_blocks": [], "bad_ranks": []}
    told = whole | {"seconds_per_block": seconds} | told
    return {
        "args": ("-m", "tests.faults.program", config),
        "env": {VARIABLE: json.dumps(told)},
    }


def pid_of_rank(process: subprocess.Popen[Any], rank: int) -> int:
    """Return the process that is a rank of the mpirun that was started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        environ = child.environ()
        number = environ.get("OMPI_COMM_WORLD_RANK", environ.get("PMI_RANK"))
        if number == str(rank):
            return child.pid
    raise AssertionError(f"no rank {rank} below mpirun")


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Put an empty disk of so many bytes in the place of a folder; only root may do that."""
    if os.geteuid() != 0:
        pytest.skip("no small disk: only root may mount one")
    folder.mkdir(parents=True)
    options = f"size={nbytes}"
    command = ["mount", "-t", "tmpfs", "-o", options, "mpichunk-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk: {mounted.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a small disk: `size=...`, `ro` or `rw`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.01)
