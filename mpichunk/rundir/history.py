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

from mpichunk.geometry.box import Box, triple
from mpichunk.rundir.journal import whole_lines
from mpichunk.schedule.messages import RANK_LOST, Failure, State


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
    path: Path, states: npt.NDArray[np.uint8], *, of_latest_start: bool = False
) -> list[Failure]:
    """Return the blocks that `states` calls failed, with causes, in plan order.

    Args:
        path: The journal.
        states: (num_blocks,) the `State` of each block.
        of_latest_start: Leave out what has failed before it.
    """
    failures: dict[int, Failure] = {}
    begin = _latest_start(path) if of_latest_start else 0
    for line in _lines_with(path, b',"state":"failed",', begin):
        found = json.loads(line)
        block = found["block"]
        if states[block] == State.FAILED:
            start, stop = found["core"]
            core = Box(start=triple(start), stop=triple(stop))
            names = ("rank", "host", "attempt", "error", "message")
            failures[block] = Failure(block=block, core=core, **{n: found[n] for n in names})
    return [failures[block] for block in sorted(failures)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tries:
    """What has gone wrong since the latest start, for who goes on in its middle."""

    failed_on: dict[int, list[int]]
    """By block the ranks that it has failed on, one entry a try."""

    died_on: dict[int, list[int]]
    """By block the ranks that died while they may have computed it, one entry a death."""

    given_up: list[int]
    """Blocks that were tried as often as allowed."""


def read_tries(path: Path) -> Tries:
    """Return what has gone wrong since the latest start."""
    begin = _latest_start(path)
    failed_on: dict[int, list[int]] = {}
    died_on: dict[int, list[int]] = {}
    for line in _lines_with(path, b',"state":"retry",', begin):
        found = json.loads(line)
        kind = died_on if found["error"] == RANK_LOST else failed_on
        kind.setdefault(found["block"], []).append(found["rank"])
    lines = map(json.loads, _lines_with(path, b',"state":"failed",', begin))
    given_up = [line["block"] for line in lines]
    return Tries(failed_on=failed_on, died_on=died_on, given_up=given_up)


def read_checksum(path: Path, block: int) -> str | None:
    """Return what the last `done` line of a block says, None if there is none."""
    checksum: str | None = None
    for line in _lines_with(path, b'"block":%d,"state":"done",' % block):
        checksum = json.loads(line)["checksum"]
    return checksum


def _latest_start(path: Path) -> int:
    """Return where the line of the latest start begins; 0 if there is none.

    The order of the lines, since clocks of several hosts may differ.
    """
    place = at = 0
    with path.open("rb") as file:
        for lines in whole_lines(file):
            found = lines.rfind(b'\n{"start":{')
            if found >= 0:
                place = at + found + 1
            elif lines.startswith(b'{"start":{'):
                place = at
            at += len(lines)
    return place


def _lines_with(path: Path, marker: bytes, begin: int = 0) -> Iterator[bytes]:
    """Yield the lines from byte `begin` on that contain `marker`, without parsing the others."""
    with path.open("rb") as file:
        file.seek(begin)
        for lines in whole_lines(file):
            at = lines.find(marker)
            while at >= 0:
                end = lines.index(b"\n", at)
                line = lines[lines.rfind(b"\n", 0, at) + 1 : end]
                if line.endswith(b"}"):
                    yield line
                at = lines.find(marker, end)
