"""Which process is meant for certain, and whether it lives: pid, start time, machine.

Asks Linux's /proc. Knows no MPI and no files of a run.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process for certain: a pid alone is given to another process one day."""

    machine: str
    """Boot and pid namespace: equal where pids can be compared."""

    pid: int
    """Process id."""

    started: int
    """Start time in clock ticks since the machine was booted."""


def this_process() -> Process:
    """Return what names the calling process for certain."""
    return Process(machine=this_machine(), pid=os.getpid(), started=start_time(os.getpid()) or 0)


def start_time(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks; None when it is dead."""
    try:
        # The name, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has died; nobody has asked for its exit code yet.
    return None if fields[0] in "ZX" else int(fields[19])


def this_machine() -> str:
    """Return what is equal for two processes whose pids can be compared."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
