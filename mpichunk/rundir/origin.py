"""Which run has written an output that another run asks for: looked for beside its run directory.

Reads journals; knows no volume.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mpichunk.errors import JournalError
from mpichunk.plan.fingerprint import differences
from mpichunk.rundir import journal
from mpichunk.schedule.messages import State

MOST_SEEN = 1000
"""Folders beside the run directory that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """A run that has written to an output."""

    run_dir: Path
    """Where its journal lies."""

    differing: list[str]
    """A line for each setting that is another one now."""

    time: float
    """When it last wrote to its journal."""


def foreign_output_message(run_dir: Path, fingerprint: Mapping[str, Any]) -> str:
    """Return which run wrote the output that this run asks for, if known, and what to do about it.

    Args:
        run_dir: of this run, which has written nothing.
        fingerprint: of this run.
    """
    volume = _volume_words(fingerprint)
    origins = list(_origins(run_dir, fingerprint))
    if not origins:
        return (
            f"{volume} exists and was not written by this run: there is no "
            f"{run_dir / journal.NAME}. Set output.volume to another place, or run_dir to that of "
            "the run that wrote it, or overwrite it with --fresh"
        )
    # One that can be gone on with rather than another, then the last to write.
    origin = min(origins, key=lambda found: (bool(found.differing), -found.time))
    writer = "the run" if len(origins) == 1 else f"{len(origins)} runs, one of them that"
    told = f"{volume} exists and was written by {writer} in {origin.run_dir}"
    if not origin.differing:
        return (
            f"{told}, which has the same settings: set run_dir to {origin.run_dir} to continue "
            "that run, or output.volume to another place, or overwrite it with --fresh"
        )
    return "\n".join(
        (
            f"{told}, with other settings:",
            *(f"  {line}" for line in origin.differing),
            "the values of two runs are not mixed: set output.volume to another place, or continue "
            "that run with its own config, or overwrite it with --fresh",
        )
    )


def _origins(run_dir: Path, fingerprint: Mapping[str, Any]) -> Iterator[_Origin]:
    """Yield the runs beside this one that have written to its output."""
    folders: list[Path] = []
    with suppress(OSError):
        folders = sorted(islice(run_dir.parent.iterdir(), MOST_SEEN))
    for folder in folders:
        path = folder / journal.NAME
        with suppress(JournalError, OSError):
            header = journal.read_header(path)
            parts = header["fingerprint"]["parts"] if header is not None else {}
            if header is None or folder == run_dir or _volume(parts) != _volume(fingerprint):
                continue
            if _has_written(path, header["num_blocks"]):
                differing = differences(parts, fingerprint)
                yield _Origin(run_dir=folder, differing=differing, time=path.stat().st_mtime)


def _has_written(path: Path, num_blocks: int) -> bool:
    """Return whether a journal has a block that is done."""
    states = np.zeros(num_blocks, np.uint8)
    journal.scan(path, states)
    return bool((states == State.DONE).any())


def _volume(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the output of a fingerprint, which is flat: of a spec each value has its key."""
    name = "output.volume"
    return {
        key.removeprefix(name): value
        for key, value in parts.items()
        if key == name or key.startswith(f"{name}.")
    }


def _volume_words(parts: Mapping[str, Any]) -> str:
    volume = _volume(parts)
    if "" in volume:
        return str(volume[""])
    return json.dumps({key.removeprefix("."): value for key, value in volume.items()})
