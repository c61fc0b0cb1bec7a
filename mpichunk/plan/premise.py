"""What every estimate starts from: a plan, who shares its blocks, and what is known of its network.

A value only; knows no files and no networks.
"""

from dataclasses import dataclass, replace

from mpichunk.config.schema import Config
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.plan import Plan
from mpichunk.plan.probe import Probe
from mpichunk.plan.work import Work, work_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Premise:
    """What is to be run, and all that was measured of it before."""

    plan: Plan
    """The plan of `config` over the volume of `info`."""

    config: Config
    """The effective config."""

    info: VolumeInfo
    """The input."""

    num_ranks: int = 1
    """Ranks that share the blocks; with few blocks each holds fewer at a time."""

    num_blocks: int | None = None
    """Blocks still to do; None: all."""

    model_nbytes: int | None = None
    """Bytes of the model's files, which is about what its weights take."""

    probe: Probe | None = None
    """What a forward of this config told; None: what it needs is not known, and left out."""

    @property
    def work(self) -> Work:
        """What the plan computes and reads."""
        return work_of(self.plan, self.info.chunk_shape)

    def for_batch(self, batch_size: int) -> "Premise":
        """Return what it would be with another batch."""
        old = self.config.patch.batch_size
        patch = self.config.patch.model_copy(update={"batch_size": batch_size})
        return replace(
            self,
            config=self.config.model_copy(update={"patch": patch}),
            probe=None if self.probe is None else self.probe.for_batch(old, batch_size),
        )
