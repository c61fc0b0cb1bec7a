"""The frozen values that ranks send one another, and the states of a block.

Knows no transport and no policy. A block travels as its index in the plan: every rank has the plan.

    worker                                        coordinator
      | -- Request(num_blocks) --------------------> |   may stay unanswered until blocks come free
      | <-- Assign(leases) ------------------------- |
      | -- Done(lease) or Failed(lease) -----------> |   kept by the worker ...
      | <-- Acknowledge(leases) -------------------- |   ... until it is in the journal
      | -- Drain(reason) --------------------------> |   this rank was asked to end early
      | <-- Stop(reason) --------------------------- |
      | -- GiveBack(leases) -----------------------> |   what this rank does not keep
      | -- Heartbeat(counters) --------------------> |   again and again; the last one at the end
      | <-- CoordinatorHeartbeat(lease_seconds) ---- |   the coordinator is alive, too
      | <-- Contest(lease) ------------------------- |   another rank is to compute it, too
      | -- PromiseToAsk(lease) --------------------> |   it is not being written, and asks before
      | -- AskToWrite(lease) ----------------------> |   before a block is written that is late
      | <-- WriteVerdict(lease, may_write) --------- |
      | -- ProcessGone(rank) ----------------------> |   a process of the same machine has ended
      | <-- Kill(rank) ----------------------------- |   one that hangs, on the same machine
      | <-- Leave(code) ---------------------------- |   all have sent their last sign of life
"""

import queue
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from mpichunk.geometry.box import Box

STAGES = ("read", "infer", "write")
"""The stages of a block whose wall seconds are measured."""

FINISHED = "finished"
"""Why a run stops: every block is done or failed."""

DRAINED = "drained"
"""Why a run stops: it was asked to; what is left is for the next start."""

FAILURES = "failures"
"""Why a run stops: going on would only make more blocks fail."""


RANK_LOST = "RankLost"
"""The error of a block that a rank may have died of."""


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
    """One block given to one rank, for one try.

    Leases may be equal: only a try that fails is counted. What was given back, or taken from a rank
    that hung or died, is leased under the same number again. Harmless, since

    * whoever keeps leases of several ranks knows whose each one is;
    * to a rank that holds it still, or again since it came back, it is the same lease;
    * what the coordinator says of the first one arrives before the second one does;
    * what a rank says of the first one may arrive after the second one was made only if it was
      taken from that rank meanwhile, which then asks before it writes (`Worker`);
    * when ranks are lost, what is on its way is lost, and each says what it holds.
    """

    block: int
    """Index in the plan."""

    attempt: int
    """1 for the first try."""

    is_backup: bool = False
    """Whether another rank computes the block, too: then who is ready asks before it writes."""

    def __hash__(self) -> int:
        return self.block

    def __reduce__(self) -> tuple[object, ...]:
        # A third of the bytes of a pickled dataclass, and a fifth of the time.
        return _lease, (self.block, self.attempt, self.is_backup)


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

    batch_size: int | None = None
    """Patches per forward, where the device had no memory for as many as were asked for."""

    def __reduce__(self) -> tuple[object, ...]:
        lease = self.lease
        values = (
            (lease.block, lease.attempt, lease.is_backup),
            self.num_patches,
            self.num_voxels,
            self.nbytes_read,
            self.nbytes_written,
            dict(self.seconds),
            self.checksum,
            self.batch_size,
        )
        return _done, values


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A block that could not be computed. Kept by the worker until acknowledged."""

    lease: Lease
    """What was tried."""

    error: str
    """Kind of error: the name of the exception's class."""

    message: str
    """What the user is told."""

    kind: str = ""
    """The same for all that fail alike; "" where that is the message but for its numbers."""


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
class Drain:
    """The rank was asked that the run end early; may be sent again."""

    reason: str
    """By whom or by what, for the user: "SIGTERM"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack:
    """Leases that the worker does not keep: it must end early, has too many, or may not write."""

    leases: tuple[Lease, ...]
    """No record of them will come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The rank is alive."""

    counters: tuple[float, ...]
    """What it has done since it started; `ended` among them when it has nothing more to do."""


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
    """No more blocks will come; finish what is being computed or written, then end."""

    reason: str
    """One of `FINISHED`, `DRAINED`, `FAILURES`."""

    why: str = ""
    """More about it in words, for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A block that was computed but not written, because another rank was quicker."""

    lease: Lease
    """What was not finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The lease is slow, and another rank is to compute its block as well."""

    lease: Lease
    """What the receiver holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseToAsk:
    """The answer to `Contest`, if the block is not being written yet: the rank will ask before."""

    lease: Lease
    """What it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToWrite:
    """Other ranks may compute this block, too; may this one write it?"""

    lease: Lease
    """What has been computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteVerdict:
    """The answer to `AskToWrite`."""

    lease: Lease
    """What was asked for."""

    may_write: bool
    """False when another rank has written the block, or is about to: two never write one block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorHeartbeat:
    """What the coordinator lets ranks know now and then, and when it has changed."""

    lease_seconds: float
    """How long a lease may take by now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGone:
    """The process of a rank has ended, and MPI has not said so."""

    rank: int
    """Whose process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """End the process of a rank that hangs."""

    rank: int
    """Whose process; it runs on the machine of the receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Every rank has ended, or is not waited for: the last message that a rank receives."""

    code: int | None = None
    """Exit code of a job that must be aborted, as a rank can neither go on nor be ended."""


def _lease(block: int, attempt: int, is_backup: bool) -> Lease:
    """Return a lease that has travelled."""
    return Lease(block=block, attempt=attempt, is_backup=is_backup)


def _done(
    lease: tuple[int, int, bool],
    num_patches: int,
    num_voxels: int,
    nbytes_read: int,
    nbytes_written: int,
    seconds: Mapping[str, float],
    checksum: str,
    batch_size: int | None,
) -> Done:
    """Return a record that has travelled."""
    return Done(
        lease=_lease(*lease),
        num_patches=num_patches,
        num_voxels=num_voxels,
        nbytes_read=nbytes_read,
        nbytes_written=nbytes_written,
        seconds=seconds,
        checksum=checksum,
        batch_size=batch_size,
    )


Record = Done | Failed
Records = queue.SimpleQueue[Record | Dropped | BaseException]
"""What a pipeline's threads have finished; an exception in it is a crash for the main thread."""

ToCoordinator = (
    Record | Request | Drain | GiveBack | Heartbeat | PromiseToAsk | AskToWrite | ProcessGone
)
ToWorker = (
    Assign | Acknowledge | Stop | CoordinatorHeartbeat | Contest | WriteVerdict | Kill | Leave
)
Message = ToCoordinator | ToWorker
