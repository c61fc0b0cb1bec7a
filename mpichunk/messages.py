"""The frozen values that ranks send one another, and the states of a block.

Knows no transport and no policy. A block travels as its index in the plan: every rank has the plan.

    worker                                        coordinator
      | -- Request(num_blocks) --------------------> |   may stay unanswered until blocks come free
      | <-- Assign(leases) ------------------------- |
      | -- Done(lease) or Failed(lease) -----------> |   kept by the worker ...
      | <-- Acknowledge(leases) -------------------- |   ... until it is in the journal
      | <-- Stop(reason) --------------------------- |
"""

import queue
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from mpichunk.geometry import Box

STAGES = ("read", "infer", "write")
"""The stages of a block whose wall seconds are measured."""


class State(IntEnum):
    """What becomes of a block; each block is in exactly one state."""

    PENDING = 0
    """To be computed, and given to nobody."""

    LEASED = 1
    """Given to a rank."""

    DONE = 2
    """Its bytes are durably written."""

    FAILED = 3
    """Tried as often as allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One block given to one rank; no two leases of a run are equal."""

    block: int
    """Index in the plan."""

    attempt: int
    """1 for the first try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A block whose bytes are durably written. Kept by the worker until acknowledged."""

    lease: Lease
    """What was finished."""

    num_patches: int
    """Patches that went through the network."""

    num_voxels: int
    """Voxels of the core, not counted once more per channel."""

    nbytes_read: int
    """Bytes of input that were read, uncompressed."""

    nbytes_written: int
    """Bytes of output that were written, uncompressed."""

    seconds: Mapping[str, float]
    """Wall seconds for each of `STAGES`."""

    checksum: str
    """`algorithm:hex` over the core's czyx little-endian bytes as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A block that could not be computed. Kept by the worker until acknowledged."""

    lease: Lease
    """What was tried."""

    error: str
    """Kind of error: the name of the exception's class."""

    message: str
    """What the user is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A block that has been tried as often as allowed."""

    block: int
    """Index in the plan."""

    core: Box
    """What it would have written."""

    rank: int
    """Where it was tried last."""

    host: str
    """Where that rank ran."""

    attempt: int
    """How often it was tried."""

    error: str
    """Kind of error."""

    message: str
    """What the user is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A worker can take more blocks; adds to what it has asked for and not yet been given."""

    num_blocks: int
    """How many more leases would fill the worker's pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """The coordinator leases blocks to the receiver."""

    leases: tuple[Lease, ...]
    """In the order in which they should be computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledge:
    """The records of these leases are in the journal and need not be kept any longer."""

    leases: tuple[Lease, ...]
    """As in the records: a block may have been tried more than once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """No more blocks will come; finish what is leased, then end."""

    reason: str
    """`finished`: every block is done or failed."""


Record = Done | Failed
Records = queue.SimpleQueue[Record | BaseException]
"""What a pipeline's threads have finished; an exception in it is a crash for the main thread."""

ToCoordinator = Record | Request
ToWorker = Assign | Acknowledge | Stop
Message = ToCoordinator | ToWorker
