"""What real forwards have told of a config: seconds and bytes that no arithmetic knows.

Values only; knows no files and no networks.
"""

from dataclasses import dataclass, replace

from mpichunk.geometry.box import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What `bench` has measured besides the forward: seconds per unit of work, on one rank."""

    patch_seconds: float
    """Cutting out, activating and blending one patch."""

    finish_seconds: float
    """Checking and quantising one voxel of a core."""

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

    resident_nbytes: int | None = None
    """What the rank that holds most has in its host's memory, network loaded and idle.

    Once it has run blocks, if there is a pace.
    """

    start_nbytes: int | None = None
    """The most that a rank held until its network was loaded: it may be more than blocks take."""

    more_nbytes: int = 0
    """What a rank of `bench` held at its peak beyond all that is known, on the host.

    Such as holes between what comes and goes, which the allocator cannot fill.
    """

    pace: Pace | None = None
    """What the rest of a block takes; None where only the forward was measured."""

    def for_batch(self, old_size: int, new_size: int) -> "Probe":
        """Return what it would be with another batch size, as if all grew with the batch."""
        nbytes = None if self.nbytes is None else ceil_div(self.nbytes * new_size, old_size)
        return replace(self, seconds=self.seconds * new_size / old_size, nbytes=nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """How much memory the largest rank of a run took."""

    nbytes: int
    """Of its host."""

    device_nbytes: int | None = None
    """Of its accelerator; None on a CPU, or if nobody says."""


def better_probe(earlier: Probe | None, latest: Probe | None) -> Probe | None:
    """Return what tells more: the latest, unless only the earlier one of its device has a pace."""
    if latest is None or earlier is None:
        return earlier if latest is None else latest
    is_less = latest.pace is None and earlier.pace is not None
    return earlier if is_less and earlier.device == latest.device else latest
