"""What one forward takes, measured, and kept in the run directory for `plan`.

Knows the files of a run directory and the kernel's count of a process's memory; no blocks.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.block.inference import texture_batch
from mpichunk.config.schema import Config
from mpichunk.plan.estimate import FLOAT32_NBYTES, Probe

NAME = "probe.json"
_WITHOUT_EFFECT = ("activation", "augment", "affinity_channels", "skip_blank")


def forward_nbytes(engine: Engine, request: EngineRequest) -> int | None:
    """Return the memory of a forward beyond its input, output and weights; None if nobody knows."""
    batch_nczyx = texture_batch(engine, request)
    output_shape = (p - 2 * c for p, c in zip(request.patch_shape, request.crop, strict=True))
    output_nbytes = request.batch_size * request.out_channels * prod(output_shape) * FLOAT32_NBYTES

    def forward() -> None:
        engine.infer(batch_nczyx)
        engine.arrays.wait()

    # What is only set up once is no part of it.
    forward()
    peak = engine.arrays.peak_nbytes(forward)
    if peak is None and request.device == "cpu":
        peak = _host_peak_nbytes(forward)
    return None if peak is None else max(0, peak - output_nbytes)


def write_probe(run_dir: Path, config: Config, model_files: Sequence[Path], probe: Probe) -> None:
    """Keep what a forward of this config has told.

    Raises:
        OSError: the run directory cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"of": _cause(config, model_files), "probe": asdict(probe)}, indent=2)
    temporary = run_dir / f"{NAME}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.rename(run_dir / NAME)


def read_probe(run_dir: Path, config: Config, model_files: Sequence[Path]) -> Probe | None:
    """Return what the last forward told; None if there was none, or it was of something else."""
    try:
        kept = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        if kept["of"] != _cause(config, model_files):
            return None
        return Probe(**kept["probe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cause(config: Config, model_files: Sequence[Path]) -> dict[str, Any]:
    """Return what a forward's time and memory depend on, as JSON gives it back."""
    model = config.model.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT))
    files = {str(path): _stamp(path) for path in model_files}
    patch = config.patch.model_dump(mode="json", include={"shape", "crop", "batch_size"})
    compute = config.compute.model_dump(mode="json")
    found: dict[str, Any] = json.loads(
        json.dumps({"model": model, "files": files, "patch": patch, "compute": compute})
    )
    return found


def _stamp(path: Path) -> list[int]:
    """Return size and time of a file: enough to see that it is another one."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _host_peak_nbytes(call: Callable[[], None]) -> int | None:
    """Return by how much this process's memory grows during a call; None if the kernel is silent.

    Memory that the allocator keeps for later is given back first: it would hide what is needed.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # 5: begin to look for the peak anew (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_nbytes("VmRSS")
        call()
        return max(0, _status_nbytes("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status_nbytes(name: str) -> int:
    """Return a size that the kernel gives of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
