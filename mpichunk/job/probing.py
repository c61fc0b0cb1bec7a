"""What one forward takes, and what a run took, measured and kept in the run directory for `plan`.

Knows the files of a run directory and the kernel's count of a process's memory; no blocks.
"""

import ctypes
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from mpichunk.backends.engine import DeviceArray, Engine, EngineRequest
from mpichunk.block.inference import texture_batch
from mpichunk.config.schema import Config
from mpichunk.plan.memory import FLOAT32_NBYTES
from mpichunk.plan.probe import Pace, Probe

NAME = "probe.json"
PEAK_NAME = "peak.json"

SHORT_SECONDS = 2.0
"""A forward that takes longer is not run again only to know its time better."""

_WITHOUT_EFFECT = ("activation", "augment", "affinity_channels", "skip_blank")


def forward_nbytes(engine: Engine, request: EngineRequest) -> int | None:
    """Return the memory of a forward beyond its input, output and weights; None if nobody knows."""
    batch_nczyx = texture_batch(engine, request)
    # What is only set up once is no part of it.
    _forward(engine, batch_nczyx)
    return _peak_nbytes(engine, request, batch_nczyx)


def probe_engine(engine: Engine, request: EngineRequest) -> Probe:
    """Return what a forward takes, of an engine that has run one before.

    One forward more, and a second one only if it is short: the first touches memory anew.
    """
    batch_nczyx = texture_batch(engine, request)
    started = time.perf_counter()
    nbytes = _peak_nbytes(engine, request, batch_nczyx)
    seconds = time.perf_counter() - started
    if seconds < SHORT_SECONDS:
        started = time.perf_counter()
        _forward(engine, batch_nczyx)
        seconds = time.perf_counter() - started
    return Probe(seconds=seconds, nbytes=nbytes, device=device_words(engine))


def device_words(engine: Engine) -> str:
    """Return the device with what else decides its speed."""
    info = engine.info
    return f"{info.device}, {info.threads} CPU threads" if info.device == "cpu" else info.device


def write_probe(run_dir: Path, config: Config, model_files: Sequence[Path], probe: Probe) -> None:
    """Keep what a forward of this config has told.

    Raises:
        OSError: the run directory cannot be written.
    """
    cause = {"of": _cause(config, model_files), "of_pace": _cause_of_pace(config)}
    _write(run_dir, NAME, {**cause, "probe": asdict(probe)})


def read_probe(run_dir: Path, config: Config, model_files: Sequence[Path]) -> Probe | None:
    """Return what the last forward told; None if there was none, or it was of something else.

    Without its pace, where blocks are read or written otherwise than they were.
    """
    try:
        kept = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        if kept["of"] != _cause(config, model_files):
            return None
        probe = Probe(**kept["probe"])
        if probe.pace is None or kept.get("of_pace") != _cause_of_pace(config):
            return replace(probe, pace=None)
        return replace(probe, pace=Pace(**kept["probe"]["pace"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_peak(run_dir: Path, config: Config, model_files: Sequence[Path], nbytes: int) -> None:
    """Keep how much memory of the host the largest rank of a run took.

    Raises:
        OSError: the run directory cannot be written.
    """
    _write(run_dir, PEAK_NAME, {"of": _cause_of_peak(config, model_files), "peak_nbytes": nbytes})


def read_peak(run_dir: Path, config: Config, model_files: Sequence[Path]) -> int | None:
    """Return how much memory the largest rank of the last run took; None as of `read_probe`."""
    try:
        kept = json.loads((run_dir / PEAK_NAME).read_text(encoding="utf-8"))
        is_same = kept["of"] == _cause_of_peak(config, model_files)
        return int(kept["peak_nbytes"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(run_dir: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write a file of JSON under a temporary name and rename it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{name}.tmp"
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.rename(run_dir / name)


def _cause_of_pace(config: Config) -> dict[str, Any]:
    """Return what reading and writing a voxel depends on; shapes are the plan's."""
    shapes = {"chunk_shape", "shard_shape"}
    return _as_json(
        {
            "input": config.input.model_dump(mode="json"),
            "output": config.output.model_dump(mode="json", exclude=shapes),
            "window": [config.patch.window, config.model.activation, config.model.augment],
        }
    )


def _cause_of_peak(config: Config, model_files: Sequence[Path]) -> dict[str, Any]:
    """Return what the memory of a whole run depends on."""
    values = config.model_dump(mode="json", exclude={"schedule", "run_dir"})
    return _as_json({"config": values, "files": {str(p): _stamp(p) for p in model_files}})


def _cause(config: Config, model_files: Sequence[Path]) -> dict[str, Any]:
    """Return what a forward's time and memory depend on."""
    model = config.model.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT))
    files = {str(path): _stamp(path) for path in model_files}
    patch = config.patch.model_dump(mode="json", include={"shape", "crop", "batch_size"})
    compute = config.compute.model_dump(mode="json")
    return _as_json({"model": model, "files": files, "patch": patch, "compute": compute})


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _stamp(path: Path) -> list[int]:
    """Return size and time of a file: enough to see that it is another one."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _forward(engine: Engine, batch_nczyx: DeviceArray) -> None:
    """Run one batch to its end."""
    engine.infer(batch_nczyx)
    engine.arrays.wait()


def _peak_nbytes(engine: Engine, request: EngineRequest, batch_nczyx: DeviceArray) -> int | None:
    """Return the memory of a forward of an engine that is warm."""
    output_shape = (p - 2 * c for p, c in zip(request.patch_shape, request.crop, strict=True))
    output_nbytes = request.batch_size * request.out_channels * prod(output_shape) * FLOAT32_NBYTES

    def forward() -> None:
        _forward(engine, batch_nczyx)

    peak = engine.arrays.peak_nbytes(forward)
    if peak is None and request.device == "cpu":
        peak = _host_peak_nbytes(forward)
    return None if peak is None else max(0, peak - output_nbytes)


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
