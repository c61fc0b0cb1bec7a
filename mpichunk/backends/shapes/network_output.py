"""What a network returned, against what was asked for: cut, or refused with the cure.

Knows no framework: only shapes come in, and slices go out.
"""

from collections.abc import Sequence

from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.shapes.size_advice import OutputShape, shape_advice, size_advice
from mpichunk.errors import ModelError
from mpichunk.geometry.box import add, subtract, triple
from mpichunk.words import count

Cut = tuple[slice, slice, slice, slice, slice]
"""What to keep of (n, c, z, y, x)."""

_ALL = slice(None)


def find_cut(
    found: Sequence[int], batch_size: int, request: EngineRequest, output_shape: OutputShape
) -> Cut:
    """Return what is to be kept of a network's output.

    Args:
        found: shape that the network returned.
        batch_size: patches that went in.
        request: what it must return.
        output_shape: runs the network on other patch shapes, for advice.

    Raises:
        ModelError: the shape is neither the patch's nor that without `patch.crop`.
    """
    if len(found) != 5 or found[0] != batch_size:
        batch_shape = batch_size, request.in_channels, *request.patch_shape
        raise ModelError(
            f"the network returned shape {tuple(found)} for a batch of shape {batch_shape}; "
            f"expected ({batch_size}, {request.out_channels}, z, y, x)",
            key="model.path",
        )
    if found[1] != request.out_channels:
        raise ModelError(
            f"the network returned {count(found[1], 'channel')}, but model.out_channels is "
            f"{request.out_channels}; set it to {found[1]}",
            key="model.out_channels",
        )
    spatial = triple(list(found[2:]))
    if spatial == request.patch_shape:
        z, y, x = (slice(c, n - c) for n, c in zip(request.patch_shape, request.crop, strict=True))
        return _ALL, _ALL, z, y, x
    if subtract(request.patch_shape, spatial) == add(request.crop, request.crop):
        return _ALL, _ALL, _ALL, _ALL, _ALL
    cure = shape_advice(output_shape, request.patch_shape, spatial, request.crop)
    raise ModelError(
        f"the network returned {spatial} voxels for patch.shape {list(request.patch_shape)}, which "
        f"is neither that shape nor that shape less patch.crop {list(request.crop)} on each side; "
        f"{cure.words}",
        key=cure.key,
    )


def failed_forward(
    reason: str, request: EngineRequest, output_shape: OutputShape, *, where: str = ""
) -> ModelError:
    """Return the error of a network that did not run, with the sizes that it would take.

    Args:
        reason: what the framework said, in a line.
        request: what it was asked to run.
        output_shape: as for `find_cut`.
        where: file and line, if they are known.
    """
    shape = request.batch_size, request.in_channels, *request.patch_shape
    message = f"the network failed on a batch of shape {shape}"
    message += f" at {where}: {reason}" if where else f": {reason}"
    advice = size_advice(lambda shape: output_shape(shape) is not None, request.patch_shape)
    if advice:
        return ModelError(f"{message}; {advice}", key="patch.shape")
    return ModelError(message, key="model.path")
