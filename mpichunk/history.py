"""What a journal tells of a run besides the states of its blocks: starts, beats, end, failures.

Reads the journal, also while a run writes it. Knows no MPI and no volume.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.geometry import Box, triple
from mpichunk.journal import whole_lines
from mpichunk.messages import Failure, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """The lines that are not about a block."""

    starts: tuple[dict[str, Any], ...]
    """What was noted at each start of the run, the last one last."""

    last_beat: dict[str, Any]
    """What was noted at the last sign of life, {} if there was none."""

    end: dict[str, Any]
    """What was noted at the end of the latest start, {} if it still runs or was lost."""


def read_events(path: Path) -> Events:
    """Return all events of a run; one pass over the file, as a large one takes seconds to read."""
    starts: list[dict[str, Any]] = []
    last_beat: dict[str, Any] = {}
    end: dict[str, Any] = {}
    for line in _lines_with(path, b'":{"time":'):
        match json.loads(line):
            case {"start": start}:
                starts.append(start)
                end = {}
            case {"beat": beat}:
                last_beat = beat
            case {"end": facts}:
                end = facts
    return Events(starts=tuple(starts), last_beat=last_beat, end=end)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return what was noted at each start of the run, the last one last."""
    return list(read_events(path).starts)


def read_failures(
    path: Path, states: npt.NDArray[np.uint8], *, since: float = 0.0
) -> list[Failure]:
    """Return the blocks that `states` calls failed, with causes, in plan order.

    Args:
        path: The journal.
        states: (num_blocks,) the `State` of each block.
        since: Seconds since the epoch; what has failed before is left out.
    """
    failures: dict[int, Failure] = {}
    for line in _lines_with(path, b',"state":"failed",'):
        found = json.loads(line)
        block = found["block"]
        if states[block] == State.FAILED and found["time"] >= since:
            start, stop = found["core"]
            core = Box(start=triple(start), stop=triple(stop))
            names = ("rank", "host", "attempt", "error", "message")
            failures[block] = Failure(block=block, core=core, **{n: found[n] for n in names})
    return [failures[block] for block in sorted(failures)]


def read_tries(path: Path) -> tuple[dict[int, list[int]], list[int]]:
    """Return what has failed since the latest start, for who goes on in its middle.

    Returns:
        By block the ranks that it has failed on, one entry a try; and the blocks given up.
    """
    start = (read_starts(path) or [{}])[-1].get("time", 0.0)
    tries: dict[int, list[int]] = {}
    for line in _lines_with(path, b',"state":"retry",'):
        found = json.loads(line)
        if found["time"] >= start:
            tries.setdefault(found["block"], []).append(found["rank"])
    lines = map(json.loads, _lines_with(path, b',"state":"failed",'))
    return tries, [line["block"] for line in lines if line["time"] >= start]


def _lines_with(path: Path, marker: bytes) -> Iterator[bytes]:
    """Yield the lines that contain `marker`; much quicker than looking at every line."""
    with path.open("rb") as file:
        for lines in whole_lines(file):
            at = lines.find(marker)
            while at >= 0:
                end = lines.index(b"\n", at)
                line = lines[lines.rfind(b"\n", 0, at) + 1 : end]
                if line.endswith(b"}"):
                    yield line
                at = lines.find(marker, end)
