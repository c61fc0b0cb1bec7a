"""Which run has written an output that another run asks for: looked for beside its run directory.

Reads the first lines of journals; knows no volume.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mpichunk.errors import JournalError
from mpichunk.plan.fingerprint import differences
from mpichunk.rundir import journal

MOST_SEEN = 1000
"""Folders beside the run directory that are looked at."""


def foreign_output_message(run_dir: Path, fingerprint: Mapping[str, Any]) -> str:
    """Return which run wrote the output that this run asks for, if known, and what to do about it.

    Args:
        run_dir: of this run, which has written nothing.
        fingerprint: of this run.
    """
    volume = fingerprint["output.volume"]
    found = _origin(run_dir, volume)
    if found is None:
        return (
            f"{volume} exists and was not written by this run: there is no "
            f"{run_dir / journal.NAME}. Set output.volume to another place, or run_dir to that of "
            "the run that wrote it, or overwrite it with --fresh"
        )
    origin, parts = found
    differing = differences(parts, fingerprint)
    if not differing:
        return (
            f"{volume} exists and was written by the run in {origin}, which has the same settings: "
            f"set run_dir to {origin} to continue that run, or output.volume to another place, or "
            "overwrite it with --fresh"
        )
    return "\n".join(
        (
            f"{volume} exists and was written by the run in {origin}, with other settings:",
            *(f"  {line}" for line in differing),
            "the values of two runs are not mixed: set output.volume to another place, or continue "
            "that run with its own config, or overwrite it with --fresh",
        )
    )


def _origin(run_dir: Path, volume: Any) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the run directory that knows the output, and the fingerprint of its run."""
    with suppress(OSError):
        for folder in sorted(islice(run_dir.parent.iterdir(), MOST_SEEN)):
            header = None
            with suppress(JournalError, OSError):
                header = journal.read_header(folder / journal.NAME)
            parts = header["fingerprint"]["parts"] if header is not None else {}
            if folder != run_dir and parts.get("output.volume") == volume:
                return folder, parts
    return None
