"""The processes of the ranks on this machine: whether they live, and how to end one.

Knows no MPI. A process is told from a later one with the same pid by its start time.
"""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mpichunk.process import Process, start_time


class Neighbours:
    """Ranks whose processes this one can see.

    Args:
        rank: This rank.
        processes: Of every rank, by its number.
    """

    def __init__(self, rank: int, processes: Mapping[int, Process]) -> None:
        machine = processes[rank].machine
        self._rank = rank
        self._processes = dict(sorted(processes.items()))
        self._here = {r: p for r, p in self._processes.items() if p.machine == machine}

    def see(self, rank: int) -> bool:
        """Return whether the process of a rank could be ended from here."""
        return rank in self._here and rank != self._rank

    def of(self, rank: int) -> list[int]:
        """Return the other ranks on the machine of a rank."""
        machine = self._processes[rank].machine
        return [r for r, p in self._processes.items() if p.machine == machine and r != rank]

    def pid(self, rank: int) -> int:
        """Return the process id of a rank."""
        return self._processes[rank].pid

    def next_is_gone(self, ranks: tuple[int, ...]) -> int | None:
        """Return the next of these ranks on this machine if its process has ended, else None.

        Each rank looks after one other, so that a loss is told once.
        """
        alive = set(ranks)
        here = [rank for rank in self._here if rank in alive]
        if len(here) < 2 or self._rank not in here:
            return None
        rank = here[(here.index(self._rank) + 1) % len(here)]
        process = self._here[rank]
        return None if start_time(process.pid) == process.started else rank

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank of this machine."""
        process = self._here.get(rank)
        if process is not None and start_time(process.pid) == process.started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)

    def stopped(self) -> list[int]:
        """Return the ranks of this machine that a signal has stopped."""
        return [r for r, p in self._here.items() if r != self._rank and _state(p) == "T"]


def _state(process: Process) -> str:
    """Return the state of a process as the kernel names it, "" for one that has ended."""
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0] if start_time(process.pid) == process.started else ""
