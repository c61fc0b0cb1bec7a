"""Whether a rank's memory suffices for what it will need, and what would fit if it does not.

Pure arithmetic over estimates; knows neither ranks nor devices, only their limits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mpichunk.errors import UserError
from mpichunk.geometry.box import Triple
from mpichunk.plan.memory import (
    Memory,
    MemoryPart,
    least_nbytes,
    memory_of,
    total_nbytes,
)
from mpichunk.plan.premise import Premise
from mpichunk.plan.suggestion import suggest
from mpichunk.words import size

_PARTS_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one rank may take of one memory."""

    nbytes: int
    """That much at most, what it holds already included."""

    words: str
    """Where the number comes from."""


def find_refusal(premise: Premise, room: Room, *, memory: Memory) -> UserError | None:
    """Return why a run cannot work, None if as far as is known it can, or might.

    Args:
        premise: what is to be run.
        room: what a rank may take.
        memory: which memory is meant.
    """
    if least_nbytes(_parts(premise), memory) <= room.nbytes:
        return None
    advice, key = _advice(premise, room, memory)
    # Of this run's own forward only `bench` lets `plan` know: what is refused leaves no files.
    after = "after `bench`, " if premise.probe is not None and premise.probe.pace is None else ""
    return UserError(
        f"{_comparison(premise, room, memory)}; {advice}. {after}`plan` lists all parts, "
        "`plan --suggest` shapes that fit",
        key=key,
    )


def find_doubt(premise: Premise, room: Room, *, memory: Memory) -> str | None:
    """Return why a run that is not refused may yet fail, None if all fits; as of `find_refusal`."""
    parts = _parts(premise)
    if total_nbytes(parts, memory) <= room.nbytes or least_nbytes(parts, memory) > room.nbytes:
        return None
    advice, _ = _advice(premise, room, memory)
    return (
        f"{_comparison(premise, room, memory)}; it is tried, since most runs need less, but may be "
        f"killed for lack of memory: {advice}"
    )


def _parts(premise: Premise) -> tuple[MemoryPart, ...]:
    """Return the memory of a rank by part."""
    return memory_of(premise, premise.work)


def _comparison(premise: Premise, room: Room, memory: Memory) -> str:
    """Return in words what a rank needs and what it may take."""
    where = "of the accelerator's memory" if memory == "device" else "of memory"
    needed, most = size(total_nbytes(_parts(premise), memory)), size(max(0, room.nbytes))
    return (
        f"a rank needs about {needed} {where} ({_largest_parts(premise, memory)}), "
        f"but may take {most}: {room.words}"
    )


def _advice(premise: Premise, room: Room, memory: Memory) -> tuple[str, str]:
    """Return in words what would fit, and the key of the config that it is about."""

    def total(batch_size: int) -> int:
        return total_nbytes(_parts(premise.for_batch(batch_size)), memory)

    shape, batch = premise.plan.block_shape, premise.config.patch.batch_size
    needed = total_nbytes(_parts(premise), memory)
    fitting_batch = _largest_batch(batch, lambda n: total(n) <= room.nbytes)
    # What a batch does not touch is the block's, and the programs'.
    batch_share = needed - total(1)
    fitting_shape = _fitting_shape(premise, room, memory)
    cures = {}
    if fitting_batch:
        cures["patch.batch_size"] = f"patch.batch_size {fitting_batch}, not {batch},"
    if fitting_shape is not None:
        cures["block.shape"] = f"block.shape {fitting_shape}, not {shape},"
    order = ["patch.batch_size", "block.shape"]
    if 2 * batch_share < needed:
        order.reverse()
    keys = [key for key in order if key in cures]
    advice = " or ".join(cures[key] for key in keys) + " would fit"
    if not keys:
        fewer = "start fewer ranks per node, use" if memory != "device" else "use"
        advice = f"no smaller batch or block alone would fit: {fewer} a smaller patch.shape"
    return advice, keys[0] if keys else "patch.shape"


def _largest_batch(batch: int, fits: Callable[[int], bool]) -> int:
    """Return the largest batch below the present one that fits, 0 if not even one patch does."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fitting_shape(premise: Premise, room: Room, memory: Memory) -> Triple | None:
    """Return the best smaller block that fits, None if none does."""
    # Of other blocks nobody knows which are done.
    whole = replace(premise, num_blocks=None)
    found = suggest(whole, limit_nbytes=room.nbytes, memory=memory, most=1)
    return found.rows[0].block_shape if found.rows else None


def _largest_parts(premise: Premise, memory: Memory) -> str:
    """Return the largest parts in words."""
    sizes = [(total_nbytes([part], memory), part.name) for part in _parts(premise)]
    largest = sorted(sizes, reverse=True)[:_PARTS_NAMED]
    return ", ".join(f"{size(nbytes)} {name}" for nbytes, name in largest if nbytes)
