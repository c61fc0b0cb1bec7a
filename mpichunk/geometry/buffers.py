"""How much is kept in memory of what is read, on its way to a device, or blended there.

Backends, blocks and volumes keep no more, and `plan` counts memory by it. Knows none of them.
"""

from math import prod

from mpichunk.geometry.box import Triple

CACHE_NBYTES = 64 << 20
"""Decoded chunks and shard indices kept per volume that is read; nothing is kept when writing."""

LAYERS_IN_FLIGHT = 2
"""Layers of a block's input that are on an accelerator: one in use, the next on its way."""

FINISH_NBYTES = 1 << 26
"""Bytes of float32 that are finished at a time on an accelerator: enough to fill it."""

WINDOWS_NBYTES = 1 << 28
"""Bytes of blending windows that are kept on an accelerator, if they are more than one."""

MOST_WINDOWS = 27
"""A patch is the first, the last, or neither, along each axis."""


def most_windows(shape: Triple, num_patches: int) -> int:
    """Return how many blending windows an accelerator keeps, at least one.

    Args:
        shape: of an output patch.
        num_patches: of a block, which has no more windows.
    """
    return max(1, min(MOST_WINDOWS, num_patches, WINDOWS_NBYTES // (4 * prod(shape))))
