"""The checksums of a journal as one array, a few bytes a block, for who compares them.

Reads the journal; knows no volume and no MPI.
"""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpichunk.errors import JournalError
from mpichunk.rundir import journal
from mpichunk.rundir.checksum import DIGEST_NBYTES, PREFIX

Digests = npt.NDArray[np.uint8]
"""(blocks, 16) the digest of each block; zeros where none is known."""

# Not JSON, which would take ten times as long: the order of the keys is the journal's own.
_DONE = re.compile(
    rb'\{"stage":"blocks","block":(\d+),"state":"done"[^\n]*"checksum":"'
    + PREFIX.encode()
    + rb'([0-9a-f]{%d})"\}\n' % (2 * DIGEST_NBYTES)
)


def read_digests(path: Path, blocks: range) -> Digests:
    """Return the digest that the last `done` line of each of these blocks holds.

    Args:
        path: The journal.
        blocks: Their numbers, `range(start, num_blocks, step)`.

    Raises:
        JournalError: this host does not see the journal.
    """
    digests = np.zeros((len(blocks), DIGEST_NBYTES), np.uint8)
    try:
        with path.open("rb") as file:
            for lines in journal.whole_lines(file):
                _take_in(lines, blocks, digests)
    except OSError as error:
        raise JournalError(
            f"{path} cannot be read: {error.strerror}; every rank needs the run directory",
            key="run_dir",
        ) from error
    return digests


def _take_in(lines: bytes, blocks: range, digests: Digests) -> None:
    """Note what whole lines of a journal say of `blocks`."""
    found = _DONE.findall(lines)
    numbers = np.array([int(number) for number, _ in found], np.int64) - blocks.start
    text = b"".join(digits for _, digits in found).decode()
    values = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, DIGEST_NBYTES)
    is_ours = (numbers >= 0) & (numbers % blocks.step == 0)
    # Of equal indices the last one counts.
    digests[numbers[is_ours] // blocks.step] = values[is_ours]
