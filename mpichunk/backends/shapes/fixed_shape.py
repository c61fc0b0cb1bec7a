"""Saved networks that take batches of one shape only: what does not fit a run, and the cure.

Knows no framework: a shape is five numbers, None where the network takes any.
"""

from collections.abc import Sequence
from pathlib import Path

from mpichunk.backends.engine import EngineRequest
from mpichunk.errors import ModelError
from mpichunk.words import count


def refuse_fixed_shape(
    path: Path,
    shape: Sequence[int | None],
    request: EngineRequest,
    *,
    verb: str = "was saved",
    cure: str = "save it with dynamic axes",
) -> None:
    """Refuse a network that is fixed to another shape than the run's.

    Args:
        path: the network, for the message.
        shape: (n, c, z, y, x) of its input, None where it takes any number.
        request: the run's shapes.
        verb: how it came to its shape.
        cure: what else would help.

    Raises:
        ModelError: with the key of what differs.
    """
    if len(shape) != 5:
        raise ModelError(
            f"{path} takes {count(len(shape), 'axis', 'axes')}; expected five: batch, channel, z, "
            "y, x",
            key="model.path",
        )
    num_patches, num_channels, *fixed = shape
    if num_channels is not None and num_channels != request.in_channels:
        raise ModelError(
            f"the network takes {count(num_channels, 'input channel')}, but the input has "
            f"{request.in_channels}",
            key="model.path",
        )
    wanted = request.patch_shape
    if any(n is not None and n != w for n, w in zip(fixed, wanted, strict=True)):
        sizes = [w if n is None else n for n, w in zip(fixed, wanted, strict=True)]
        raise ModelError(
            f"{path} {verb} for patches of {sizes} only, and patch.shape is {list(wanted)}; set "
            f"patch.shape: {sizes}, or {cure}",
            key="patch.shape",
        )
    if num_patches is not None and num_patches != request.batch_size:
        raise ModelError(
            f"{path} {verb} for batches of {num_patches}; set patch.batch_size: {num_patches}, or "
            f"{cure}",
            key="patch.batch_size",
        )
