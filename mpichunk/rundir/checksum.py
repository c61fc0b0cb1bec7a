"""The checksum of a block's core: over what is stored, in an order that no format decides.

Knows no journal and no volume.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

PREFIX = "xxh3:"
"""Names the algorithm, XXH3 with 128 bits, before the hexadecimal digits."""

DIGEST_NBYTES = 16


def digest_of(core_czyx: npt.NDArray[Any]) -> bytes:
    """Return 128 bits over the array's C-ordered little-endian bytes."""
    little = core_czyx.astype(core_czyx.dtype.newbyteorder("<"), order="C", copy=False)
    # An array of dtype float16 has no buffer format that every reader knows; its bytes have.
    return xxhash.xxh3_128_digest(little.reshape(-1).view(np.uint8).data)


def checksum_of(core_czyx: npt.NDArray[Any]) -> str:
    """Return the digest as the journal writes it: `xxh3:` and 32 hexadecimal digits."""
    return PREFIX + digest_of(core_czyx).hex()
