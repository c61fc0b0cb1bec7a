"""What a run will take: patches, reads, memory of a rank, bytes and files, all before it starts.

Pure arithmetic; knows no files and no networks: what only a forward can tell is a parameter.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from mpichunk.errors import UserError
from mpichunk.geometry.box import Grid
from mpichunk.plan.advice import Advice, advise
from mpichunk.plan.memory import MemoryPart, memory_of, total_nbytes
from mpichunk.plan.plan import Plan
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import Work


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


def estimate(premise: Premise) -> Estimate:
    """Return what a run will take.

    Raises:
        UserError: the input holds something that no network reads.
    """
    plan, config, info = premise.plan, premise.config, premise.info
    if info.dtype.kind not in "buif":
        raise UserError(
            f"{info.location} holds {info.dtype.name}; a network reads integers or floats: "
            "convert it first",
            key="input.volume",
        )
    work = premise.work
    itemsize = np.dtype(config.output.dtype).itemsize
    units = Grid(origin=plan.output_domain.start, step=config.write_unit, bounds=plan.roi)
    num_files = prod(units.shape)
    return Estimate(
        work=work,
        num_whole_blocks=_num_whole(plan),
        memory=memory_of(premise, work),
        output_nbytes=plan.roi.num_voxels * config.num_written_channels * itemsize,
        num_files=num_files,
        read_nbytes=work.num_voxels_read * info.num_channels * info.dtype.itemsize,
        probe=premise.probe,
        advice=advise(plan, config, work, num_files=num_files),
    )


def _num_whole(plan: Plan) -> int:
    """Return how many blocks the ROI does not clip."""
    per_axis = []
    for axis in range(3):
        step, origin = plan.block_shape[axis], plan.output_domain.start[axis]
        first = -((origin - plan.roi.start[axis]) // step)
        per_axis.append(max(0, (plan.roi.stop[axis] - origin) // step - first))
    return prod(per_axis)
