"""What the description of a network says, as values of a config, and what a config cannot say.

Values only. Knows no files, no kind of description and nothing of what the user wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_AFTERWARDS_CURE = (
    "mpichunk does not do that; write model.activation (none, sigmoid or softmax) to run without "
    "it, and do it afterwards"
)
"""What to write where a description has a step after the network that mpichunk does not do."""

NOT_FIXED_CURE = (
    "mpichunk scales by fixed numbers only; measure them once, over the whole volume, and write "
    "`input.normalize: {subtract: .., divide: .., clip: [.., ..]}`"
)
"""What to do about a step whose numbers depend on the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Something that mpichunk does not do as described; the user must say what to do instead."""

    keys: tuple[str, ...]
    """Dotted keys of the config; whoever writes one of them has said it."""

    found: str
    """What the description asks for, as a noun."""

    cure: str
    """Why that is not done, and what to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSize:
    """Sizes that the network takes along one axis: min, min + step, ..."""

    min: int
    """The smallest."""

    step: int
    """0 where there is no other."""

    def nearest(self, size: int) -> int:
        """Return the size that the network takes which is nearest."""
        if self.step == 0 or size < self.min:
            return self.min
        return self.min + round((size - self.min) / self.step) * self.step

    def __str__(self) -> str:
        return f"{self.min}" if self.step == 0 else f"{self.min} + n * {self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that is taken from a description."""

    origin: str
    """The description in words, e.g. "the bioimage.io package /nets/rdf.yaml"."""

    settings: Mapping[str, Any]
    """Plain values by dotted key; `model.path` names a file or code, no package."""

    obstacles: tuple[Obstacle, ...] = ()
    """What a config cannot say."""

    remarks: tuple[str, ...] = ()
    """What is left to the user whatever the config says, a clause each."""

    sizes: tuple[AxisSize | None, ...] = (None, None, None)
    """What the patch may measure along z, y and x; None where nothing is said."""

    notes: tuple[str, ...] = ()
    """What the user may like to know, a clause each."""
