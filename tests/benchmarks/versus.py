"""`python -m tests.benchmarks.versus`: mpichunk, from disk to disk, against others, in memory.

Same volume, network, patches, overlap and threads; each in a process of its own, in turns.
README.md beside this file says how to install the others.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks import common

RIVALS = ("monai", "torch-em", "chunkflow")
VARIANTS = {
    "pytorch": ["model.backend=pytorch"],
    "openvino": ["model.backend=openvino"],
    "openvino-avx2": ["model.backend=openvino", "model.options={ONEDNN_MAX_CPU_ISA: AVX2}"],
}
"""How mpichunk runs the network, by what follows its name."""

MODULES = {"monai": "monai", "torch-em": "torch_em", "chunkflow": "chunkflow"}
CALLS = {
    "bare": "eager forwards, nothing else",
    "monai": "MONAI sliding_window_inference",
    "torch-em": "torch-em predict_with_halo_pipelined",
    "chunkflow": "chunkflow Inferencer",
    "mpichunk-pytorch": "mpichunk, pytorch, zarr to zarr",
    "mpichunk-openvino": "mpichunk, openvino, zarr to zarr",
    "mpichunk-openvino-avx2": "the same, AVX2 at most",
}
TOLERANCE = 1e-4


class Process:
    """One competitor, waiting to be told to run."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        env = {**os.environ, **common.one_thread_environment(threads), "PYTHONWARNINGS": "ignore"}
        env["PYTHONPATH"] = str(common.REPOSITORY) if name.startswith("mpichunk") else ""
        command = [python, str(Path(__file__).with_name("rivals.py")), name, str(folder)]
        self.name = name
        self._log = folder / f"{name}.log"
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        self.version = self._answer()["version"]

    def run(self, **command: Any) -> dict[str, Any]:
        """Let it run once."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended:\n{self._log.read_text()[-3000:]}")
        return dict(json.loads(line))

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


# ---- The task ---------------------------------------------------------------------------------


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write what all read: the volume on disk and as an array, weights, window, configs."""
    import torch
    from safetensors.torch import load_file

    from mpichunk.geometry.blending import window
    from mpichunk.volume import open_input

    patch, overlap, strides = options.patch, options.overlap, options.strides
    stride = [n - o for n, o in zip(patch, overlap, strict=True)]
    shape = [n * s for n, s in zip(strides, stride, strict=True)]
    # chunkflow's windows are right for chunks that end where a patch does.
    aligned = [n + o for n, o in zip(shape, overlap, strict=True)]
    for name, size in (("image", shape), ("aligned", aligned)):
        image = common.write_image(folder / f"{name}.zarr", size)
        with open_input(str(image)) as reader:
            found = np.asarray(reader.read(reader.info.domain).result())
        np.save(folder / f"{name}.npy", found[0])
    weights = load_file(common.NETS / "em_affinity_resunet.safetensors")
    torch.save(weights, folder / "weights.pt")
    z, y, x = (window("bump", n) for n in patch)
    np.save(folder / "window.npy", z[:, None, None] * y[:, None] * x)
    axes = [[k * s for k in range(n)] for n, s in zip(strides, stride, strict=True)]
    # The last patch ends where the volume does.
    starts = [[min(a, m - n) for a in axis] for axis, m, n in zip(axes, shape, patch, strict=True)]
    settings = {
        "net": str(common.NETS / "em_affinity_resunet.py"),
        "weights": str(folder / "weights.pt"),
        "patch": patch,
        "overlap": overlap,
        "shape": shape,
        "aligned": aligned,
        "starts": list(product(*starts)),
        "threads": options.threads,
        "packages": {"pytorch": "torch", "openvino": "openvino", "openvino-avx2": "openvino"},
        "models": VARIANTS,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    _write_configs(folder, settings, stride)
    return settings


def _write_configs(folder: Path, settings: Mapping[str, Any], stride: Sequence[int]) -> None:
    """Write what mpichunk runs: what is timed, and what the others define.

    Timed are blocks of one row of patches, as a long run's, so that reading and writing have others
    to hide behind. Like MONAI and chunkflow, one block is blended as a whole; like torch-em,
    patches are cropped and do not overlap.
    """
    shape, halo = settings["shape"], [o // 2 for o in settings["overlap"]]
    whole = {"block": {"shape": shape, "margin": [0, 0, 0]}}
    blended = {"shape": settings["patch"], "overlap": settings["overlap"]}
    cropped = {"shape": settings["patch"], "overlap": [0, 0, 0], "crop": halo}
    variants: dict[str, dict[str, Any]] = {
        "timed": {"patch": blended, "block": {"shape": [stride[0], stride[1], shape[2]]}},
        "blended": {"patch": blended, **whole},
        "aligned": {
            "patch": blended,
            "block": {"shape": settings["aligned"], "margin": [0, 0, 0]},
        },
        "cropped": {"patch": cropped, **whole},
    }
    for name, sections in variants.items():
        common.write_config(
            folder / f"{name}.yaml",
            input={"volume": f"{'aligned' if name == 'aligned' else 'image'}.zarr"},
            model=common.net("pytorch"),
            **sections,
            output={"volume": "out.zarr", "dtype": "float32"},
            compute={"device": "cpu", "threads": settings["threads"]},
        )


# ---- Measuring --------------------------------------------------------------------------------


def start_all(
    stack: ExitStack, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Process], dict[str, str]]:
    """Return the competitors that can run here, and why others cannot."""
    pythons: dict[str, str] = {"bare": sys.executable}
    missing: dict[str, str] = {}
    for variant in VARIANTS:
        name, why = f"mpichunk-{variant}", common.why_not(variant.partition("-")[0])
        pythons |= {name: sys.executable} if why is None else {}
        missing |= {name: why} if why is not None else {}
    for name in RIVALS:
        python = getattr(options, name.replace("-", "_")) or options.python
        check = [python, "-W", "ignore", "-c", f"import {MODULES[name]}"]
        if subprocess.run(check, capture_output=True, check=False, cwd=folder).returncode:
            missing[name] = f"{python} has none"
        else:
            pythons[name] = python
    started = {}
    for name, python in pythons.items():
        common.tell(f"starting {name}")
        process = Process(name, python, folder, options.threads)
        started[name] = stack.enter_context(process)
    return started, missing


def agreement(
    processes: Mapping[str, Process], folder: Path, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Run everybody once, untimed; return how far they differ where they mean the same."""
    ours = processes["mpichunk-pytorch"]
    alike = {"monai": "blended", "torch-em": "cropped", "chunkflow": "aligned"}
    found: dict[str, float] = {}
    for name, process in processes.items():
        common.tell(f"values of {name}")
        if name == ours.name:
            process.run(config="timed")
            continue
        theirs = folder / f"{name}.npy"
        if name in alike:
            _check_patches(process, settings)
        if name == "bare":
            process.run()
            continue
        config = alike.get(name, "blended")
        image = "aligned" if config == "aligned" else "image"
        process.run(config=config, image=image, save=str(theirs))
        expected = folder / f"expected-{config}.npy"
        if not expected.exists():
            ours.run(config=config, save=str(expected))
        # Nearer to the faces of a chunk than an overlap, chunkflow's windows end at another floor.
        inner = (slice(None), *(slice(o, -o or None) for o in settings["overlap"]))
        part = inner if name == "chunkflow" else ...
        difference = np.abs(np.load(theirs)[part] - np.load(expected)[part])
        found[name] = float(difference.max())
    return found


def _check_patches(process: Process, settings: Mapping[str, Any]) -> None:
    """Let it run as it will be timed; make sure that it runs as many patches as everybody."""
    count, expected = process.run()["num_patches"], len(settings["starts"])
    if count != expected:
        raise SystemExit(f"{process.name} ran {count} patches, not {expected}")


def render(found: Mapping[str, Any]) -> str:
    """Return the table, what it means, and the machine."""
    seconds: dict[str, list[float]] = found["seconds"]
    rows = []
    for name, values in seconds.items():
        ratio = common.ratios(values, seconds["bare"])
        start = found["whole_seconds"].get(name)
        rows.append(
            [
                f"{CALLS[name]} ({found['versions'][name]})",
                common.spread(values),
                common.spread(start) if start else "",
                f"{found['mvox'] / median(values):.3f}",
                common.spread(ratio),
                f"{found['difference'][name]:.1e}" if name in found["difference"] else "",
            ]
        )
    missing = found["missing"].items()
    rows += [[CALLS[name], f"not measured: {why}", "", "", "", ""] for name, why in missing]
    header = "what", "seconds", "with the start", "Mvox/s", "seconds / bare", "largest difference"
    lines = [common.table(header, rows), ""]
    for variant in VARIANTS:
        ours = seconds.get(f"mpichunk-{variant}")
        for rival in RIVALS:
            if ours and rival in seconds:
                ratio = common.ratios(seconds[rival], ours)
                lines.append(f"{variant}: {common.spread(ratio)} times as fast as {rival}")
    lines += ["", f"{found['task']}. {common.machine_words(found['machine'])}"]
    return "\n".join(lines)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that was found."""
    where = common.machine()
    settings = prepare(folder, options)
    with ExitStack() as stack:
        stack.enter_context(common.on_cores(options.cores))
        processes, missing = start_all(stack, folder, options)
        difference = agreement(processes, folder, settings)
        answers = common.interleave(
            {name: lambda p=process: p.run(config="timed") for name, process in processes.items()},
            options.repeats,
        )
    shape, patch, overlap = (
        " x ".join(map(str, settings[name])) for name in ("shape", "patch", "overlap")
    )
    cores = f" on {options.cores} cores" if options.cores else ""
    return {
        "task": f"{shape} voxels, {len(settings['starts'])} patches of {patch} overlapping by "
        f"{overlap}, {options.threads} threads{cores}",
        "machine": where,
        "mvox": float(np.prod(settings["shape"])) / 1e6,
        "versions": {name: process.version for name, process in processes.items()},
        "seconds": {n: [a["blocks_seconds"] for a in found] for n, found in answers.items()},
        "whole_seconds": {
            name: [a["seconds"] for a in found]
            for name, found in answers.items()
            if name.startswith("mpichunk")
        },
        "difference": difference,
        "missing": missing,
    }


def main() -> int:
    """Measure and print; 1 if values differ where they should not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="that has the other packages")
    for name in RIVALS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"that has {name}, if another one")
    parser.add_argument("--patch", type=int, nargs=3, default=[48, 128, 128])
    parser.add_argument("--overlap", type=int, nargs=3, default=[16, 32, 32])
    parser.add_argument("--strides", type=int, nargs=3, default=[2, 3, 3], help="patches per axis")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, help="give each process only so many cores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the volumes (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with common.work_folder(options.folder) as folder:
        found = measure(folder, options)
    common.print_result(render(found), found, as_json=options.json)
    wrong = {name: value for name, value in found["difference"].items() if value > TOLERANCE}
    for name, value in wrong.items():
        common.tell(f"{name} differs by {value:.2g}, more than {TOLERANCE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
