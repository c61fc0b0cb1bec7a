"""The parts of a run where nothing happens: no failure counts, nobody is seen, nobody is asked."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpichunk.errors import ExitCode
from mpichunk.process import Process
from mpichunk.ranks.neighbours import Neighbours
from mpichunk.roles.coordinator import Coordinator
from mpichunk.roles.drain import DrainSources, DrainWatch
from mpichunk.roles.monitor import CoordinatorRole
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.scheduler import Scheduler
from tests.blocks import core_of


def patient_breaker(num_ranks: int) -> Breaker:
    """Return one that no number of failures trips."""
    return Breaker(num_ranks=num_ranks, max_consecutive_failures=sys.maxsize)


def coordinator_of(
    scheduler: Scheduler,
    journal: Any,
    hosts: Mapping[int, str],
    *,
    breaker: Breaker | None = None,
) -> Coordinator:
    """Return one that takes no block for slow, and ends for no failure unless a breaker is given.

    `journal` may be whatever takes what a `Journal` does.
    """
    return Coordinator(
        scheduler,
        journal,
        core_of=core_of,
        hosts=hosts,
        breaker=breaker or patient_breaker(len(hosts)),
        durations=BlockDurations(float("inf")),
    )


def strangers(rank: int, ranks: Iterable[int]) -> Neighbours:
    """Return the processes of ranks of which each has a machine of its own."""
    return Neighbours(
        rank, {other: Process(machine=f"machine {other}", pid=0, started=0) for other in ranks}
    )


def unasked() -> DrainWatch:
    """Return what never ends a run early."""
    return DrainWatch(DrainSources(), stop_file=Path("/no/such/run/STOP"))


def nobody_takes_over() -> CoordinatorRole:
    """Stand for a second role that must not be needed."""
    raise AssertionError("nobody can take over")


def unexpected(lead: CoordinatorRole) -> int:
    """Return the exit code of a run of which nothing is in the journal."""
    return ExitCode.UNEXPECTED
