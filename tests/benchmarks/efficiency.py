"""`python -m tests.benchmarks.efficiency`: what of the time is network, on one rank and on two.

`mpichunk bench` with input and output in local zarr 3, each repeat of each variant in processes of
its own, in turns. Backends with one thread a rank; then blending alone, with the identity network.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import common

BACKENDS = ("pytorch", "onnxruntime", "openvino")
BLENDING = ("gather", "accumulate", "finalise")
PARTS = ("backends", "overhead")


# ---- Backends, one rank and two ---------------------------------------------------------------


def backends_part(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure each backend on one rank and on two, one thread each."""
    patch, overlap = options.patch, options.overlap
    stride = [n - o for n, o in zip(patch, overlap, strict=True)]
    block = [stride[0], 2 * stride[1], 2 * stride[2]]
    image = common.write_image(folder / "em.zarr", [2 * n for n in block])
    missing = {name: why for name in options.backends if (why := common.why_not(name))}
    measures = {}
    for backend in options.backends:
        config = common.write_config(
            folder / f"{backend}.yaml",
            input={"volume": str(image)},
            model=common.net(backend),
            patch={"shape": patch, "overlap": overlap},
            block={"shape": block},
            output={"volume": f"{backend}.zarr", "dtype": "uint8"},
            compute={"device": "cpu", "threads": 1},
        )
        for num_ranks in options.ranks:
            if backend not in missing:
                measures[f"{backend}, {num_ranks}"] = partial(
                    common.bench, config, blocks=options.blocks, num_ranks=num_ranks
                )
    return {
        "task": f"em_affinity_resunet, patches of {_shape(patch)} overlapping by "
        f"{_shape(overlap)}, blocks of {_shape(block)}, {options.blocks} blocks a rank and repeat",
        "missing": missing,
        "found": {
            name: {
                "bare": [item["mvox_per_second"]["bare"]["median"] for item in items],
                "whole": [item["mvox_per_second"]["whole"]["median"] for item in items],
                "efficiency": [item["efficiency"]["median"] for item in items],
                "version": items[0]["engine"]["version"],
            }
            for name, items in common.interleave(measures, options.repeats).items()
        },
    }


def render_backends(part: Mapping[str, Any], ranks: Sequence[int]) -> str:
    """Return a table: rates, efficiency, against eager pytorch, two ranks against one."""
    found = part["found"]
    rows = []
    for name, own in found.items():
        backend, num_ranks = name.split(", ")
        eager = found.get(f"pytorch, {num_ranks}")
        alone = found.get(f"{backend}, {ranks[0]}")
        times = common.spread(common.ratios(own["whole"], eager["bare"])) if eager else ""
        scaled = common.ratios(own["whole"], alone["whole"]) if alone is not own else []
        rows.append(
            [
                own["version"],
                num_ranks,
                common.spread(own["bare"]),
                common.spread(own["whole"]),
                common.spread(own["efficiency"]),
                times,
                common.spread(scaled) if scaled else "",
            ]
        )
    rows += [[name, f"not measured: {why}", *[""] * 5] for name, why in part["missing"].items()]
    header = (
        "backend",
        "ranks",
        "bare Mvox/s",
        "whole Mvox/s",
        "efficiency",
        "whole / bare eager pytorch",
        f"against {ranks[0]} rank",
    )
    return f"{part['task']}\n\n{common.table(header, rows)}"


# ---- Blending alone ---------------------------------------------------------------------------


def overhead_part(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the identity network with three float32 channels on one core, and a plain loop."""
    patch, overlap = [20, 256, 256], [4, 64, 64]
    if options.short:
        patch, overlap = [20, 64, 64], [4, 16, 16]
    stride = [n - o for n, o in zip(patch, overlap, strict=True)]
    block = [4 * n for n in stride]
    image = common.write_image(folder / "plain.zarr", [block[0], block[1], 2 * block[2]])
    config = common.write_config(
        folder / "identity.yaml",
        input={"volume": str(image)},
        model={"backend": "identity", "out_channels": 3},
        patch={"shape": patch, "overlap": overlap},
        block={"shape": block},
        output={"volume": "identity.zarr", "dtype": "float32"},
        compute={"threads": 1},
    )
    measures = {
        "mpichunk": partial(common.bench, config, blocks=options.blocks, num_cores=1),
        "plain": partial(_plain_loop, block, patch, stride),
    }
    items = common.interleave(measures, options.repeats)
    rates: dict[str, list[float]] = {"plain": [], "blending": [], "with forward": [], "whole": []}
    for own, plain in zip(items["mpichunk"], items["plain"], strict=True):
        voxels = own["blocks"]["num_voxels"] / own["blocks"]["per_rank"] / 1e6
        blending = sum(own["stages"][name] for name in BLENDING)
        rates["plain"].append(plain["num_voxels"] / plain["seconds"] / 1e6)
        rates["blending"].append(voxels / blending)
        rates["with forward"].append(voxels / (blending + own["stages"]["forward"]))
        rates["whole"].append(own["mvox_per_second"]["whole"]["median"])
    return {
        "task": f"identity network, 3 float32 channels, patches of {_shape(patch)} overlapping by "
        f"{_shape(overlap)}, blocks of {_shape(block)}, one core",
        "mvox_per_second": rates,
        "stages": [item["stages"] for item in items["mpichunk"]],
    }


def _plain_loop(
    shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]
) -> dict[str, Any]:
    """Return what the plain loop says of itself, in a process of its own on one core."""
    words = [sys.executable, str(Path(__file__).with_name("plain_loop.py"))]
    for name, values in (("shape", shape), ("patch", patch), ("stride", stride)):
        words += [f"--{name}", *map(str, values)]
    with common.on_cores(1):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def render_overhead(part: Mapping[str, Any]) -> str:
    """Return the rates of blending as a table."""
    names = {
        "plain": "plain torch loop, in memory",
        "blending": "mpichunk, gather + accumulate + finalise of a block",
        "with forward": "the same with the identity network's own copy",
        "whole": "mpichunk, zarr to zarr",
    }
    rates = part["mvox_per_second"]
    rows = [
        [
            text,
            common.spread(rates[name]),
            common.spread(common.ratios(rates[name], rates["plain"])),
        ]
        for name, text in names.items()
    ]
    header = "what", "Mvox/s of output", "against the plain loop"
    return f"{part['task']}\n\n{common.table(header, rows)}"


def _shape(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=6, help="per rank and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patch", type=int, nargs=3, default=[48, 128, 128])
    parser.add_argument("--overlap", type=int, nargs=3, default=[16, 32, 32])
    parser.add_argument("--short", action="store_true", help="see whether it works; no figures")
    parser.add_argument("--folder", type=Path, help="for the volumes (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.short:
        options.blocks, options.repeats = 1, 1
        options.patch, options.overlap = [16, 48, 48], [8, 16, 16]
    found: dict[str, Any] = {"machine": common.machine()}
    texts = []
    with common.work_folder(options.folder) as folder:
        if options.only in (None, "backends"):
            found["backends"] = backends_part(folder, options)
            texts.append(render_backends(found["backends"], options.ranks))
        if options.only in (None, "overhead"):
            found["overhead"] = overhead_part(folder, options)
            texts.append(render_overhead(found["overhead"]))
    texts.append(common.machine_words(found["machine"]))
    common.print_result("\n\n".join(texts), found, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
