"""The checksums of a journal as one array, a few bytes a block, for who compares them.

Reads the journal; knows no volume and no MPI.
"""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpichunk import journal
from mpichunk.checksum import DIGEST_NBYTES, PREFIX

Digests = npt.NDArray[np.uint8]
"""(num_blocks, 16) the digest of each block; zeros where none is known."""

# Not JSON, which would take ten times as long: the order of the keys is the journal's own.
_DONE = re.compile(
    rb'\{"stage":"blocks","block":(\d+),"state":"done"[^\n]*"checksum":"'
    + PREFIX.encode()
    + rb'([0-9a-f]{%d})"\}\n' % (2 * DIGEST_NBYTES)
)


def read_digests(path: Path, num_blocks: int) -> Digests:
    """Return the digest that the last `done` line of each block holds."""
    digests = np.zeros((num_blocks, DIGEST_NBYTES), np.uint8)
    with path.open("rb") as file:
        for lines in journal.whole_lines(file):
            found = _DONE.findall(lines)
            blocks = np.array([int(block) for block, _ in found], np.int64)
            text = b"".join(digits for _, digits in found).decode()
            # Of equal indices the last one counts.
            digests[blocks] = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(
                -1, DIGEST_NBYTES
            )
    return digests
