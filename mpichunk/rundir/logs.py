"""Where log lines go: one file per rank in the run directory, and rank 0's to the terminal.

Knows no MPI: rank and host are parameters.
"""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from mpichunk.errors import JournalError
from mpichunk.rundir.layout import LOGS

LOGGER = logging.getLogger("mpichunk")
"""The one logger of the package."""

EARLY_LINES = 1000
"""Lines that are kept for the file until there is a run directory."""


def log_to_terminal(rank: int) -> None:
    """Show rank 0's lines, and every rank's warnings, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"mpichunk: {prefix}%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.addHandler(MemoryHandler(EARLY_LINES, flushLevel=logging.CRITICAL + 1))
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def lead_terminal() -> None:
    """Show all lines of this rank, which has become the coordinator."""
    for handler in LOGGER.handlers:
        handler.setLevel(logging.INFO)


def log_to_file(run_dir: Path, rank: int) -> None:
    """Append this rank's lines to logs/rank-NNNNN.log in the run directory.

    Raises:
        JournalError: the file cannot be written.
    """
    directory = run_dir / LOGS
    path = directory / f"rank-{rank:05d}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be written: {error.strerror}; choose a run_dir on a file system that "
            "this job may write to",
            key="run_dir",
        ) from error
    for earlier in [h for h in LOGGER.handlers if isinstance(h, _LogFile)]:
        LOGGER.removeHandler(earlier)
        earlier.close()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    for early in [known for known in LOGGER.handlers if isinstance(known, MemoryHandler)]:
        early.setTarget(handler)
        LOGGER.removeHandler(early)
        early.close()


class _LogFile(logging.FileHandler):
    """A log file that gives up quietly when its disk is full: the terminal tells the same."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        LOGGER.removeHandler(self)


def close_logs() -> None:
    """Flush and close every handler."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
