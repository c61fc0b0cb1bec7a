"""Where log lines go: one file per rank in the run directory, and rank 0's to the terminal.

Knows no MPI: rank and host are parameters.
"""

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("mpichunk")
"""The one logger of the package."""


def log_to_terminal(rank: int) -> None:
    """Show rank 0's lines, and every rank's warnings, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"mpichunk: {prefix}%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def log_to_file(run_dir: Path, rank: int) -> None:
    """Append this rank's lines to logs/rank-NNNNN.log in the run directory."""
    directory = run_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(directory / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)


def close_logs() -> None:
    """Flush and close every handler."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
