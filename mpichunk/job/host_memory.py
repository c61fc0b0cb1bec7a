"""How much memory this process may still take of its host, whoever limits it.

Asks the kernel, its control groups and Slurm's environment. Knows no network and no plan.

    room of a rank = what the host, or a group that it is in, has left / ranks that share it
                     + what the rank holds already
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpichunk.plan.fit import Room
from mpichunk.words import size

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A control group that limits this process's memory."""

    ident: int
    """Number that no other group of the host has, the same within any container."""

    nbytes: int
    """What it leaves to take."""


def host_room(
    num_local: int,
    groups: Sequence[tuple[MemoryGroup, int]] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    available_nbytes: int | None = None,
    own_nbytes: int | None = None,
    idle_nbytes: int = 0,
) -> Room:
    """Return what one of `num_local` alike ranks may take of this host's memory.

    Args:
        num_local: ranks that share the host, without those that compute nothing.
        groups: what limits this process, each with the number of ranks that share the limit.
        environ: where Slurm may have put a limit.
        available_nbytes: what the host has available; default: ask it.
        own_nbytes: what this process holds; default: ask.
        idle_nbytes: what the host's other ranks hold, which compute nothing meanwhile.
    """
    if available_nbytes is None:
        available_nbytes = psutil.virtual_memory().available
    own = held_nbytes() if own_nbytes is None else own_nbytes
    sources = [(available_nbytes, num_local, "the host has {} available")]
    sources += [(group.nbytes, num, "its control group leaves {}") for group, num in groups]
    held = f", and it holds {size(own)}" if own else ""
    rooms = [
        Room(
            nbytes=nbytes // num + own,
            words=words.format(size(nbytes)) + _shared(num) + held,
        )
        for nbytes, num, words in sources
    ]
    limit = slurm_nbytes(environ)
    if limit is not None:
        # Of the whole job, also what its ranks hold already.
        idle = f", other ranks hold {size(idle_nbytes)} of it" if idle_nbytes else ""
        words = f"Slurm grants {size(limit)} on a node{idle}{_shared(num_local)}"
        rooms.append(Room(nbytes=max(0, limit - idle_nbytes) // num_local, words=words))
    return min(rooms, key=lambda room: room.nbytes)


def held_nbytes() -> int:
    """Return what this process holds of its host's memory."""
    return int(psutil.Process().memory_info().rss)


def _shared(num: int) -> str:
    return f", shared by {num} ranks" if num > 1 else ""


def slurm_nbytes(environ: Mapping[str, str]) -> int | None:
    """Return the memory that Slurm grants the job on a node, None if it says nothing."""
    if not environ.get("SLURM_JOB_ID"):
        return None
    # MiB; 0 is all that the node has.
    per_node = environ.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdigit():
        return int(per_node) * _MIB or None
    per_cpu, cpus = environ.get("SLURM_MEM_PER_CPU", ""), environ.get("SLURM_CPUS_ON_NODE", "")
    if per_cpu.isdigit() and cpus.isdigit():
        return int(per_cpu) * int(cpus) * _MIB or None
    return None


def memory_groups(root: Path = Path("/")) -> Iterator[MemoryGroup]:
    """Yield the control groups that limit this process's memory, of version 1 and 2.

    A limit counts for all groups below it. What is used includes cached files, which the kernel
    gives back before it kills anybody, also those that were used lately. `root` holds `proc` and
    `sys`.
    """
    for folder, (limit_name, used_name, cached_names) in _folders(root):
        with suppress(OSError, ValueError, KeyError):
            text = (folder / limit_name).read_text().strip()
            if text == "max" or int(text) >= 1 << 60:
                continue
            used = int((folder / used_name).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            counts = dict(line.split(maxsplit=1) for line in lines)
            cached = sum(int(counts[name]) for name in cached_names)
            nbytes = max(0, int(text) - max(0, used - cached))
            yield MemoryGroup(ident=folder.stat().st_ino, nbytes=nbytes)


_Names = tuple[str, str, tuple[str, str]]
_VERSION_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_VERSION_2 = "memory.max", "memory.current", ("inactive_file", "active_file")


def _folders(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield the folders of the groups that this process is in, up to the top, with their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        # Inside a container the path may be that of outside: then only the top is there.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), names
