"""The section of a config that says where and how the network runs.

Its rules stand in `config.computerules`. Knows no other section.
"""

from mpichunk.config.computerules import KERNELS
from mpichunk.config.types import Count, Device, Flag, Precision, Section


class Compute(Section):
    """Where and how the network runs."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, or another accelerator that torch knows."""

    precision: Precision = "float32"
    """In which the network computes; blending is in float32 always."""

    compile: Flag = False
    """Let torch.compile make kernels for this network and machine."""

    channels_last: Flag = False
    """Keep the channels of a voxel side by side."""

    fold_batch_norm: Flag = False
    """Multiply batch norms into the convolutions before them."""

    cuda_graphs: Flag = False
    """Record the forward of a batch once, and replay it."""

    threads: Count | None = None
    """CPU threads per rank; default: the rank's share of its cores."""

    deterministic: Flag = True
    """Choose deterministic algorithms, so that bytes are reproducible."""

    share_device: Flag = False
    """Allow several ranks on one accelerator."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Return the names of the kernel options that are switched on."""
        return tuple(name for name in KERNELS if getattr(self, name))
