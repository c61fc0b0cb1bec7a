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

_EVENT = b'":{"time":'
_FAILED = b',"state":"failed",'


class History:
    """What the lines that were read so far tell; `follow` reads those that have come since."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        """What was noted at each start of the run, the last one last."""

        self.last_beat: dict[str, Any] = {}
        """What was noted at the last sign of life, {} if there was none."""

        self.end: dict[str, Any] = {}
        """What was noted at the end of the latest start, {} if it still runs or was lost."""

        self._num_read = 0
        # By block the number of starts before its last failure, and the line.
        self._failures: dict[int, tuple[int, dict[str, Any]]] = {}

    def follow(self, path: Path) -> None:
        """Read what is new; one pass, as a large journal takes seconds to read."""
        with path.open("rb") as file:
            file.seek(self._num_read)
            for lines in whole_lines(file):
                self._num_read += len(lines)
                told = [*_marked(lines, _EVENT), *_marked(lines, _FAILED)]
                for _, line in sorted(told):
                    self._take_in(json.loads(line))

    def failures(
        self, states: npt.NDArray[np.uint8], *, of_latest_start: bool = False
    ) -> list[Failure]:
        """Return the blocks that `states` calls failed, with causes, in plan order.

        Args:
            states: (num_blocks,) the `State` of each block.
            of_latest_start: Leave out what has failed before it.
        """
        least = len(self.starts) if of_latest_start else 0
        return [
            _failure(found)
            for block, (num_starts, found) in sorted(self._failures.items())
            if states[block] == State.FAILED and num_starts >= least
        ]

    def _take_in(self, found: dict[str, Any]) -> None:
        """Take in one line."""
        match found:
            case {"start": start}:
                self.starts.append(start)
                self.end = {}
            case {"beat": beat}:
                self.last_beat = beat
            case {"end": facts}:
                self.end = facts
            case {"block": block}:
                self._failures[block] = len(self.starts), found


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
    lines = map(json.loads, _lines_with(path, _FAILED, begin))
    given_up = [line["block"] for line in lines]
    return Tries(failed_on=failed_on, died_on=died_on, given_up=given_up)


def _failure(line: dict[str, Any]) -> Failure:
    """Return what a line tells of a block that failed."""
    start, stop = line["core"]
    core = Box(start=triple(start), stop=triple(stop))
    names = ("rank", "host", "attempt", "error", "message")
    return Failure(block=line["block"], core=core, **{name: line[name] for name in names})


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
    """Yield the lines from byte `begin` on that contain `marker`."""
    with path.open("rb") as file:
        file.seek(begin)
        for lines in whole_lines(file):
            for _, line in _marked(lines, marker):
                yield line


def _marked(lines: bytes, marker: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield place and text of each line that contains `marker`, without parsing the others."""
    at = lines.find(marker)
    while at >= 0:
        begin, end = lines.rfind(b"\n", 0, at) + 1, lines.index(b"\n", at)
        line = lines[begin:end]
        if line.endswith(b"}"):
            yield begin, line
        at = lines.find(marker, end)
