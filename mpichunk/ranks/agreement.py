"""How ranks agree before and after the work: all go on, or all stop with the same message.

Every rank calls these at the same place. Knows collectives, not what is agreed on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from mpichunk.errors import UserError
from mpichunk.ranks.communicator import Communicator

T = TypeVar("T")


def on_rank_0(comm: Communicator, make: Callable[[], T]) -> T:
    """Run `make` on rank 0 alone; return its value, or raise its UserError, on every rank.

    What it returns travels to all ranks, so it must be picklable and small.
    """
    outcome = comm.bcast(_attempt(make) if comm.is_coordinator else None)
    if isinstance(outcome, _Refusal):
        raise outcome.error
    return cast(T, outcome)


def on_every_rank(comm: Communicator, make: Callable[[], T]) -> T:
    """Run `make` on every rank; return each its own value.

    Raises:
        UserError: on every rank, that of the lowest rank that has one. A rank and host are put
            before the message when not all ranks failed alike.
    """
    outcome = _attempt(make)
    refused = outcome.error if isinstance(outcome, _Refusal) else None
    errors = comm.allgather(None if refused is None else (comm.rank, comm.host, refused))
    failed = [item for item in errors if item is not None]
    if failed:
        rank, host, first = failed[0]
        alike = len(failed) == comm.size and len({str(error) for _, _, error in failed}) == 1
        if not alike:
            first.prefixed(f"rank {rank} on {host}")
        raise first
    return cast(T, outcome)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What stands for a value where there is none."""

    error: UserError


def _attempt(make: Callable[[], T]) -> T | _Refusal:
    """Return the value of `make`, or its UserError without what cannot travel."""
    try:
        return make()
    except UserError as error:
        return _Refusal(error.with_traceback(None))
