"""How long a run will take on a number of ranks, from what `bench` or one forward has measured.

Pure arithmetic: blocks that cost the same are counted, never visited. Knows no files and no clock.

    block     longest of: forwards + blending | read | write       they overlap, block after block
    rank      first read + its blocks + last write
    run       blocks dealt out one by one, each to the rank that is free first
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from mpichunk.geometry.box import ceil_div
from mpichunk.geometry.symmetry import turns_of
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Pace
from mpichunk.plan.work import AxisKind, Work, axis_kinds
from mpichunk.words import count, duration

Basis = Literal["bench", "forward", "batches"]
"""Whole blocks were measured; or one forward; or nothing, and a batch stands for a second."""

_FEWER = 0.98
"""Less than this share of the planned patches is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Blocks that take equally long."""

    seconds: float
    """What each takes one rank."""

    num_blocks: int
    """How many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run is expected to take."""

    basis: Basis
    """What it follows from."""

    num_ranks: int
    """Ranks that share the blocks."""

    costs: tuple[Cost, ...]
    """All blocks, the longest first."""

    edge_seconds: float
    """First read and last write of a rank, which nothing hides."""

    num_patches: int
    """Patches of all these blocks."""

    is_part: bool = False
    """Whether these are some blocks of a plan, whose patches are known on average only."""

    @property
    def num_blocks(self) -> int:
        """Blocks to compute."""
        return sum(cost.num_blocks for cost in self.costs)

    @property
    def seconds(self) -> float:
        """Wall seconds until all blocks are done."""
        return finish_seconds(self.costs, self.num_ranks) + self.edge_seconds

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time in which they have no block left to compute."""
        span = finish_seconds(self.costs, self.num_ranks) * self.num_ranks
        total = sum(cost.seconds * cost.num_blocks for cost in self.costs)
        return max(0.0, 1 - total / span) if span else 0.0

    def of_blocks(self, num_blocks: int) -> "Forecast":
        """Return what so many of the blocks take, every kind in proportion."""
        whole = self.num_blocks
        if num_blocks == whole or not whole:
            return self
        shares = [cost.num_blocks * num_blocks // whole for cost in self.costs]
        # Rounded up where most is lost, so that no kind has more than there are.
        lost = [-(cost.num_blocks * num_blocks % whole) for cost in self.costs]
        for i in sorted(range(len(lost)), key=lambda i: lost[i])[: num_blocks - sum(shares)]:
            shares[i] += 1
        costs = [replace(c, num_blocks=n) for c, n in zip(self.costs, shares, strict=True) if n]
        return replace(
            self,
            costs=tuple(costs),
            num_patches=round(self.num_patches * num_blocks / whole),
            is_part=True,
        )


def forecast(premise: Premise, work: Work) -> Forecast:
    """Return what all blocks are expected to take.

    Args:
        premise: what is to be run, on ranks each as fast as the one that was measured; without a
            probe seconds count batches, and only compare plans.
        work: what its plan computes and reads.
    """
    plan = premise.plan
    kinds = (axis_kinds(plan, 0), axis_kinds(plan, 1), axis_kinds(plan, 2))
    return forecast_of(kinds, premise, work)


def forecast_of(kinds: Sequence[Sequence[AxisKind]], premise: Premise, work: Work) -> Forecast:
    """Do what `forecast` does, from the kinds of columns on each axis."""
    config, probe = premise.config, premise.probe
    batch, num_turns = config.patch.batch_size, len(turns_of(config.model.augment))
    batch_seconds = num_turns * (1.0 if probe is None else probe.seconds)
    pace = None if probe is None else probe.pace
    read = 0.0 if pace is None else pace.read_seconds * voxels_of_a_read(work)
    scale = 1.0 if pace is None else pace.scale
    costs: Counter[float] = Counter()
    for z, y, x in product(*kinds):
        num_patches = z.num_patches * y.num_patches * x.num_patches
        seconds = ceil_div(num_patches, batch) * batch_seconds
        if pace is not None:
            num_voxels = z.extent * y.extent * x.extent
            seconds += num_patches * pace.patch_seconds + num_voxels * pace.finish_seconds
            seconds = scale * max(seconds, read, num_voxels * pace.write_seconds)
        costs[seconds] += z.num_columns * y.num_columns * x.num_columns
    edge = 0.0
    if pace is not None:
        edge = scale * (read + pace.write_seconds * work.num_roi_voxels / work.num_blocks)
    basis: Basis = "bench"
    if pace is None:
        basis = "forward" if probe is not None else "batches"
    return Forecast(
        basis=basis,
        num_ranks=premise.num_ranks,
        costs=tuple(Cost(seconds=s, num_blocks=costs[s]) for s in sorted(costs, reverse=True)),
        edge_seconds=edge,
        num_patches=work.num_patches,
    )


def pace_of(
    *,
    batch_seconds: float,
    num_patches: float,
    num_batches: float,
    num_core_voxels: float,
    num_read_voxels: float,
    blend_seconds: float,
    finish_seconds: float,
    read_seconds: float,
    write_seconds: float,
    whole_seconds: float,
    num_blocks: int,
    num_ranks: int,
) -> Pace:
    """Return the pace at which `forecast` gives back a measurement.

    Args:
        batch_seconds: of one forward.
        num_patches, num_batches, num_core_voxels, num_read_voxels: of one block; batches with
            every turn, voxels of whole storage chunks read.
        blend_seconds, finish_seconds, read_seconds, write_seconds: of one block, each alone.
        whole_seconds: of `num_blocks` blocks, one behind the other, as in a run.
        num_blocks: blocks of one rank.
        num_ranks: ranks measured at the same time.
    """
    compute = num_batches * batch_seconds + blend_seconds + finish_seconds
    step = max(compute, read_seconds, write_seconds)
    model_seconds = num_blocks * step + read_seconds + write_seconds
    return Pace(
        patch_seconds=blend_seconds / num_patches if num_patches else 0.0,
        finish_seconds=finish_seconds / num_core_voxels,
        read_seconds=read_seconds / max(1.0, num_read_voxels),
        write_seconds=write_seconds / num_core_voxels,
        scale=whole_seconds / model_seconds if model_seconds else 1.0,
        num_ranks=num_ranks,
    )


def finish_seconds(costs: Iterable[Cost], num_ranks: int) -> float:
    """Return when the last block is done, if the longest are dealt out first.

    Each goes to the rank that is free first, as a scheduler would; but all blocks of a kind are
    dealt out at once, so that a billion take no longer than a thousand.
    """
    loads = np.zeros(num_ranks)
    for cost in sorted(costs, key=lambda cost: -cost.seconds):
        if cost.seconds > 0:
            _deal(loads, cost.seconds, cost.num_blocks)
    return float(loads.max())


def _deal(loads: "np.ndarray[Any, np.dtype[np.float64]]", seconds: float, num: int) -> None:
    """Add `num` blocks of equal cost, one after the other, to the smallest of (ranks,) loads."""
    num_ranks = len(loads)
    if num > 2 * num_ranks:
        # All that begin below the level which num - num_ranks blocks would fill the ranks up to:
        # each rank rounds up by less than one block, so that these are no more than there are.
        level = _level(np.sort(loads), (num - num_ranks) * seconds)
        times = np.ceil(np.maximum(0, level - loads) / seconds)
        loads += times * seconds
        num -= int(times.sum())
    while num > 0:
        # Whoever begins within one block of the first gets just one, the first of them first.
        first = np.flatnonzero(loads < loads.min() + seconds)
        if len(first) > num:
            first = first[np.argsort(loads[first], kind="stable")[:num]]
        loads[first] += seconds
        num -= len(first)


def _level(ascending: "np.ndarray[Any, np.dtype[np.float64]]", volume: float) -> float:
    """Return how high `volume` seconds of work fill ranks with these loads, as water would."""
    sums = np.cumsum(ascending)
    counts = np.arange(1, len(ascending) + 1)
    levels = (volume + sums) / counts
    # The lowest k ranks are under water if their level does not reach the next one.
    above = np.append(ascending[1:], np.inf)
    return float(levels[np.argmax(levels <= above)])


def voxels_of_a_read(work: Work) -> float:
    """Return the voxels that a block reads on average, in whole chunks if chunks are known."""
    decoded = work.decode_amplification
    share = work.read_amplification if decoded is None else decoded
    return share * work.num_roi_voxels / work.num_blocks


# ---- Words ------------------------------------------------------------------------------------


def forecast_json(found: Forecast | None) -> dict[str, Any] | None:
    """Return a prediction as JSON values; None where nothing was measured."""
    if found is None or found.basis == "batches":
        return None
    return {
        "seconds": found.seconds,
        "num_ranks": found.num_ranks,
        "num_blocks": found.num_blocks,
        "basis": found.basis,
        "idle_share": found.idle_share,
    }


def format_outcome(
    found: Forecast | None, *, num_done: int, num_patches: int, seconds: float
) -> str:
    """Return in one line how a prediction has come true, for the blocks of this start alone.

    Args:
        found: what was expected of all blocks of this start; None if nothing was.
        num_done: blocks that were done.
        num_patches: patches that ran for them.
        seconds: wall time that they took.
    """
    if found is None or found.basis == "batches":
        return "no prediction: run `python -m mpichunk bench` first to measure what a run takes"
    if not num_done:
        return "prediction: no block was done to compare it with"
    expected = found.of_blocks(num_done)
    what = "" if found.basis == "bench" else " for the network alone"
    text = (
        f"predicted {duration(expected.seconds)}{what} ({count(num_done, 'block')}, "
        f"{count(found.num_ranks, 'rank')}), took {duration(seconds)}"
    )
    if expected.seconds > 0:
        text += f": {seconds / expected.seconds:.2f} times as long"
    if not expected.is_part and num_patches < _FEWER * expected.num_patches:
        text += (
            f"; {1 - num_patches / expected.num_patches:.0%} of the patches were blank or masked"
        )
    if found.basis != "bench":
        text += "; `bench` measures reading and writing too"
    return text
