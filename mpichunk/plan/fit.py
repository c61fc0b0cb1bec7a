"""Whether a rank's memory suffices for what it will need, and what would fit if it does not.

Pure arithmetic over estimates; knows neither ranks nor devices, only their limits.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mpichunk.config.schema import Config
from mpichunk.errors import UserError
from mpichunk.geometry.box import Triple
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.memory import (
    Memory,
    MemoryPart,
    least_nbytes,
    memory_of,
    total_nbytes,
)
from mpichunk.plan.plan import Plan
from mpichunk.plan.probe import Probe
from mpichunk.plan.suggestion import suggest
from mpichunk.plan.work import Work, work_of
from mpichunk.words import size

_PARTS_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one rank may take of one memory."""

    nbytes: int
    """That much at most, what it holds already included."""

    words: str
    """Where the number comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is weighed: a plan, and what is known of its network."""

    plan: Plan
    config: Config
    info: VolumeInfo

    num_ranks: int
    """Ranks that share the blocks."""

    num_blocks: int | None = None
    """Blocks still to do; None: all."""

    model_nbytes: int | None = None
    """Bytes of the model's files."""

    probe: Probe | None = None
    """What a forward told; None: it has not run yet, and what it needs is left out."""

    @property
    def work(self) -> Work:
        """What the plan computes and reads."""
        return work_of(self.plan, self.info.chunk_shape)

    def parts(self, batch_size: int | None = None) -> tuple[MemoryPart, ...]:
        """Return the memory of a rank by part, with another batch if one is given."""
        config, probe, old = self.config, self.probe, self.config.patch.batch_size
        if batch_size is not None:
            patch = config.patch.model_copy(update={"batch_size": batch_size})
            config = config.model_copy(update={"patch": patch})
            probe = None if probe is None else probe.for_batch(old, batch_size)
        return memory_of(
            self.plan,
            config,
            self.info,
            self.work,
            num_ranks=self.num_ranks,
            num_blocks=self.num_blocks,
            model_nbytes=self.model_nbytes,
            probe=probe,
        )


def find_refusal(need: Need, room: Room, *, memory: Memory) -> UserError | None:
    """Return why a run cannot work, None if as far as is known it can, or might.

    Args:
        need: what is to be run.
        room: what a rank may take.
        memory: which memory is meant.
    """
    if least_nbytes(need.parts(), memory) <= room.nbytes:
        return None
    advice, key = _advice(need, room, memory)
    # Of this run's own forward only `bench` lets `plan` know: what is refused leaves no files.
    after = "after `bench`, " if need.probe is not None and need.probe.pace is None else ""
    return UserError(
        f"{_comparison(need, room, memory)}; {advice}. {after}`plan` lists all parts, "
        "`plan --suggest` shapes that fit",
        key=key,
    )


def find_doubt(need: Need, room: Room, *, memory: Memory) -> str | None:
    """Return why a run that is not refused may yet fail, None if all fits; as of `find_refusal`."""
    parts = need.parts()
    if total_nbytes(parts, memory) <= room.nbytes or least_nbytes(parts, memory) > room.nbytes:
        return None
    advice, _ = _advice(need, room, memory)
    return (
        f"{_comparison(need, room, memory)}; it is tried, since most runs need less, but may be "
        f"killed for lack of memory: {advice}"
    )


def _comparison(need: Need, room: Room, memory: Memory) -> str:
    """Return in words what a rank needs and what it may take."""
    where = "of the accelerator's memory" if memory == "device" else "of memory"
    return (
        f"a rank needs about {size(total_nbytes(need.parts(), memory))} {where} "
        f"({_largest_parts(need, memory)}), but may take {size(max(0, room.nbytes))}: {room.words}"
    )


def _advice(need: Need, room: Room, memory: Memory) -> tuple[str, str]:
    """Return in words what would fit, and the key of the config that it is about."""

    def total(batch_size: int | None = None) -> int:
        return total_nbytes(need.parts(batch_size), memory)

    needed = total()
    shape, batch = need.plan.block_shape, need.config.patch.batch_size
    fitting_batch = _largest_batch(batch, lambda n: total(n) <= room.nbytes)
    # What a batch does not touch is the block's, and the programs'.
    batch_share = needed - total(1)
    fitting_shape = _fitting_shape(need, room, memory)
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


def _fitting_shape(need: Need, room: Room, memory: Memory) -> Triple | None:
    """Return the best smaller block that fits, None if none does."""
    found = suggest(
        need.plan,
        need.config,
        need.info,
        num_ranks=need.num_ranks,
        limit_nbytes=room.nbytes,
        memory=memory,
        model_nbytes=need.model_nbytes,
        probe=need.probe,
        most=1,
    )
    return found.rows[0].block_shape if found.rows else None


def _largest_parts(need: Need, memory: Memory) -> str:
    """Return the largest parts in words."""
    sizes = [(total_nbytes([part], memory), part.name) for part in need.parts()]
    largest = sorted(sizes, reverse=True)[:_PARTS_NAMED]
    return ", ".join(f"{size(nbytes)} {name}" for nbytes, name in largest if nbytes)
