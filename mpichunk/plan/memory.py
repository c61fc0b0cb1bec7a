"""The memory of one rank at its peak, part by part.

Pure arithmetic on the largest block of a plan; knows no networks: what a forward takes is given.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from mpichunk.config.reduction import Reduction
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Triple, ceil_div, triple
from mpichunk.geometry.buffers import CACHE_NBYTES, FINISH_NBYTES, LAYERS_IN_FLIGHT, most_windows
from mpichunk.geometry.symmetry import turns_of
from mpichunk.geometry.write_parts import most_under_way
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import Work

Memory = Literal["cpu", "host", "device"]
"""That of a run on a CPU; of one on an accelerator, the host's, and the device's own."""

MIB = 1 << 20
FLOAT32_NBYTES = 4

BLOCKS_IN_FLIGHT = 3
"""Blocks that a rank holds: one in the network, the others being read or written."""

QUICK = 3
"""Computing a block must take so many times as long as writing it, for one to be written at a time.

Disks are shared, and slower now and then.
"""

START_SPREAD = 8
"""One start may take an eighth more than another of the same network.

Measured with OpenVINO, which converts the network in memory: 1000 to 1112 MiB.
"""

HEAP_SPREAD = 2
"""A forward of torch on a CPU takes up to half as much again in a run as alone.

What reads and writes meanwhile leaves holes that the next forward's arrays do not fit into.
"""

PEAK_SPREAD = 10
"""One run may take a tenth more than another of the same blocks.

Measured with torch: 716 to 805 MiB, by where what comes and goes happens to lie in the heap.
"""

PROGRAM_NBYTES = 95 * MIB
"""Resident memory of a rank before its first block, without torch (measured: 94 MiB)."""

STORAGE_NBYTES = 8 * MIB
"""What stays of reading and writing the first blocks: code and buffers (measured: 5 to 8 MiB)."""

RUN_NBYTES = 14 * MIB
"""What a rank that runs blocks holds beside: modules, journal, display, and buffers of MPI, which
are there once there were messages (measured: 4 MiB without MPI, 13 MiB on two ranks)."""

TORCH_NBYTES = 195 * MIB
"""What torch and a first forward on a CPU add to it (measured: 194 MiB)."""

ENGINE_NBYTES = {"pytorch": TORCH_NBYTES, "onnxruntime": 32 * MIB, "openvino": 59 * MIB, "pznet": 0}
"""What each backend's library and a first forward on a CPU add (measured); pznet has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """One part of a rank's memory at its peak, bytes; None means unmeasured."""

    name: str
    """What it is, in a few words."""

    cpu_nbytes: int | None
    """In a run on a CPU."""

    host_nbytes: int | None
    """In the host's memory, in a run on an accelerator."""

    device_nbytes: int | None
    """In the accelerator's memory, in a run on one."""

    is_certain: bool = True
    """Whether every run needs it; else most need less."""


def total_nbytes(parts: Iterable[MemoryPart], memory: Memory) -> int:
    """Return the known bytes of all parts in one memory."""
    return sum(getattr(part, f"{memory}_nbytes") or 0 for part in parts)


def least_nbytes(parts: Iterable[MemoryPart], memory: Memory) -> int:
    """Return the known bytes that no run does without."""
    return total_nbytes([part for part in parts if part.is_certain], memory)


def memory_of(premise: Premise, work: Work) -> tuple[MemoryPart, ...]:
    """Return the peak memory of one rank by part; `work` is what the plan computes."""
    config, probe = premise.config, premise.probe
    # In equal shares; who is given more has no more of them at the same time.
    num_blocks = work.num_blocks if premise.num_blocks is None else premise.num_blocks
    num_own = max(1, ceil_div(num_blocks, premise.num_ranks))
    in_flight = min(BLOCKS_IN_FLIGHT, num_own)
    parts = [
        *_block_parts(premise, work, in_flight),
        _on_device("batch into and out of the network", _batch_nbytes(premise)),
        *_blending_parts(premise, work),
        _on_host("chunks of the input", _chunks_nbytes(premise, work, num_own)),
        *_program_parts(premise),
    ]
    if config.model.backend != "identity":
        parts.append(_on_device("inside the network", None if probe is None else probe.nbytes))
    if probe is not None:
        parts.append(_more_part(config, probe))
    if probe is not None and probe.start_nbytes is not None:
        parts.append(_start_part(parts, probe.start_nbytes))
    return tuple(
        part
        for part in parts
        if (part.cpu_nbytes, part.host_nbytes, part.device_nbytes) != (0, 0, 0)
    )


def unexplained_nbytes(premise: Premise, *, peak_nbytes: int, memory: Memory) -> int:
    """Return what a rank of `bench` held at its peak beyond the parts that are known.

    Args:
        premise: the blocks that it ran, and what is known of them.
        peak_nbytes: the most that it held while it ran blocks.
        memory: which of the host's memories: that beside a CPU, or an accelerator.
    """
    if premise.probe is not None:
        # The start is over by then.
        premise = replace(premise, probe=replace(premise.probe, start_nbytes=None))
    known = memory_of(premise, premise.work)
    most_nbytes = peak_nbytes + peak_nbytes // PEAK_SPREAD
    return max(0, most_nbytes - total_nbytes(known, memory))


def _program_parts(premise: Premise) -> Iterator[MemoryPart]:
    """Yield what is there between blocks: measured where it was, else guessed."""
    backend, probe = premise.config.model.backend, premise.probe
    resident = None if probe is None else probe.resident_nbytes
    if resident is not None:
        yield _on_host("program and network, idle", resident)
        is_warm = probe is not None and probe.pace is not None
        yield _on_host("messages, and storage", RUN_NBYTES + (0 if is_warm else STORAGE_NBYTES))
        if backend != "identity":
            yield _only_device("weights", premise.model_nbytes)
        return
    yield _on_host("Python, MPI and storage libraries", PROGRAM_NBYTES)
    if backend != "identity":
        yield _on_host("torch" if backend == "pytorch" else backend, ENGINE_NBYTES[backend])
        yield _on_device("weights", premise.model_nbytes)


def _more_part(config: Config, probe: Probe) -> MemoryPart:
    """Return what a rank holds beyond all that is known; a guess, until `bench` has weighed it."""
    is_guess = probe.pace is None and config.model.backend == "pytorch"
    guess = (probe.nbytes or 0) // HEAP_SPREAD if is_guess else 0
    return MemoryPart(
        name="more, a guess until `bench` is run" if is_guess else "more, as `bench` has found",
        cpu_nbytes=probe.more_nbytes + guess,
        host_nbytes=probe.more_nbytes,
        device_nbytes=0,
        is_certain=False,
    )


def _start_part(parts: Sequence[MemoryPart], start_nbytes: int) -> MemoryPart:
    """Return by how much the start takes more than blocks do, the other parts being given."""
    most_nbytes = start_nbytes + start_nbytes // START_SPREAD
    return MemoryPart(
        name="more, while the network is loaded",
        cpu_nbytes=max(0, most_nbytes - total_nbytes(parts, "cpu")),
        host_nbytes=max(0, most_nbytes - total_nbytes(parts, "host")),
        device_nbytes=0,
        is_certain=False,
    )


def _most_written(premise: Premise, work: Work) -> int:
    """Return how many blocks are being written at the same time, at most.

    One, where `bench` has found that writing takes far less time than computing; else all but one.
    """
    config, probe = premise.config, premise.probe
    pace = None if probe is None else probe.pace
    if probe is None or pace is None:
        return BLOCKS_IN_FLIGHT - 1
    num_patches, num_voxels = work.patches_per_block[1], prod(work.core_shape)
    num_forwards = ceil_div(num_patches, config.patch.batch_size)
    computing = num_forwards * len(turns_of(config.model.augment)) * probe.seconds
    computing += num_patches * pace.patch_seconds + num_voxels * pace.finish_seconds
    is_quick = QUICK * pace.write_seconds * num_voxels < computing
    return 1 if is_quick else BLOCKS_IN_FLIGHT - 1


def _encoded_nbytes(config: Config, work: Work, num_channels: int, itemsize: int) -> int:
    """Return what the storage library holds, at most, of a core that is being written.

    Measured with TensorStore 0.1: of chunks what is under way, where the disk is slower than the
    encoder; of a shard two, one as it is put together and one encoded.
    """
    voxel_nbytes = num_channels * itemsize
    num_copies = 1 if config.output.shard_shape is None else 2
    return num_copies * most_under_way(work.core_shape, config.write_unit, voxel_nbytes)


def _block_parts(premise: Premise, work: Work, in_flight: int) -> Iterator[MemoryPart]:
    """Yield what a rank holds of its blocks on the host: read, computed, being written."""
    config, info = premise.config, premise.info
    itemsize = np.dtype(config.output.dtype).itemsize
    source = _nbytes(work.input_shape, info.num_channels, info.dtype.itemsize)
    num_channels = config.num_written_channels
    core = _nbytes(work.core_shape, num_channels, itemsize)
    # The peak: one block in the network, the others read, or being written if that takes more. A
    # block alone is written while its input is still there.
    most_written = min(_most_written(premise, work), max(1, in_flight - 1))
    num_written = most_written if core > source or in_flight == 1 else 0
    num_read = max(1, in_flight - num_written)
    # Memory for outputs is kept for the next block.
    num_cores = min(1 + most_written, in_flight)
    mask = prod(work.input_shape) if config.mask is not None else 0
    yield MemoryPart(
        name="input of the blocks in flight",
        cpu_nbytes=num_read * source,
        # Memory that is pinned is kept; what is read is copied there.
        host_nbytes=in_flight * _pinned(source) + source,
        device_nbytes=0,
    )
    yield _on_host("mask of the blocks in flight", num_read * mask)
    yield _on_host("padded copy of one input", source if work.is_padded else 0)
    yield MemoryPart(
        name="output of the blocks in flight",
        cpu_nbytes=num_cores * core,
        host_nbytes=num_cores * _pinned(core),
        device_nbytes=0,
    )
    encoded = num_written * _encoded_nbytes(config, work, num_channels, itemsize)
    yield replace(_on_host("output being encoded", encoded), is_certain=False)


def _blending_parts(premise: Premise, work: Work) -> Iterator[MemoryPart]:
    """Yield what is where the network runs, besides batches; none of it grows with z."""
    plan, config, info = premise.plan, premise.config, premise.info
    num_channels, itemsize = info.num_channels, info.dtype.itemsize
    raw = config.patch.batch_size * _nbytes(plan.patch_shape, num_channels, itemsize)
    # All that patches with the same start along z see.
    layer_shape = min(plan.patch_shape[0], work.input_shape[0]), *work.input_shape[1:]
    layer = _nbytes(layer_shape, num_channels, itemsize)
    slab_shape = min(plan.output_patch_shape[0], work.core_shape[0]), *work.core_shape[1:]
    slab = _nbytes(slab_shape, config.model.out_channels, FLOAT32_NBYTES)
    # On a host, sums that are written as they are lie where the output does.
    is_core = Reduction.of(config).keeps_sums(
        config.model.out_channels, np.dtype(config.output.dtype)
    )
    window = _nbytes(plan.output_patch_shape, 1, FLOAT32_NBYTES)
    num_windows = most_windows(plan.output_patch_shape, work.patches_per_block[1])
    yield _only_device(
        "raw patches, and the layers that they are cut from", raw + LAYERS_IN_FLIGHT * layer
    )
    yield MemoryPart(
        name="blending: windows, and a slab as high as a patch",
        cpu_nbytes=window + (0 if is_core else slab),
        host_nbytes=0,
        device_nbytes=num_windows * window + slab,
    )
    # Temporary values, and parts of the output on their way.
    yield _only_device("parts being finished", 4 * min(slab, FINISH_NBYTES))


def _batch_nbytes(premise: Premise) -> int:
    """Return the bytes of a batch as the network takes it, returns it, and as it is activated."""
    plan, config = premise.plan, premise.config
    num_copies = 1 if config.model.activation == "none" else 2
    if config.model.augment:
        num_copies += 1  # the sum over its turns
    per_patch = _nbytes(
        plan.patch_shape, premise.info.num_channels, FLOAT32_NBYTES
    ) + num_copies * (_nbytes(plan.patch_shape, config.model.out_channels, FLOAT32_NBYTES))
    return config.patch.batch_size * per_patch


def _chunks_nbytes(premise: Premise, work: Work, num_own: int) -> int:
    """Return the bytes of decoded chunks: of one read, and of the cache of all that are read."""
    plan, info = premise.plan, premise.info
    chunk_shape = info.chunk_shape or (1, 1, 1)
    read = triple(
        [
            min(ceil_div(extent - 1, chunk) * chunk + chunk, whole)
            for extent, chunk, whole in zip(
                work.input_shape, chunk_shape, plan.volume.shape, strict=True
            )
        ]
    )
    of_volume = _nbytes(plan.volume.shape, info.num_channels, info.dtype.itemsize)
    of_read = _nbytes(read, info.num_channels, info.dtype.itemsize)
    return of_read + min(CACHE_NBYTES, of_volume, num_own * of_read)


def _on_host(name: str, nbytes: int) -> MemoryPart:
    """Return a part that never leaves the host's memory."""
    return MemoryPart(name=name, cpu_nbytes=nbytes, host_nbytes=nbytes, device_nbytes=0)


def _on_device(name: str, nbytes: int | None) -> MemoryPart:
    """Return a part that lives where the network runs; None means unmeasured."""
    return MemoryPart(name=name, cpu_nbytes=nbytes, host_nbytes=0, device_nbytes=nbytes)


def _only_device(name: str, nbytes: int | None) -> MemoryPart:
    """Return a part that only an accelerator needs."""
    return MemoryPart(name=name, cpu_nbytes=0, host_nbytes=0, device_nbytes=nbytes)


def _pinned(nbytes: int) -> int:
    """Return the host memory that torch pins for so many bytes: a power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def _nbytes(shape: Triple, num_channels: int, itemsize: int) -> int:
    """Return the bytes of a czyx array."""
    return prod(shape) * num_channels * itemsize
