"""This process's memory: what it holds, what it held at most, how the allocator keeps it.

Knows Linux and glibc; does nothing where there is neither. Knows nothing of blocks or networks.
"""

import ctypes
import mmap
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
"""Of glibc's mallopt(3)."""

_KEPT_NBYTES = 1 << 30
"""Larger blocks are few, and mpichunk keeps them itself."""

_ARENA_VARIABLES = "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"
_KEEPING_VARIABLES = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"

_earlier_peaks_nbytes = [0]
"""Peaks before the kernel was told to look for them anew."""


def settle_allocator() -> None:
    """Have all threads share memory, and keep it for the next; harmless where that is unknown.

    glibc gives threads arenas of their own, and what one thread has freed the others cannot use: of
    each buffer of a network, a block and an encoder a rank would keep one per thread (measured: a
    forward in a thread of its own takes half as much again). Large blocks are got and freed by the
    dozen per second, which no lock slows down.

    It also gives large blocks back to the kernel, which must clear each page when it is asked anew:
    a fifth to a quarter of the CPU time of an eager forward of torch (measured: 0.81 s, of which
    0.20 in the kernel; 0.62 s without, at the same peak). `trim` gives back what is kept.

    To be called before threads begin, since an arena that is there stays: so also before it is
    known whether there is an accelerator. What the user has set in the environment holds.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not any(name in os.environ for name in _ARENA_VARIABLES):
            mallopt(_M_ARENA_MAX, 1)
        if not any(name in os.environ for name in _KEEPING_VARIABLES):
            if not mallopt(_M_MMAP_THRESHOLD, _KEPT_NBYTES):
                # Before version 2.35: 32 MiB at most, which is less than a network's.
                mallopt(_M_MMAP_MAX, 0)
            # Never by itself.
            mallopt(_M_TRIM_THRESHOLD, -1)


def own_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return new memory that is no part of the allocator's, nor ever will be.

    For what is kept long: among what comes and goes it would lie in the way.

    Raises:
        MemoryError: there is no memory for it.
    """
    try:
        pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(error.strerror) from error
    with suppress(OSError, AttributeError):
        # As numpy asks for its own: fewer pages to clear and to look up.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8, count=nbytes)


def trim() -> None:
    """Give back what the allocator keeps for later, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_nbytes() -> int | None:
    """Return the memory that this process holds; None if the kernel is silent."""
    try:
        return _status_nbytes("VmRSS")
    except (OSError, StopIteration):
        return None


def peak_nbytes() -> int:
    """Return the most memory that this process ever held."""
    try:
        peak = _status_nbytes("VmHWM")
    except (OSError, StopIteration):
        # In KiB; also counts what the program held that this one was started from.
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(*_earlier_peaks_nbytes, peak)


def weigh(call: Callable[[], T]) -> tuple[T, int | None]:
    """Return what a call returns, and the most memory that this process held during it.

    The latter is None if the kernel is silent.
    """
    try:
        _earlier_peaks_nbytes[0] = peak_nbytes()
        # 5: begin to look for the peak anew (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    return call(), _status_nbytes("VmHWM")


def rise_nbytes(call: Callable[[], None]) -> int | None:
    """Return by how much this process's memory grows during a call; None if the kernel is silent.

    Memory that the allocator keeps for later is given back first: it would hide what is needed.
    """
    trim()
    before = resident_nbytes()
    _, peak = weigh(call)
    return None if before is None or peak is None else max(0, peak - before)


def _status_nbytes(name: str) -> int:
    """Return a size that the kernel gives of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
