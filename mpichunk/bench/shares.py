"""Where the time of a run goes: forwards, blending, input and output, and the host's own work.

Pure arithmetic on seconds. Knows no ranks, no config and no words.

    whole     network | blending | waiting | host
    waiting   no more than reading and writing can have held blocks up
    host      all the rest: what is done between calls of the device, or others on these cores
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mpichunk.block.pipeline import NUM_IO_THREADS
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT

_BLENDING_STAGES = ("gather", "accumulate", "finalise")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """What one block took on average, within a run of some."""

    whole: float
    """From block to block."""

    read: float
    """Read, in a thread beside the computing."""

    write: float
    """Written, in a thread beside the computing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of a rank's time; together they are all of it, but for noise."""

    network: float
    blending: float
    waiting: float
    host: float


def shares_of(
    seconds: BlockSeconds,
    stages: Mapping[str, float],
    *,
    efficiency: float,
    num_blocks: int,
    is_on_cpu: bool,
) -> Shares:
    """Return where the time has gone.

    Args:
        seconds: of a block, as in a run.
        stages: seconds of a block that was taken apart, none beside another.
        efficiency: bare forwards over the whole.
        num_blocks: blocks that were run one behind the other.
        is_on_cpu: whether reading and writing take cores from the forward.
    """
    blending = _blending_share(stages, efficiency)
    rest = max(0.0, 1 - efficiency - blending)
    held_up = _held_up(seconds, (efficiency + blending) * seconds.whole, num_blocks)
    if is_on_cpu:
        held_up = max(held_up, stages["read"] + stages["write"])
    waiting = min(rest, held_up / seconds.whole) if seconds.whole else 0.0
    return Shares(network=efficiency, blending=blending, waiting=waiting, host=rest - waiting)


def _held_up(seconds: BlockSeconds, compute: float, num_blocks: int) -> float:
    """Return for how long a block may have waited for input and output, beside its computing.

    So many threads read, as many write, and so many blocks are in the pipeline; the first read and
    the last write hide behind nothing.
    """
    step = max(
        seconds.read / NUM_IO_THREADS,
        seconds.write / NUM_IO_THREADS,
        (seconds.read + compute + seconds.write) / BLOCKS_IN_FLIGHT,
    )
    return max(0.0, step - compute) + (seconds.read + seconds.write) / num_blocks


def _blending_share(stages: Mapping[str, float], efficiency: float) -> float:
    """Return the share of time for blending: as it is to the forward in the block taken apart."""
    blending = sum(stages[name] for name in _BLENDING_STAGES)
    if stages["forward"] > 0 and efficiency > 0:
        return max(0.0, min(1 - efficiency, efficiency * blending / stages["forward"]))
    everything = sum(stages.values())
    return blending / everything if everything else 0.0
