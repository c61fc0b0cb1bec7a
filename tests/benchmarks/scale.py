"""Paper scale: rank 0's real plan, scheduler, coordinator and journal, with a simulated clock.

    python -m tests.benchmarks.scale --ranks 10000 --blocks 10000000

The ranks are made up: each computes one block after another, in log-normal times, some far too
long, a few blocks fail, and ranks die. No MPI, no storage but the journal, no network.
"""

import argparse
import logging
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mpichunk.rundir.history import History, read_tries
from mpichunk.rundir.journal import NAME, Journal, scan
from mpichunk.schedule.messages import State
from tests.benchmarks.simulation import Case, Result, Simulation, plan_of


def simulate(case: Case, run_dir: Path) -> Result:
    """Run one case with a journal in `run_dir`."""
    plan = plan_of(case.num_blocks)
    how = {"num_blocks": case.num_blocks, "fingerprint": {}, "versions": {}}
    with Journal.open(run_dir, **how) as journal:
        journal.append_start({"num_ranks": case.num_ranks})
        return Simulation(case, journal, plan).run()


def tell(case: Case, result: Result, run_dir: Path, before: float) -> None:
    """Print the figures of a whole run, and of a resume from its journal."""
    path, peak = run_dir / NAME, peak_mib()
    started = time.perf_counter()
    states = np.zeros(case.num_blocks, np.uint8)
    scan(path, states)
    scanned = time.perf_counter()
    History().follow(path)
    read_tries(path)
    ended = time.perf_counter()
    assert (states == State.DONE).all()
    nbytes, num = path.stat().st_size, result.num_decisions
    regroups = max(result.regroup_seconds, default=0.0)
    print(f"{case.num_ranks} ranks, {case.num_blocks} blocks; {os.cpu_count()} cores")
    print(f"  simulated {result.simulated_seconds / 3600:.1f} h in {result.wall_seconds:.0f} s")
    print(
        f"  decisions (leases and records)  {num / result.seconds:.0f} per second, fsync included"
    )
    print(
        f"                                  {num / result.cpu_seconds:.0f} per second of CPU time"
    )
    print(f"  share of rank 0's main thread   {result.seconds / result.simulated_seconds:.2%}")
    print(f"  slowest turn of rank 0          {result.slowest_turn:.3f} s of CPU time")
    print(f"  after the loss of a rank        {regroups:.2f} s at most")
    print(f"  leases out at a time            {result.most_leased} at most")
    print(f"  bytes of a block on the wire    {result.wire_nbytes:.0f}")
    print(f"  bytes of a block in the journal {nbytes / case.num_blocks:.0f}")
    print(f"  memory                          {peak:.0f} MiB, {before:.0f} before the start")
    print(f"  resume: scan of the journal     {scanned - started:.1f} s for {nbytes / 1e9:.2f} GB")
    print(f"  and what a take-over reads      {ended - scanned:.1f} s more")


def tell_tail(name: str, case: Case, result: Result) -> None:
    """Print what the end of a run costs."""
    each = result.idle_seconds / case.num_ranks
    print(
        f"  tail {name:<15} idle {each:.0f} s a rank, the time of {each / case.block_seconds:.1f} "
        f"blocks; {result.num_backups} leases as backup"
    )


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale")
    parser.add_argument("--ranks", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--block-seconds", type=float, default=30.0)
    parser.add_argument("--turn-seconds", type=float, default=0.25)
    parser.add_argument("--deaths", type=int, default=10)
    parser.add_argument("--folder", help="where the journals are written; default: that of TMPDIR")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    what = {
        "num_ranks": arguments.ranks,
        "num_blocks": arguments.blocks,
        "block_seconds": arguments.block_seconds,
        "turn_seconds": arguments.turn_seconds,
    }
    before = peak_mib()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        case = Case(num_deaths=arguments.deaths, **what)
        result = simulate(case, Path(folder) / "whole")
        tell(case, result, Path(folder) / "whole", before)
        tell_tail("of this run", case, result)
        for is_backing_up in (True, False):
            # The last twenty blocks of each rank: what came before makes no difference to the end.
            left = min(20 * arguments.ranks, arguments.blocks)
            case = Case(
                num_left=left,
                is_backing_up=is_backing_up,
                num_deaths=0,
                failing=0.0,
                seed=1,
                **what,
            )
            name = "with backups" if is_backing_up else "without"
            tell_tail(name, case, simulate(case, Path(folder) / name.replace(" ", "-")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
