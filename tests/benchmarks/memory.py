"""`python -m tests.benchmarks.memory`: what `plan` says of memory and time, and what a run took.

Each config is benched once, so that the network's own need is known, planned, and run under mpirun;
then the same with blocks ten times as long in z. On an accelerator, that one's memory too.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpichunk.rundir.history import History
from tests.benchmarks import common

MIB = 2**20
LONGER = 10
BLOCKS = 4
"""One more than are in flight, so that each can be in another state."""

CONFIGS: dict[str, dict[str, Any]] = {
    "identity": {"patch": [20, 256, 256], "overlap": [4, 64, 64], "blocks": [2, 2, 2]},
    "pytorch": {"patch": [48, 128, 128], "overlap": [16, 32, 32], "blocks": [1, 2, 2]},
    "onnxruntime": {"patch": [48, 128, 128], "overlap": [16, 32, 32], "blocks": [1, 2, 2]},
    "openvino": {"patch": [48, 128, 128], "overlap": [16, 32, 32], "blocks": [1, 2, 2]},
}
SHORT = {"patch": [16, 48, 48], "overlap": [8, 16, 16], "blocks": [1, 2, 2]}


def configure(
    folder: Path, backend: str, case: Mapping[str, Any], options: argparse.Namespace, longer: int
) -> Path:
    """Write a config and its input: blocks in a row along x, each `longer` times as long in z."""
    strides = [n - o for n, o in zip(case["patch"], case["overlap"], strict=True)]
    block = [k * s for k, s in zip(case["blocks"], strides, strict=True)]
    block[0] *= longer
    num_blocks = BLOCKS * options.num_ranks
    name = f"{backend}-{longer}"
    image = common.write_image(
        folder / f"{'-'.join(map(str, block))}.zarr", [*block[:2], num_blocks * block[2]]
    )
    model = {"backend": backend, "out_channels": 3} if backend == "identity" else None
    return common.write_config(
        folder / f"{name}.yaml",
        input={"volume": str(image)},
        model=model or common.net(backend),
        patch={"shape": case["patch"], "overlap": case["overlap"]},
        block={"shape": block},
        output={"volume": f"{name}.zarr", "dtype": options.dtype, "chunk_shape": [8, 64, 64]},
        compute={"device": options.device, "threads": 1},
    )


def measure(config: Path, num_ranks: int) -> dict[str, Any]:
    """Return bytes of the rank that took most, and seconds: projected and measured."""
    common.bench(config, blocks=1, num_ranks=num_ranks)
    text, _ = common.mpichunk("plan", config, "--json", "--ranks", num_ranks)
    found = json.loads(text)
    planned = found["memory"]
    ranks = run(config, num_ranks)
    history = History()
    history.follow(config.parent / "runs" / config.stem / "journal.jsonl")
    device = max(rank["device_nbytes"] for rank in ranks)
    return {
        "host": {
            "projected": planned["host_nbytes" if device else "cpu_nbytes"],
            "measured": max(rank["host_nbytes"] for rank in ranks),
        },
        "device": {
            "projected": planned["device_nbytes"] if device else 0,
            "measured": device,
        },
        "seconds": {
            "projected": found["prediction"]["seconds"],
            "measured": history.end["time"] - history.starts[-1]["time"],
        },
        "parts": planned["parts"],
    }


def run(config: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Run a config to its end, and return what each rank says of its memory."""
    words = "-m", "tests.benchmarks.memory", "--rank", config
    text, _ = common.start_ranks(words, num_ranks=num_ranks)
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert len(found) == num_ranks, f"{num_ranks} ranks, but not a line of each:\n{text}"
    return found


def be_a_rank(config: Path) -> int:
    """Run a config as the `run` verb does, and print the peaks of this process."""
    from mpichunk.processmemory import peak_nbytes, settle_allocator
    from mpichunk.ranks.comm import start_mpi
    from mpichunk.verbs.run import run_on

    settle_allocator()
    comm = start_mpi()
    code = run_on(comm, config, fresh=True)
    device_nbytes = 0
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device_nbytes = torch.cuda.max_memory_allocated()
    peaks = {"rank": comm.rank, "host_nbytes": peak_nbytes(), "device_nbytes": device_nbytes}
    # At once, so that lines of other ranks do not come between.
    os.write(1, f"{json.dumps(peaks)}\n".encode())
    comm.leave(code)
    return code


def render(found: Mapping[str, Any]) -> str:
    """Return projected and measured as a table."""
    rows: list[Sequence[object]] = []
    units = {"host": ("host, MiB", MIB), "device": ("device, MiB", MIB), "seconds": ("seconds", 1)}
    for name, item in found["found"].items():
        for what, (words, unit) in units.items():
            projected, measured = item[what]["projected"], item[what]["measured"]
            if measured:
                numbers = projected / unit, measured / unit
                rows.append(
                    [name, words, *(f"{n:.0f}" for n in numbers), f"{projected / measured:.3f}"]
                )
    rows += [[name, f"not measured: {why}", "", "", ""] for name, why in found["missing"].items()]
    header = "config", "what", "projected", "measured", "projected / measured"
    where = common.machine_words(found["machine"])
    ranks = f"{found['num_ranks']} ranks, the one that took most; output {found['dtype']}"
    return f"{common.table(header, rows)}\n\n{ranks}. {where}"


def main() -> int:
    """Measure and print; 1 if a run took more than was projected, or much less."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="compute.device")
    parser.add_argument("--dtype", default="float32", help="of the output")
    parser.add_argument("--longer", type=int, nargs="+", default=[1, LONGER], help="blocks in z")
    parser.add_argument("--within", type=float, default=1.2, help="projected / measured at most")
    parser.add_argument("--short", action="store_true", help="see whether it works")
    parser.add_argument("--folder", type=Path, help="for the volumes (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return be_a_rank(options.rank)
    missing = {name: why for name in options.only if (why := common.why_not(name))}
    found: dict[str, Any] = {}
    with common.work_folder(options.folder) as folder:
        for name in options.only:
            for longer in () if name in missing else options.longer:
                case = SHORT if options.short else CONFIGS[name]
                config = configure(folder, name, case, options, longer)
                common.tell(f"{name}, blocks {longer} times as long")
                key = name if longer == 1 else f"{name}, blocks {longer}x longer in z"
                found[key] = measure(config, options.num_ranks)
    result = {
        "machine": common.machine(),
        "num_ranks": options.num_ranks,
        "dtype": options.dtype,
        "missing": missing,
        "found": found,
    }
    common.print_result(render(result), result, as_json=options.json)
    pairs = [item[where] for item in found.values() for where in ("host", "device")]
    ratios = [pair["projected"] / pair["measured"] for pair in pairs if pair["measured"]]
    return 0 if ratios and all(1 <= ratio <= options.within for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
