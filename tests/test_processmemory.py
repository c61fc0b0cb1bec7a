"""What the kernel counts of a process, and arenas of glibc, in processes of their own."""

import platform
import subprocess
import sys

import numpy as np
import pytest

from mpichunk.processmemory import peak_nbytes, resident_nbytes, rise_nbytes
from tests.launch import REPOSITORY

MIB = 1 << 20

COUNT_ARENAS = """
import ctypes, sys, threading
from mpichunk.processmemory import settle_allocator

if sys.argv[1] == "one":
    settle_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
together = threading.Barrier(3)

def work():
    held = libc.malloc(50_000)
    together.wait()
    libc.free(held)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.stdout.flush()
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
stdout = ctypes.c_void_p.in_dll(libc, "stdout")
libc.malloc_info(0, stdout)
libc.fflush(stdout)
"""


COUNT_FAULTS = """
import resource, sys
import numpy as np
from mpichunk.processmemory import settle_allocator, trim

if sys.argv[1] == "kept":
    settle_allocator()

def use():
    # More than glibc keeps by itself.
    blocks = [np.empty(40 << 20, np.uint8) for _ in range(3)]
    for block in blocks:
        block[:: 1 << 12] = 1

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def touch(nbytes: int) -> None:
    np.ones(nbytes, np.uint8).sum()


def test_a_rise_is_what_was_touched_and_no_peak_is_forgotten() -> None:
    touch(96 * MIB)
    before = peak_nbytes()
    rise = rise_nbytes(lambda: touch(64 * MIB))
    resident = resident_nbytes()
    if rise is None or resident is None:
        assert platform.system() != "Linux"
        return
    # Kernels count in batches of pages.
    assert 63 * MIB <= rise < 72 * MIB
    # The kernel has begun anew; what was taken before still counts.
    assert peak_nbytes() >= before >= resident - MIB
    assert rise_nbytes(lambda: None) in range(MIB)


def run(program: str, which: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, which],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def num_arenas(which: str, **environ: str) -> int:
    return run(COUNT_ARENAS, which, **environ).count("<heap nr=")


def num_faults(which: str, **environ: str) -> int:
    return int(run(COUNT_FAULTS, which, **environ))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_one_arena() -> None:
    assert num_arenas("default") > 1
    assert num_arenas("one") == 1
    # What the user has set holds.
    assert num_arenas("one", MALLOC_ARENA_MAX="2") == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_kept_for_the_next() -> None:
    # 40 MiB have 10,240 pages, or 20 where the kernel takes huge ones.
    assert num_faults("kept") < 20 < num_faults("default")
    assert num_faults("kept", MALLOC_MMAP_THRESHOLD_="100000") > 20


def test_the_peak_is_not_that_of_the_program_that_started_this_one(python):
    """The kernel hands ru_maxrss down to what is executed."""
    held = bytearray(600 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    words = "from mpichunk.processmemory import peak_nbytes; print(peak_nbytes())"
    done = python("-c", words)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 << 20
    del held
