"""Identifies a process by machine, pid and start time, and checks whether it is alive.

Asks Linux's /proc. Knows no MPI and no files of a run.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The identity of a process; a pid alone is reused by other processes."""

    machine: str
    """Boot and pid namespace: equal where pids can be compared."""

    pid: int
    """Process id."""

    started: int
    """Start time in clock ticks since the machine was booted."""


def this_process() -> Process:
    """Return the identity of the calling process."""
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
