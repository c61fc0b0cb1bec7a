"""How much rank 0's own computing is slowed by coordinating, at so many leases per second.

    python -m tests.benchmarks.coordinating

One process, as rank 0 is: one thread computes, in pieces that give the interpreter lock free and
take it again as a network's operators do; the main thread takes turns of the real coordinator with
the real journal, on parcels as they come from other ranks, and makes these parcels up as well, so
that the truth is a little better than what is printed. No MPI, no torch.
"""

import argparse
import pickle
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

from mpichunk.roles.coordinator import Coordinator
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.messages import Assign, Done, Request
from mpichunk.schedule.scheduler import Scheduler
from tests.benchmarks.simulation import EDGE, plan_of
from tests.quiet import patient_breaker

NUM_RANKS = 64
NUM_BLOCKS = 10**6
TURN_SECONDS = 0.005


class Computing(threading.Thread):
    """Multiplies and adds until it is told to stop; a piece takes about 0.1 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_pieces, self.is_stopped = 0, False
        self._values = np.ones(1 << 17, np.float32)

    def run(self) -> None:
        values, total = self._values, np.zeros_like(self._values)
        while not self.is_stopped:
            np.multiply(values, 1.0001, out=total)
            np.add(total, values, out=total)
            np.maximum(total, 0.0, out=total)
            self.num_pieces += 1


def rate(num_leases: int, seconds: float, run_dir: Path) -> float:
    """Return pieces per second beside so many leases per second."""
    plan = plan_of(NUM_BLOCKS)
    with Journal.open(run_dir, num_blocks=NUM_BLOCKS, fingerprint={}, versions={}) as journal:
        coordinator = Coordinator(
            Scheduler(NUM_BLOCKS, ranks=range(NUM_RANKS)),
            journal,
            core_of=plan.grid.__getitem__,
            hosts=dict.fromkeys(range(NUM_RANKS), "node00001"),
            breaker=patient_breaker(NUM_RANKS),
            durations=BlockDurations(float("inf")),
        )
        thread = Computing()
        thread.start()
        parcels: list[tuple[int, bytes]] = []
        for rank in range(NUM_RANKS):
            parcels.append((rank, pickle.dumps([Request(num_blocks=64)], -1)))
        started, num_done = time.perf_counter(), 0
        while (now := time.perf_counter() - started) < seconds:
            due = int(now * num_leases) - num_done
            while num_leases and parcels and due > 0:
                rank, parcel = parcels.pop(0)
                for message in pickle.loads(parcel):
                    coordinator.handle(rank, message)
                    is_done = isinstance(message, Done)
                    num_done, due = num_done + is_done, due - is_done
            for rank, message in coordinator.assign(now) + coordinator.commit(now):
                if isinstance(message, Assign):
                    parcels.append((rank, answer(message)))
            time.sleep(TURN_SECONDS)
        thread.is_stopped = True
        thread.join()
    assert abs(num_done - seconds * num_leases) <= 0.1 * seconds * num_leases + 64
    return thread.num_pieces / seconds


def answer(assign: Assign) -> bytes:
    """Return the parcel of a rank that has computed what it was given."""
    records = [
        Done(
            lease=lease,
            num_patches=1,
            num_voxels=EDGE**3,
            nbytes_read=EDGE**3,
            nbytes_written=EDGE**3,
            seconds={"read": 0.01, "infer": 0.01, "write": 0.01},
            checksum=f"xxh3:{lease.block:032x}",
        )
        for lease in assign.leases
    ]
    return pickle.dumps([*records, Request(num_blocks=len(records))], -1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.coordinating")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    leases = (0, 100, 1000, 5000)
    rates: dict[int, list[float]] = {num_leases: [] for num_leases in leases}
    for number in range(arguments.repeats):
        for num_leases in leases:
            with tempfile.TemporaryDirectory() as folder:
                found = rate(num_leases, arguments.seconds, Path(folder) / str(number))
            rates[num_leases].append(found)
    alone = median(rates[0])
    print(f"rank 0 computes {alone:.0f} pieces/s, medians of {arguments.repeats} repeats")
    for num_leases in leases[1:]:
        print(f"  beside {num_leases:>5} leases/s  {median(rates[num_leases]) / alone:.3f} of that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
