"""What a run will take: patches, reads, memory of a rank, bytes and files, all before it starts.

Pure arithmetic; knows no files and no networks: what only a forward can tell is a parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from mpichunk.backends.engine import FINISH_NBYTES
from mpichunk.backends.reduction import Reduction
from mpichunk.config.schema import Config
from mpichunk.errors import UserError
from mpichunk.geometry.box import Grid, Triple, ceil_div, triple
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.advice import Advice, advise
from mpichunk.plan.plan import Plan
from mpichunk.plan.work import Work, work_of

Memory = Literal["cpu", "host", "device"]
"""That of a run on a CPU; of one on an accelerator, the host's, and the device's own."""

MIB = 1 << 20
FLOAT32_NBYTES = 4

BLOCKS_IN_FLIGHT = 3
"""Blocks that a rank holds: one in the network, the others being read or written."""

LAYERS_IN_FLIGHT = 2
"""Layers of a block's input that are on an accelerator: one in use, the next on its way."""

CACHE_NBYTES = 64 * MIB
"""Decoded chunks of the input that the storage library keeps at most."""

PROGRAM_NBYTES = 95 * MIB
"""Resident memory of a rank before its first block, without torch (measured: 94 MiB)."""

TORCH_NBYTES = 195 * MIB
"""What torch and a first forward on a CPU add to it (measured: 194 MiB)."""

ENGINE_NBYTES = {"pytorch": TORCH_NBYTES, "onnxruntime": 32 * MIB, "openvino": 59 * MIB, "pznet": 0}
"""What each backend's library and a first forward on a CPU add (measured); pznet has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What `bench` has measured besides the forward: seconds per unit of work, on one rank."""

    patch_seconds: float
    """Cutting out, activating and blending one patch."""

    finish_seconds: float
    """Dividing, checking and quantising one voxel of a core."""

    read_seconds: float
    """Reading and decoding one voxel of a whole storage chunk of the input."""

    write_seconds: float
    """Encoding and durably writing one voxel of a core."""

    scale: float
    """What the whole takes, over what these seconds and the forward's add up to."""

    num_ranks: int
    """Ranks that were measured at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one real forward of this config has told."""

    seconds: float
    """Wall seconds of one batch."""

    nbytes: int | None
    """Memory of the forward beyond its input, output and weights; None where it is not measured."""

    device: str
    """Where it ran, in words."""

    free_nbytes: int | None = None
    """What one rank could have of the accelerator's memory; None on a CPU, or if nobody says."""

    pace: Pace | None = None
    """What the rest of a block takes; None where only the forward was measured."""

    def for_batch(self, old_size: int, new_size: int) -> "Probe":
        """Return what it would be with another batch size, as if all grew with the batch."""
        nbytes = None if self.nbytes is None else ceil_div(self.nbytes * new_size, old_size)
        return replace(self, seconds=self.seconds * new_size / old_size, nbytes=nbytes)


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


def total_nbytes(parts: Iterable[MemoryPart], memory: Memory) -> int:
    """Return the known bytes of all parts in one memory."""
    return sum(getattr(part, f"{memory}_nbytes") or 0 for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Everything that `plan` tells about a run."""

    work: Work
    """Blocks, patches and voxels read."""

    num_whole_blocks: int
    """Blocks that the ROI does not clip."""

    memory: tuple[MemoryPart, ...]
    """Peak memory of one rank by part."""

    output_nbytes: int
    """Bytes to be written, before compression."""

    num_files: int
    """Chunks to be written, or shards where there are shards."""

    read_nbytes: int
    """Bytes to be read, uncompressed, without what whole storage chunks add."""

    probe: Probe | None
    """What the last forward told, if there was one."""

    advice: tuple[Advice, ...]
    """What could be better."""

    @property
    def cpu_nbytes(self) -> int:
        """Known peak memory of a rank that runs on a CPU."""
        return total_nbytes(self.memory, "cpu")

    @property
    def host_nbytes(self) -> int:
        """Known peak host memory of a rank that runs on an accelerator."""
        return total_nbytes(self.memory, "host")

    @property
    def device_nbytes(self) -> int:
        """Known peak accelerator memory of a rank that runs on one."""
        return total_nbytes(self.memory, "device")


def estimate(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    *,
    model_nbytes: int | None = None,
    probe: Probe | None = None,
) -> Estimate:
    """Return what a run of `plan` will take.

    Args:
        plan: the plan of `config` over the volume of `info`.
        config: the effective config.
        info: the input.
        model_nbytes: bytes of the model's files, which is about what its weights take.
        probe: what a forward of this config told.

    Raises:
        UserError: the input holds something that no network reads.
    """
    if info.dtype.kind not in "buif":
        raise UserError(
            f"{info.location} holds {info.dtype.name}; a network reads integers or floats: "
            "convert it first",
            key="input.volume",
        )
    work = work_of(plan, info.chunk_shape)
    itemsize = np.dtype(config.output.dtype).itemsize
    units = Grid(origin=plan.output_domain.start, step=config.write_unit, bounds=plan.roi)
    num_files = prod(units.shape)
    return Estimate(
        work=work,
        num_whole_blocks=_num_whole(plan),
        memory=_memory(plan, config, info, work, model_nbytes, probe),
        output_nbytes=plan.roi.num_voxels * config.num_written_channels * itemsize,
        num_files=num_files,
        read_nbytes=work.num_voxels_read * info.num_channels * info.dtype.itemsize,
        probe=probe,
        advice=advise(plan, config, work, num_files=num_files),
    )


def memory_of(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    work: Work,
    *,
    model_nbytes: int | None = None,
    probe: Probe | None = None,
) -> tuple[MemoryPart, ...]:
    """Return the peak memory of one rank by part, as `estimate` does, and nothing else."""
    return _memory(plan, config, info, work, model_nbytes, probe)


def _num_whole(plan: Plan) -> int:
    """Return how many blocks the ROI does not clip."""
    per_axis = []
    for axis in range(3):
        step, origin = plan.block_shape[axis], plan.output_domain.start[axis]
        first = -((origin - plan.roi.start[axis]) // step)
        per_axis.append(max(0, (plan.roi.stop[axis] - origin) // step - first))
    return prod(per_axis)


def _memory(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    work: Work,
    model_nbytes: int | None,
    probe: Probe | None,
) -> tuple[MemoryPart, ...]:
    """Return the peak memory of one rank, part by part, for the largest block of the plan."""
    dtype = np.dtype(config.output.dtype)
    channels, reduction = config.model.out_channels, Reduction.of(config)
    source = _nbytes(work.input_shape, info.num_channels, info.dtype.itemsize)
    core = _nbytes(work.core_shape, reduction.num_channels, dtype.itemsize)
    # The peak: one block in the network, the others all read, or all being written. What is being
    # written is there twice, once as the storage library encodes it.
    waiting = BLOCKS_IN_FLIGHT - 1
    num_written = waiting if core > source else 0
    num_read = BLOCKS_IN_FLIGHT - num_written
    mask = prod(work.input_shape) if config.mask is not None else 0
    raw = config.patch.batch_size * _nbytes(
        plan.patch_shape, info.num_channels, info.dtype.itemsize
    )
    # All that patches with the same start along z see.
    layer_shape = min(plan.patch_shape[0], work.input_shape[0]), *work.input_shape[1:]
    layer = _nbytes(layer_shape, info.num_channels, info.dtype.itemsize)
    slab_shape = min(plan.output_patch_shape[0], work.core_shape[0]), *work.core_shape[1:]
    slab = _nbytes(slab_shape, channels, FLOAT32_NBYTES)
    window = _nbytes(plan.output_patch_shape, 1, FLOAT32_NBYTES)
    parts = [
        MemoryPart(
            name="input of the blocks in flight",
            cpu_nbytes=num_read * source,
            # Memory that is pinned is kept; what is read is copied there.
            host_nbytes=BLOCKS_IN_FLIGHT * _pinned(source) + source,
            device_nbytes=0,
        ),
        _on_host("mask of the blocks in flight", num_read * mask),
        _on_host("padded copy of one input", source if work.is_padded else 0),
        MemoryPart(
            name="raw patches, and the layers that they are cut from",
            cpu_nbytes=0,
            host_nbytes=0,
            device_nbytes=raw + LAYERS_IN_FLIGHT * layer,
        ),
        _on_device("batch into and out of the network", _batch_nbytes(plan, config, info)),
        _on_device("blending: window, and a slab as high as a patch", slab + window),
        MemoryPart(
            name="parts being finished",
            cpu_nbytes=0,
            host_nbytes=0,
            # Weights and temporary values, and parts of the output on their way.
            device_nbytes=4 * min(slab, FINISH_NBYTES),
        ),
        MemoryPart(
            name="output of the blocks in flight",
            cpu_nbytes=BLOCKS_IN_FLIGHT * core,
            host_nbytes=BLOCKS_IN_FLIGHT * _pinned(core),
            device_nbytes=0,
        ),
        _on_host("output being encoded", num_written * core),
        _on_host("chunks of the input", _chunks_nbytes(plan, info, work)),
        _on_host("Python, MPI and storage libraries", PROGRAM_NBYTES),
    ]
    if config.model.backend != "identity":
        forward = probe.nbytes if probe is not None else None
        parts += [
            _on_host(
                "torch" if config.model.backend == "pytorch" else config.model.backend,
                ENGINE_NBYTES[config.model.backend],
            ),
            _on_device("weights", model_nbytes),
            _on_device("inside the network", forward),
        ]
    return tuple(
        part
        for part in parts
        if (part.cpu_nbytes, part.host_nbytes, part.device_nbytes) != (0, 0, 0)
    )


def _batch_nbytes(plan: Plan, config: Config, info: VolumeInfo) -> int:
    """Return the bytes of a batch as the network takes it, returns it, and as it is activated."""
    num_copies = 1 if config.model.activation == "none" else 2
    if config.model.augment:
        num_copies += 1  # the sum over its turns
    per_patch = _nbytes(plan.patch_shape, info.num_channels, FLOAT32_NBYTES) + num_copies * (
        _nbytes(plan.patch_shape, config.model.out_channels, FLOAT32_NBYTES)
    )
    return config.patch.batch_size * per_patch


def _chunks_nbytes(plan: Plan, info: VolumeInfo, work: Work) -> int:
    """Return the bytes of decoded chunks: of one read, and of the cache.

    The cache counts twice, since the memory allocator keeps about as much as goes through it
    (measured with glibc).
    """
    chunk_shape = info.chunk_shape or (1, 1, 1)
    read = triple(
        [
            min(ceil_div(extent - 1, chunk) * chunk + chunk, whole)
            for extent, chunk, whole in zip(
                work.input_shape, chunk_shape, plan.volume.shape, strict=True
            )
        ]
    )
    volume = _nbytes(plan.volume.shape, info.num_channels, info.dtype.itemsize)
    return _nbytes(read, info.num_channels, info.dtype.itemsize) + 2 * min(CACHE_NBYTES, volume)


def _on_host(name: str, nbytes: int) -> MemoryPart:
    """Return a part that never leaves the host's memory."""
    return MemoryPart(name=name, cpu_nbytes=nbytes, host_nbytes=nbytes, device_nbytes=0)


def _on_device(name: str, nbytes: int | None) -> MemoryPart:
    """Return a part that lives where the network runs; None means unmeasured."""
    return MemoryPart(name=name, cpu_nbytes=nbytes, host_nbytes=0, device_nbytes=nbytes)


def _pinned(nbytes: int) -> int:
    """Return the host memory that torch pins for so many bytes: a power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def _nbytes(shape: Triple, num_channels: int, itemsize: int) -> int:
    """Return the bytes of a czyx array."""
    return prod(shape) * num_channels * itemsize
