"""Runs many scenarios and prints a table: fault x outcome.

python -m tests.faults.soak --runs 200 --seed 1
python -m tests.faults.soak --only rank-kill-17      # one scenario again, its files kept
"""

import argparse
import shutil
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from tests.faults.harness import NUM_BLOCKS, Bench, Run
from tests.faults.scenario import KINDS, Scenario, draw

WORDS = ("finished", "resumed", "untouched", "WRONG")


def main() -> int:
    """Run scenarios; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--only", metavar="KIND-SEED")
    options = parser.parse_args()
    if options.only:
        kind, _, seed = options.only.rpartition("-")
        names = [(kind, int(seed))]
    else:
        kinds = options.kinds
        names = [
            (kinds[i % len(kinds)], options.seed * 1000 + i // len(kinds))
            for i in range(options.runs)
        ]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    bench = Bench(folder)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    redone: dict[str, list[int]] = defaultdict(list)
    for kind, seed in names:
        word = _run(bench, draw(kind, seed, num_blocks=NUM_BLOCKS), redone, keep=bool(options.only))
        table[kind][word] += 1
    _print(table, redone)
    num_wrong = sum(counts["WRONG"] for counts in table.values())
    print(f"\n{len(names)} runs, {num_wrong} wrong; files: {folder}")
    if not num_wrong and not options.only:
        shutil.rmtree(folder)
    return num_wrong > 0


def _run(bench: Bench, scenario: Scenario, redone: dict[str, list[int]], *, keep: bool) -> str:
    """Run one scenario, say a line about it, and return how it ended."""
    run = Run(bench, scenario)
    try:
        outcome = run.finish()
    except Exception as error:
        print(f"{scenario}: WRONG: {error}\n  {scenario.attempts}\n  {run.folder}", flush=True)
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        return "WRONG"
    met = ", ".join(outcome.met)
    print(
        f"{scenario}: {outcome.word}, codes {outcome.codes}, {outcome.num_redone} redone, "
        f"{outcome.seconds:.1f} s; {met}",
        flush=True,
    )
    redone[scenario.kind].append(outcome.num_redone)
    if not keep:
        shutil.rmtree(run.folder)
    return outcome.word


def _print(table: dict[str, Counter[str]], redone: dict[str, list[int]]) -> None:
    """Print fault x outcome, and the most blocks that were redone in one run."""
    print(f"\n{'fault':<14}" + "".join(f"{word:>11}" for word in WORDS) + f"{'most redone':>13}")
    for kind in table:
        counts = "".join(f"{table[kind][word]:>11}" for word in WORDS)
        print(f"{kind:<14}{counts}{max(redone[kind], default=0):>13}")


if __name__ == "__main__":
    sys.exit(main())
