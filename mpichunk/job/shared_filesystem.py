"""How every rank proves that it sees the run directory that rank 0 has just written.

A file system that is not shared would otherwise be found when blocks are missing. Knows no ranks.
"""

import time
from collections.abc import Callable
from pathlib import Path

from mpichunk.errors import LaunchError
from mpichunk.rundir.layout import NONCE

SIGHT_SECONDS = 30.0
"""How long a network file system may take to show a file to another host."""


def check_sight(
    run_dir: Path,
    nonce: str,
    *,
    host: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Prove that this rank sees the run directory that rank 0 has just written.

    Raises:
        LaunchError: it does not, also after the time that a network file system may take.
    """
    path = run_dir / NONCE
    end = clock() + SIGHT_SECONDS
    while True:
        seen = _read_if_there(path)
        if seen == nonce:
            return
        if clock() > end:
            found = "another one is there" if seen else "it is not there"
            raise LaunchError(
                f"host {host} does not see the run directory {run_dir} of rank 0: {found}. Every "
                "rank needs it: choose a run_dir on a file system that all nodes share",
                key="run_dir",
            )
        sleep(0.2)


def _read_if_there(path: Path) -> str | None:
    """Return what a file holds, None if it cannot be read (yet)."""
    try:
        # Listing the directory makes NFS look again.
        return path.read_text() if path in list(path.parent.iterdir()) else None
    except OSError:
        return None
