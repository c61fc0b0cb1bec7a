"""The array operations of blending in numpy, on the host.

Large results go into buffers that are kept, and scratch is one (y, x) plane, so that what is
touched stays in the cache. Knows no geometry beyond the slices it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.config.scaling import Scaling
from mpichunk.geometry.box import Slices, Triple
from mpichunk.geometry.symmetry import STRAIGHT, Move, PatchTurn
from mpichunk.processmemory import own_pages

Array = npt.NDArray[np.float32]
Window = tuple[Array, Array]
"""(z,) weights, and the (y, x) plane of the product of the other two vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Raw patches of one batch, where they lie in the source."""

    patches_czyx: Sequence[npt.NDArray[Any]]
    """Those that there are."""

    batch_shape: tuple[int, ...]
    """(n, c, z, y, x) of the whole batch."""


class NumpyArrays:
    """Arrays are numpy arrays."""

    finish_nbytes = 1 << 20
    """About one core's second-level cache."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def upload(self, host_czyx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the array itself."""
        return host_czyx

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return zeros; see `Arrays.zeros`. Fresh pages cost more than clearing old ones."""
        total = self._buffer("total", shape)
        total.fill(0)
        return total

    def feed(self, source_czyx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the source itself."""
        return source_czyx

    def stage(
        self,
        feed: npt.NDArray[Any],
        where: Sequence[Slices],
        *,
        patch_shape: Triple,
        batch_size: int,
    ) -> Staged:
        """Return views of the source; see `Arrays.stage`."""
        return Staged(
            patches_czyx=[feed[(slice(None), *slices)] for slices in where],
            batch_shape=(batch_size, feed.shape[0], *patch_shape),
        )

    def gather(self, staged: Staged, *, scaling: Scaling, turn: PatchTurn = STRAIGHT) -> Array:
        """Scale and pad; see `Arrays.gather`."""
        batch_nczyx = self._buffer("batch", staged.batch_shape)
        # What float32 cannot hold becomes inf, which is found in the result.
        with np.errstate(over="ignore", invalid="ignore"):
            for patch_czyx, raw_czyx in zip(batch_nczyx, staged.patches_czyx, strict=False):
                seen = np.flip(raw_czyx, turn.flipped)
                seen = seen.swapaxes(-2, -1) if turn.swaps_yx else seen
                np.copyto(patch_czyx, seen, casting="unsafe")
                scale(patch_czyx, scaling)
        batch_nczyx[len(staged.patches_czyx) :] = 0
        return batch_nczyx

    def activate(self, batch_nczyx: Array, activation: str) -> Array:
        """Return the batch through the activation; see `Arrays.activate`."""
        if activation == "none":
            return batch_nczyx
        out = self._buffer("activated", batch_nczyx.shape)
        # exp may overflow to inf, of which the reciprocal is the right 0.
        with np.errstate(over="ignore", invalid="ignore"):
            if activation == "sigmoid":
                np.negative(batch_nczyx, out=out)
                np.exp(out, out=out)
                np.add(out, 1, out=out)
                np.reciprocal(out, out=out)
            else:
                np.subtract(batch_nczyx, batch_nczyx.max(axis=1, keepdims=True), out=out)
                np.exp(out, out=out)
                np.divide(out, out.sum(axis=1, keepdims=True), out=out)
        return out

    def sums(self, shape: tuple[int, ...]) -> Array:
        """Return zeros; see `Arrays.sums`."""
        sums = self._buffer("sums", shape)
        sums.fill(0)
        return sums

    def add_turned(
        self, sum_nczyx: Array, batch_nczyx: Array, turn: PatchTurn, moves: Sequence[Move]
    ) -> None:
        """Add through a view that is turned back; see `Arrays.add_turned`."""
        back = batch_nczyx.swapaxes(-2, -1) if turn.swaps_yx else batch_nczyx
        back = np.flip(back, turn.flipped)
        for move in moves:
            total = sum_nczyx[(slice(None), move.target, *move.where)]
            np.add(total, back[(slice(None), move.source, *move.part)], out=total)

    def multiply(self, array: Array, factor: float) -> None:
        """Multiply in place."""
        np.multiply(array, np.float32(factor), out=array)

    def vector(self, host: Array) -> Array:
        """Return the vector itself."""
        return host

    def window(self, z: Array, y: Array, x: Array, used: Window | None = None) -> Window:
        """Return (z,) and the (y, x) plane: a product per slice costs less than reading volumes."""
        return z, np.multiply.outer(y, x, out=None if used is None else used[1])

    def add_weighted(
        self, total_czyx: Array, where: Slices, patch_czyx: Array, part: Slices, window: Window
    ) -> None:
        """Add one slice after the other; see `Arrays.add_weighted`."""
        total = total_czyx[(slice(None), *where)]
        patch = patch_czyx[(slice(None), *part)]
        weight_z, weight_yx = window[0][part[0]], window[1][part[1:]]
        weight = self._buffer("weight", weight_yx.shape)
        product = self._buffer("product", weight_yx.shape)
        for z, scale in enumerate(weight_z):
            np.multiply(weight_yx, scale, out=weight)
            for total_yx, patch_yx in zip(total[:, z], patch[:, z], strict=True):
                np.multiply(patch_yx, weight, out=product)
                np.add(total_yx, product, out=total_yx)

    def apply_mask(self, total_czyx: Array, mask_zyx: npt.NDArray[np.bool_]) -> None:
        """Overwrite, since zero times NaN would stay NaN."""
        np.copyto(total_czyx, np.float32(0), where=~mask_zyx)

    def is_finite(self, array: Array) -> bool:
        """Return whether both extremes are finite: NaN wins a maximum, and no array is made."""
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(array.max()) and np.isfinite(array.min()))

    def gate(self, total_czyx: Array, channel: int, below: float, gated: Sequence[int]) -> None:
        """Overwrite where the gate is shut; see `Arrays.gate`."""
        is_shut = total_czyx[channel] >= np.float32(below)
        for other in gated:
            np.copyto(total_czyx[other], np.float32(0), where=is_shut)

    def best_channel(
        self,
        total_czyx: Array,
        channels: Sequence[int],
        out_zyx: npt.NDArray[Any],
        *,
        is_vote: bool,
    ) -> None:
        """Compare one channel after the other; see `Arrays.best_channel`."""
        first, *others = channels
        best = self._buffer("best", out_zyx.shape)
        np.copyto(best, total_czyx[first])
        is_zero = best == 0
        out_zyx.fill(int(is_vote))
        for number, channel in enumerate(others, start=1 + int(is_vote)):
            candidate = total_czyx[channel]
            np.copyto(out_zyx, number, where=candidate > best, casting="unsafe")
            np.maximum(best, candidate, out=best)
            is_zero &= candidate == 0
        if is_vote:
            out_zyx[is_zero] = 0

    def above(self, total_czyx: Array, threshold: float, out_czyx: npt.NDArray[Any]) -> None:
        """Compare; see `Arrays.above`."""
        np.copyto(out_czyx, total_czyx > np.float32(threshold), casting="unsafe")

    def quantise(self, total_czyx: Array, out_czyx: npt.NDArray[Any]) -> None:
        """Convert to the dtype of `out_czyx`; see `Arrays.quantise`."""
        if np.issubdtype(out_czyx.dtype, np.integer):
            np.clip(total_czyx, 0, 1, out=total_czyx)
            np.multiply(total_czyx, np.float32(np.iinfo(out_czyx.dtype).max), out=total_czyx)
            np.rint(total_czyx, out=total_czyx)
        with np.errstate(over="ignore"):
            np.copyto(out_czyx, total_czyx, casting="unsafe")

    def clear(self, array: Array) -> None:
        """Set to zero."""
        array.fill(0)

    def download(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the array itself, C contiguous."""
        return np.ascontiguousarray(array)

    @property
    def is_host(self) -> bool:
        """Yes."""
        return True

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return new memory."""
        return own_pages(nbytes)

    def outgoing(self, host_czyx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the part itself."""
        return host_czyx

    def send(self, array: npt.NDArray[Any], host_czyx: npt.NDArray[Any]) -> None:
        """Do nothing: it is there."""

    def settle(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        """Return what returns the flags."""
        return lambda: list(flags)

    def wait(self) -> None:
        """Do nothing: numpy has always done all."""

    def peak_nbytes(self, call: Callable[[], None]) -> int | None:
        """Return None: it is the host's memory."""
        return None

    def most_nbytes(self) -> int | None:
        """Return None: it is the host's memory."""
        return None

    def device_nbytes(self) -> tuple[int, int] | None:
        """Return None: it is the host's memory."""
        return None

    def release(self) -> None:
        """Forget the buffers."""
        self._buffers.clear()

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return float32 memory that is kept for the next call of the same name."""
        num_values = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < num_values:
            buffer = self._buffers[name] = np.empty(num_values, dtype=np.float32)
        return buffer[:num_values].reshape(shape)


def scale(patch_czyx: Array, scaling: Scaling) -> None:
    """Clip, subtract and divide float32 in place."""
    if scaling.clip is not None:
        np.clip(patch_czyx, *scaling.clip, out=patch_czyx)
    if scaling.subtract != 0:
        np.subtract(patch_czyx, np.float32(scaling.subtract), out=patch_czyx)
    if scaling.divide != 1:
        np.divide(patch_czyx, np.float32(scaling.divide), out=patch_czyx)
