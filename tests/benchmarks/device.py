"""`python -m tests.benchmarks.device`: efficiency and memory on an accelerator, in a few minutes.

One process, without MPI: `bench` and `run` on a serial communicator, input and output in local zarr
3. Needs torch, and no network, mpirun or test data.
"""

import argparse
import contextlib
import gc
import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.bench import Options, bench_on
from mpichunk.verbs.run import run_on
from tests.benchmarks import common

PRECISIONS = ("float32", "tf32", "bfloat16")
NETS = ("unet", "em_affinity_resunet")
LONGER = 10
LENGTHS = "short", "long"
MIB = 2**20


def network(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the `model` section of a network; the U-Net's weights are drawn with a fixed seed."""
    if name != "unet":
        return common.net("pytorch")
    import torch
    from safetensors.torch import save_file

    from tests.benchmarks.unet import UNet

    arguments = {"norm": options.norm, "features": options.features}
    weights = folder / "unet.safetensors"
    torch.manual_seed(0)
    save_file(UNet(**arguments).state_dict(), weights)
    source = Path(__file__).with_name("unet.py")
    return {
        "backend": "pytorch",
        "path": f"{source}:UNet",
        "weights": str(weights),
        "arguments": arguments,
        "out_channels": 3,
    }


def configure(folder: Path, options: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Write the inputs and all configs, by network and use: `bench`, `short`, `long`."""
    patch, overlap = options.patch, options.overlap
    stride = [n - o for n, o in zip(patch, overlap, strict=True)]
    # Rows and columns of patches in a block, and blocks in a row.
    small, large = 2 * stride[1], options.wide * stride[1]
    uses = {
        "bench": ([stride[0], large, large], options.blocks),
        "short": ([stride[0], small, small], 2),
        "long": ([LONGER * stride[0], small, small], 2),
    }
    found = {}
    for name in options.nets:
        model = network(name, folder, options)
        for use, (block, num_blocks) in uses.items():
            image = common.write_image(
                folder / f"{use}.zarr", [block[0], block[1], num_blocks * block[2]]
            )
            found[name, use] = common.write_config(
                folder / f"{name}-{use}.yaml",
                input={"volume": str(image)},
                model=model,
                patch={"shape": patch, "overlap": overlap, "batch_size": options.batch_size},
                block={"shape": block},
                output={"volume": f"{name}-{use}.zarr", "dtype": "uint8"},
                compute={"device": options.device},
            )
    return found


def measure_speed(config: Path, sets: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what `bench` finds; `why` if it refuses."""
    how = Options(num_repeats=options.repeats, num_blocks=options.blocks, as_json=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = bench_on(SerialCommunicator(), config, sets, how)
    if code != 0:
        return {"why": err.getvalue().strip().splitlines()[-1]}
    found = json.loads(out.getvalue())
    names = "engine", "mvox_per_second", "efficiency", "stages", "seconds_per_batch", "bound_by"
    return {name: found[name] for name in names}


def measure_memory(config: Path, sets: list[str]) -> dict[str, Any]:
    """Return the peak of the device's memory over a run; `why` if it fails."""
    import torch

    if not torch.cuda.is_available():
        return {"why": "no CUDA device"}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = run_on(SerialCommunicator(), config, sets, fresh=True)
    if code != 0:
        return {"why": err.getvalue().strip().splitlines()[-1]}
    return {
        "peak_nbytes": torch.cuda.max_memory_allocated() - before,
        "reserved_nbytes": torch.cuda.max_memory_reserved(),
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure as much as there is time for, the most important first."""
    started = time.monotonic()
    configs = configure(folder, options)
    tasks = [(name, p, "speed") for name in options.nets for p in options.precisions]
    tasks += [(name, p, "memory") for name in options.nets for p in options.memory]
    found: dict[str, Any] = {}
    for name, precision, what in tasks:
        key = f"{name}, {precision}, {what}"
        seconds = time.monotonic() - started
        common.tell(f"{seconds:.0f} s: {key}")
        if seconds > options.seconds:
            found[key] = {"why": "out of time"}
            continue
        sets = [
            *([] if precision == "float32" else [f"compute.precision={precision}"]),
            *options.set,
        ]
        if what == "speed":
            found[key] = measure_speed(configs[name, "bench"], sets, options)
        else:
            found[key] = {
                use: measure_memory(configs[name, use], sets) for use in ("short", "long")
            }
    return found


def render(found: Mapping[str, Any], patch: str) -> str:
    """Return rates and memory as tables."""
    speed, memory = [], []
    for key, item in found["found"].items():
        *what, kind = key.split(", ")
        if "why" in item:
            why = [f"not measured: {item['why']}", "", ""]
            (speed if kind == "speed" else memory).append([*what, *why, *[""] * (kind == "speed")])
        elif kind == "speed":
            rates = item["mvox_per_second"]
            spreads = (item["efficiency"], rates["bare"], rates["whole"])
            speed.append([*what, *map(_spread, spreads), item["bound_by"]])
        else:
            memory.append([*what, *_memory_cells(item)])
    header = "network", "precision", "efficiency", "bare Mvox/s", "whole Mvox/s", "bound by"
    longer = f"block {LONGER}x longer, MiB"
    return "\n\n".join(
        [
            patch,
            common.table(header, speed),
            common.table(("network", "precision", "block, MiB", longer, "ratio"), memory),
            common.machine_words(found["machine"]),
        ]
    )


def _memory_cells(item: Mapping[str, Any]) -> list[str]:
    """Return the peaks of both block lengths, and how many times more the longer one took."""
    own = [item[use] for use in LENGTHS]
    cells = [f"not measured: {it['why']}" if "why" in it else _mib(it) for it in own]
    is_there = all("why" not in it for it in own)
    return [*cells, f"{own[1]['peak_nbytes'] / own[0]['peak_nbytes']:.2f}" if is_there else ""]


def _mib(item: Mapping[str, int]) -> str:
    return f"{item['peak_nbytes'] / MIB:.0f}"


def _spread(values: Mapping[str, float]) -> str:
    return common.spread([values["median"], values["least"], values["most"]])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--norm", choices=("group", "batch"), default="group")
    parser.add_argument("--features", type=int, default=32, help="of the U-Net's first level")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--memory", nargs="*", default=["bfloat16"], help="precisions, for memory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in each")
    parser.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--overlap", type=int, nargs=3, default=[16, 16, 16])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--wide", type=int, default=4, help="patches of a block along y and x")
    parser.add_argument("--blocks", type=int, default=12, help="per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after these")
    parser.add_argument("--folder", type=Path, help="for the volumes (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    options = parser.parse_args()
    import torch

    where = common.machine()
    if torch.cuda.is_available():
        where["gpu"] = torch.cuda.get_device_name(0)
    with common.work_folder(options.folder) as folder:
        found = {"machine": where, "found": measure(folder, options)}
    shape, overlap = (" x ".join(map(str, values)) for values in (options.patch, options.overlap))
    print(render(found, f"patches of {shape}, overlap {overlap}, output uint8"), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
