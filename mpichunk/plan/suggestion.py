"""Which block shapes would make a run shorter, within the memory of a rank.

Tries shapes that stride and write unit both divide, and counts each exactly, as `plan` does. Pure
arithmetic; changes nothing and knows no files.

    fewer patches           large blocks, where blocks are seamless
    ranks that end together small ones, or as many as the ranks divide
    less read twice         large ones, or multiples of the input's chunks
    memory                  small ones
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import floor, lcm, log, prod

import numpy as np

from mpichunk.config.rules import CPU_BACKENDS, default_chunk_shape
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Triple, ceil_div, triple
from mpichunk.plan.advice import MANY_BLOCKS
from mpichunk.plan.memory import Memory, memory_of, total_nbytes
from mpichunk.plan.plan import MOST_BLOCKS
from mpichunk.plan.prediction import Forecast, forecast, forecast_of
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import AxisKind, AxisWork, Work, axis_kinds, axis_work

SAME_TIME = 0.01
"""Times that differ by less count as equal: no prediction is better than that."""

FEW_BLOCKS = 4
"""With fewer blocks per rank, reading and writing hide behind little, and a lost one is much."""

_SAME_READING = 0.05
_SAME_SIZE = 1.25
"""Of shapes whose volumes differ by less than this factor, the better one is shown."""

_LARGEST_CHUNK, _USUAL_CHUNK, _SMALLEST_CHUNK = 256, 64, 8
_MOST_EXTENTS = 24
"""Extents that are tried per axis: the number of shapes is its cube."""

_EVEN_SPLITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One shape of blocks, and what a run with it takes."""

    block_shape: Triple
    """A multiple of stride and write unit."""

    chunk_shape: Triple
    """Storage chunk of the output."""

    work: Work
    """What is computed and read."""

    forecast: Forecast
    """How long it takes."""

    nbytes: int
    """Known bytes of a rank of the memory that is limited."""

    host_nbytes: int
    """Known bytes of its host's memory, in a run on an accelerator."""

    names_chunk: bool = False
    """Whether the chunk must be named, since another one would follow from the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """What was found."""

    now: Suggestion
    """The config as it is, which may fit neither the memory nor the stride."""

    rows: tuple[Suggestion, ...]
    """The best first; () if not even the smallest fits."""

    smallest_nbytes: int
    """Memory of the shape that needs the least."""

    smallest_host_nbytes: int
    """Host's memory of the shape that needs the least of that, in a run on an accelerator."""

    num_tried: int
    """Shapes that were counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """One extent of blocks along one axis."""

    extent: int
    chunk: int
    work: AxisWork
    kinds: tuple[AxisKind, ...]


def suggest(
    premise: Premise,
    *,
    limit_nbytes: int,
    memory: Memory,
    host_limit_nbytes: int | None = None,
    is_chunk_open: bool = False,
    most: int = 6,
) -> Suggestions:
    """Return up to `most` shapes, those with the shortest predicted time first.

    Of equally long ones (`SAME_TIME`) those with `FEW_BLOCKS` per rank or more are first, then
    what reads least, then what needs the least memory.

    Args:
        premise: what there is now.
        limit_nbytes: what a rank may take of `memory`.
        memory: which memory is limited.
        host_limit_nbytes: with an accelerator's memory, what a rank may take of the host's; None:
            not limited.
        is_chunk_open: whether the chunk of the output follows from the block.
        most: how many to return.
    """
    search = _Search(
        premise=premise,
        memory=memory,
        limit_nbytes=limit_nbytes,
        host_limit_nbytes=host_limit_nbytes if memory == "device" else None,
        is_chunk_open=is_chunk_open,
    )
    now = search.now()
    tried: list[Suggestion] = []
    smallest, smallest_host = now.nbytes, now.host_nbytes
    for item in search.shapes(now):
        smallest = min(smallest, item.nbytes)
        smallest_host = min(smallest_host, item.host_nbytes)
        if search.fits(item.nbytes, item.host_nbytes):
            tried.append(item)
    return Suggestions(
        now=now,
        rows=tuple(_different(_ranked(tried), most)),
        smallest_nbytes=smallest,
        smallest_host_nbytes=smallest_host,
        num_tried=len(tried),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What `suggest` was asked for."""

    premise: Premise
    memory: Memory
    limit_nbytes: int
    host_limit_nbytes: int | None
    is_chunk_open: bool

    def now(self) -> Suggestion:
        """Return the config as it is."""
        plan, config, work = self.premise.plan, self.premise.config, self.premise.work
        nbytes, host_nbytes = self.nbytes_of(self.premise, work)
        return Suggestion(
            block_shape=plan.block_shape,
            chunk_shape=config.chunk_shape,
            work=work,
            forecast=forecast(self.premise, work),
            nbytes=nbytes,
            host_nbytes=host_nbytes,
        )

    def fits(self, nbytes: int, host_nbytes: int) -> bool:
        """Return whether a rank may take so much."""
        host_limit = self.host_limit_nbytes
        return nbytes <= self.limit_nbytes and (host_limit is None or host_nbytes <= host_limit)

    def shapes(self, now: Suggestion) -> Iterator[Suggestion]:
        """Yield what there is to choose from, without most of what is far beyond the limit."""
        host_limit = self.host_limit_nbytes if self.memory == "device" else self.limit_nbytes
        for extents in product(*_extents(self.premise, self.is_chunk_open)):
            z, y, x = extents
            work = replace(now.work, axes=(z.work, y.work, x.work))
            # No need to add up the rest where one core is too much: a host holds it whole.
            is_vain = host_limit is not None and self.core_nbytes(work) > host_limit
            if work.num_blocks <= MOST_BLOCKS and not is_vain:
                yield self.suggestion(extents, work, now)

    def suggestion(self, extents: Sequence[_Extent], work: Work, now: Suggestion) -> Suggestion:
        """Return one shape; its time is left as it is `now` where it does not fit anyway."""
        shape, chunk = (triple([getattr(e, n) for e in extents]) for n in ("extent", "chunk"))
        premise = self.premise
        config = with_block(premise.config, shape, chunk if self.is_chunk_open else None)
        plan = replace(premise.plan, block_shape=shape)
        premise = replace(premise, plan=plan, config=config)
        nbytes, host_nbytes = self.nbytes_of(premise, work)
        expected = now.forecast
        if self.fits(nbytes, host_nbytes):
            kinds = [extent.kinds for extent in extents]
            expected = forecast_of(kinds, premise, work)
        return Suggestion(
            block_shape=shape,
            chunk_shape=config.chunk_shape,
            work=work,
            forecast=expected,
            nbytes=nbytes,
            host_nbytes=host_nbytes,
            names_chunk=self.is_chunk_open and chunk != default_chunk_shape(shape),
        )

    def core_nbytes(self, work: Work) -> int:
        """Return the bytes of the largest core as it is written."""
        itemsize = np.dtype(self.premise.config.output.dtype).itemsize
        return prod(work.core_shape) * self.premise.config.num_written_channels * itemsize

    def nbytes_of(self, premise: Premise, work: Work) -> tuple[int, int]:
        """Return the known bytes of a rank: of the memory that is limited, of the host's."""
        parts = memory_of(premise, work)
        return total_nbytes(parts, self.memory), total_nbytes(parts, "host")


def with_block(config: Config, shape: Triple, chunk: Triple | None = None) -> Config:
    """Return the config with another block, and another chunk of the output if one is given."""
    changes = {"block": config.block.model_copy(update={"shape": shape})}
    if chunk is not None:
        output = config.output.model_copy(update={"chunk_shape": chunk})
        return config.model_copy(update={**changes, "output": output})
    return config.model_copy(update=changes)


def runs_on_cpu(config: Config, probe: Probe | None) -> bool:
    """Return whether the network of a config runs on the CPU, as far as anybody knows."""
    if config.model.backend in CPU_BACKENDS or config.compute.device == "cpu":
        return True
    return config.compute.device == "auto" and (probe is None or probe.device.startswith("cpu"))


# ---- Extents ----------------------------------------------------------------------------------


def _extents(premise: Premise, is_chunk_open: bool) -> list[list[_Extent]]:
    """Return per axis the extents to try."""
    plan, config = premise.plan, premise.config
    is_open = is_chunk_open and config.output.shard_shape is None
    chunks = premise.info.chunk_shape or (None, None, None)
    found = []
    for axis in range(3):
        step = plan.stride[axis]
        if not is_open:
            step = lcm(step, config.write_unit[axis])
        length = plan.roi.stop[axis] - plan.output_domain.start[axis]
        extents = [k * step for k in _multiples(ceil_div(length, step))]
        if is_open:
            decent = [n for n in extents if chunk_for(n) >= min(n, _SMALLEST_CHUNK)]
            wide = lcm(step, _SMALLEST_CHUNK)
            extents = decent or [k * wide for k in _multiples(ceil_div(length, wide))]
        column = []
        for extent in extents:
            shape = triple([extent if a == axis else plan.block_shape[a] for a in range(3)])
            other = replace(plan, block_shape=shape)
            column.append(
                _Extent(
                    extent=extent,
                    chunk=chunk_for(extent) if is_open else config.chunk_shape[axis],
                    work=axis_work(other, axis, chunks[axis]),
                    kinds=axis_kinds(other, axis),
                )
            )
        found.append(column)
    return found


def _multiples(most: int) -> list[int]:
    """Return numbers of [1, most] worth a try, ascending: few and many, and even splits of `most`.

    All of a short range; of a long one what splits it evenly, since the last block is then no
    smaller than the others, and about every 1.4th number between.
    """
    if most <= _MOST_EXTENTS:
        return list(range(1, most + 1))
    found = {ceil_div(most, n) for n in range(1, _EVEN_SPLITS + 1)}
    wanted, number = _MOST_EXTENTS - len(found), 1.0
    ratio = most ** (1 / wanted)
    while number <= most:
        found.add(round(number))
        number = max(number * ratio, number + 1)
    return sorted(found)


def chunk_for(extent: int) -> int:
    """Return the divisor of an extent that makes the best chunk: near 64, on a scale of factors."""
    divisors = [n for n in range(1, min(extent, _LARGEST_CHUNK) + 1) if extent % n == 0]
    usual = default_chunk_shape((extent, extent, extent))[0]
    best = min(divisors, key=lambda n: (abs(log(n / _USUAL_CHUNK)), n))
    return usual if 2 * usual > _USUAL_CHUNK else best


# ---- Ranking ----------------------------------------------------------------------------------


def _ranked(tried: Sequence[Suggestion]) -> list[Suggestion]:
    """Return the shapes, the best first."""
    seconds = {id(item): item.forecast.seconds for item in tried}
    best = min(seconds.values(), default=0.0)

    def key(item: Suggestion) -> tuple[bool, int, bool, int, int, int]:
        longer = log(seconds[id(item)] / best) / SAME_TIME if best > 0 else 0.0
        return (
            item.work.num_blocks > MANY_BLOCKS,
            floor(longer),
            item.work.num_blocks < FEW_BLOCKS * item.forecast.num_ranks,
            ceil_div(round(1000 * reading(item.work)), round(1000 * _SAME_READING)),
            item.nbytes,
            item.work.num_blocks,
        )

    return sorted(tried, key=key)


def reading(work: Work) -> float:
    """Return how often each voxel is read, in whole storage chunks if they are known."""
    decoded = work.decode_amplification
    return work.read_amplification if decoded is None else decoded


def _different(ranked: Sequence[Suggestion], most: int) -> Iterator[Suggestion]:
    """Yield the first shapes, leaving out those of about the size of a better one."""
    volumes: list[int] = []
    for item in ranked:
        volume = prod(item.block_shape)
        if all(max(v, volume) >= _SAME_SIZE * min(v, volume) for v in volumes):
            volumes.append(volume)
            yield item
        if len(volumes) == most:
            return
