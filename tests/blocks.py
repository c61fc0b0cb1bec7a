"""Leases of blocks, and what becomes of them, for tests of those who hand them out or hold them."""

from mpichunk.geometry.box import Box
from mpichunk.schedule.messages import Done, Failed, Lease, State


def core_of(block):
    """Return the core of a block; all lie in a row."""
    return Box.from_shape((block, 0, 0), (1, 4, 4))


def leases(*blocks):
    """Return the first leases of these blocks."""
    return tuple(Lease(block=block, attempt=1) for block in blocks)


def done(lease, seconds=2.0):
    """Return the record of a block that took `seconds` to infer."""
    return Done(
        lease=lease,
        num_patches=2,
        num_voxels=1000,
        nbytes_read=3000,
        nbytes_written=4000,
        seconds={"read": seconds / 4, "infer": seconds, "write": seconds / 8},
        checksum="xxh3:0",
    )


def failed(lease, message="no such chunk"):
    """Return the record of a block that failed."""
    return Failed(lease=lease, error="BlockError", message=message)


def drain(scheduler, rank):
    """Lease and finish all that `rank` can get; return the blocks."""
    blocks = []
    while leases := scheduler.lease(rank, 1, 0.0):
        blocks.append(leases[0].block)
        assert scheduler.finish(rank, leases[0])
    return blocks


def failed_blocks(scheduler, num_blocks):
    """Return the blocks that were tried as often as allowed, in plan order."""
    return [block for block in range(num_blocks) if scheduler.state(block) == State.FAILED]
