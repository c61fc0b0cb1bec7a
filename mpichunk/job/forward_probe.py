"""What one forward takes, and what a run took, measured and kept in the run directory for `plan`.

Knows the files of a run directory and the kernel's count of a process's memory; no blocks.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from mpichunk.backends.engine import DeviceArray, Engine, EngineRequest
from mpichunk.block.inference import texture_batch
from mpichunk.config.schema import Config
from mpichunk.plan.memory import FLOAT32_NBYTES
from mpichunk.plan.probe import Pace, Peak, Probe
from mpichunk.processmemory import peak_nbytes, resident_nbytes, rise_nbytes, trim
from mpichunk.rundir.layout import PEAK, PROBE, replace_text
from mpichunk.words import count

SHORT_SECONDS = 2.0
"""A forward that takes longer is not run again only to know its time better."""

WARM_SECONDS, MOST_FORWARDS = 0.2, 20
"""Short forwards are repeated for so long, at most so often: the first ones are far slower."""

_WITHOUT_EFFECT = ("activation", "augment", "affinity_channels", "skip_blank")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMemory:
    """What a rank holds of its host's memory once its network is loaded, and held before."""

    resident_nbytes: int | None
    """Network loaded and idle, all else given back; None if the kernel is silent."""

    start_nbytes: int | None
    """The most until it was loaded."""

    @classmethod
    def most(cls, found: Iterable["HeldMemory"]) -> "HeldMemory":
        """Return the most that any rank holds, and held."""
        held = list(found)
        return cls(
            resident_nbytes=_most(item.resident_nbytes for item in held),
            start_nbytes=_most(item.start_nbytes for item in held),
        )


@dataclass(slots=True)
class MeasuredLoad:
    """Loads a network, and notes what that took."""

    load: Callable[[], Engine]
    """Returns it."""

    start_nbytes: int | None = None
    """The most memory that this process ever held until it was loaded; None before."""

    def __call__(self) -> Engine:
        """Return the network."""
        engine = self.load()
        # Now, since the first forward is weighed by itself, and with another batch takes less.
        self.start_nbytes = peak_nbytes()
        return engine


def settle(engine: Engine, loading: MeasuredLoad) -> HeldMemory:
    """Give back what loading and trying the network has left over; return what stays."""
    if engine.arrays.is_host:
        engine.arrays.release()
    trim()
    return HeldMemory(resident_nbytes=resident_nbytes(), start_nbytes=loading.start_nbytes)


def _most(values: Iterable[int | None]) -> int | None:
    """Return the largest value that is known."""
    return max((value for value in values if value is not None), default=None)


def forward_nbytes(engine: Engine, request: EngineRequest, num_forwards: int = 1) -> int | None:
    """Return the memory of a forward beyond its input, output and weights; None if nobody knows.

    Args:
        engine: the network.
        request: what it was loaded with.
        num_forwards: how many to run; the allocator needs some until its peak has settled.
    """
    batch_nczyx = texture_batch(engine, request)
    # What is only set up once is no part of it.
    _forward(engine, batch_nczyx)
    return _peak_nbytes(engine, request, batch_nczyx, num_forwards)


def probe_engine(engine: Engine, request: EngineRequest) -> Probe:
    """Return what a forward takes, of an engine that has run one before.

    One forward more, and others only if it is short: the first touches memory anew.
    """
    batch_nczyx = texture_batch(engine, request)
    started = time.perf_counter()
    nbytes = _peak_nbytes(engine, request, batch_nczyx, 1)
    seconds = time.perf_counter() - started
    if seconds < SHORT_SECONDS:
        seconds = warm_seconds(lambda: _forward(engine, batch_nczyx))
    return Probe(seconds=seconds, nbytes=nbytes, device=device_words(engine))


def device_words(engine: Engine) -> str:
    """Return the device with what else decides its speed."""
    info = engine.info
    return (
        f"{info.device}, {count(info.threads, 'CPU thread')}"
        if info.device == "cpu"
        else info.device
    )


def write_probe(run_dir: Path, config: Config, model_files: Sequence[Path], probe: Probe) -> None:
    """Keep what a forward of this config has told.

    Raises:
        OSError: the run directory cannot be written.
    """
    cause = {
        "of": _cause(config, model_files),
        "of_pace": _cause_of_pace(config),
        "of_peak": _cause_of_peak(config, model_files),
    }
    _write(run_dir, PROBE, {**cause, "probe": asdict(probe)})


def read_probe(run_dir: Path, config: Config, model_files: Sequence[Path]) -> Probe | None:
    """Return what the last forward told; None if there was none, or it was of something else.

    Without its pace, where blocks are read or written otherwise than they were; without what ranks
    held besides, where anything is otherwise.
    """
    try:
        kept = json.loads((run_dir / PROBE).read_text(encoding="utf-8"))
        if kept["of"] != _cause(config, model_files):
            return None
        probe = Probe(**kept["probe"])
        if kept.get("of_peak") != _cause_of_peak(config, model_files):
            probe = replace(probe, more_nbytes=0)
        if probe.pace is None or kept.get("of_pace") != _cause_of_pace(config):
            return replace(probe, pace=None)
        return replace(probe, pace=Pace(**kept["probe"]["pace"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_peak(run_dir: Path, config: Config, model_files: Sequence[Path], peak: Peak) -> None:
    """Keep how much memory the largest rank of a run took.

    Raises:
        OSError: the run directory cannot be written.
    """
    facts = {"peak_nbytes": peak.nbytes, "device_peak_nbytes": peak.device_nbytes}
    _write(run_dir, PEAK, {"of": _cause_of_peak(config, model_files), **facts})


def read_peak(run_dir: Path, config: Config, model_files: Sequence[Path]) -> Peak | None:
    """Return how much memory the largest rank of the last run took; None as of `read_probe`."""
    try:
        kept = json.loads((run_dir / PEAK).read_text(encoding="utf-8"))
        is_same = kept["of"] == _cause_of_peak(config, model_files)
        if not is_same:
            return None
        return Peak(nbytes=int(kept["peak_nbytes"]), device_nbytes=kept["device_peak_nbytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(run_dir: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write a file of JSON."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / name, json.dumps(facts, indent=2) + "\n")


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


def warm_seconds(forward: Callable[[], None]) -> float:
    """Return what a forward takes once caches and thread pools are warm."""
    found: list[float] = []
    ends = time.perf_counter() + WARM_SECONDS
    while len(found) < MOST_FORWARDS and (not found or time.perf_counter() < ends):
        started = time.perf_counter()
        forward()
        found.append(time.perf_counter() - started)
    return median(found)


def _forward(engine: Engine, batch_nczyx: DeviceArray) -> None:
    """Run one batch to its end."""
    engine.infer(batch_nczyx)
    engine.arrays.wait()


def _peak_nbytes(
    engine: Engine, request: EngineRequest, batch_nczyx: DeviceArray, num_forwards: int
) -> int | None:
    """Return the memory of forwards of an engine that is warm."""
    output_shape = (p - 2 * c for p, c in zip(request.patch_shape, request.crop, strict=True))
    output_nbytes = request.batch_size * request.out_channels * prod(output_shape) * FLOAT32_NBYTES

    def forward() -> None:
        for _ in range(num_forwards):
            _forward(engine, batch_nczyx)

    def forward_in_thread() -> None:
        # As blocks are computed: libraries keep scratch memory for each thread.
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(forward).result()

    peak = engine.arrays.peak_nbytes(forward)
    if peak is None and request.device == "cpu":
        peak = rise_nbytes(forward_in_thread)
    return None if peak is None else max(0, peak - output_nbytes)
