"""Where in the journal the line of each finished block stands, for who must compare two results.

Knows no scheduler: it is told when to begin, and what is written.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

_DONE = re.compile(rb'\{"stage":"blocks","block":(\d+),"state":"done",')


class JournalOffsets:
    """The last `done` line of each block, of those written since `begin`; before, it holds nothing.

    A number for each block: to look for one line in a large journal takes seconds.

    Args:
        path: The journal.
        num_blocks: Length of the plan.
    """

    def __init__(self, path: Path, num_blocks: int) -> None:
        self._path = path
        self._num_blocks = num_blocks
        # (num_blocks,) first byte of the line; 0, where the header stands, for none.
        self._begins: npt.NDArray[np.int64] | None = None

    def begin(self) -> None:
        """Note lines from now on."""
        if self._begins is None:
            self._begins = np.zeros(self._num_blocks, np.int64)

    def note(self, lines: Iterable[bytes], at: int) -> None:
        """Take in lines that were written one after another, the first one at byte `at`."""
        if self._begins is None:
            return
        for line in lines:
            found = _DONE.match(line)
            if found:
                self._begins[int(found[1])] = at
            at += len(line)

    def checksum(self, block: int) -> str | None:
        """Return what the last `done` line of a block says, None if none was noted."""
        if self._begins is None or not self._begins[block]:
            return None
        with self._path.open("rb") as file:
            file.seek(self._begins[block])
            checksum: str = json.loads(file.readline())["checksum"]
        return checksum
