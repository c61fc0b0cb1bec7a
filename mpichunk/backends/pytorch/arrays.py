"""The array operations of blending in torch, on a CPU or an accelerator.

Every operation writes into memory that is there already, and none waits for the device but
`download`, and `stage` where many batches wait. Knows no geometry beyond the slices it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpichunk.backends.pytorch.transfer import Transfer, make_transfer
from mpichunk.config.scaling import Scaling
from mpichunk.geometry.box import Slices, Triple
from mpichunk.geometry.buffers import FINISH_NBYTES
from mpichunk.geometry.symmetry import STRAIGHT, Move, PatchTurn
from mpichunk.processmemory import own_pages

_DIVIDED_AS_FLOAT32 = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32}
"""What torch converts to float32 before it divides by one, rounding as a copy does.

It divides float16 and float64 as such, and knows little of other integers.
"""


@dataclass(slots=True)
class Feed:
    """The raw source of one block, and what of it is on the device."""

    source_czyx: Tensor
    """On the host."""

    start: int | None = None
    """First row along z of what was brought last."""

    layer_czyx: Tensor | None = None
    """What was brought last: all that patches with this start see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Raw patches of one batch, on the device, where the computing looks for them."""

    patches_nczyx: Sequence[Tensor] | Tensor
    """Those that there are: views of the source, or of a layer of it that is on an accelerator.

    Side by side where they are of several layers.
    """

    batch_shape: tuple[int, ...]
    """(n, c, z, y, x) of the whole batch."""


class TorchArrays:
    """Arrays are tensors on one device, none of which asks for gradients.

    Args:
        device: The device.
        transfer: Copies beside the computing; default: those that the device knows.
    """

    def __init__(self, device: torch.device, transfer: Transfer | None = None) -> None:
        self._device = device
        self._transfer = transfer or make_transfer(device)
        self._buffers: dict[str, Tensor] = {}
        self._shaped: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        # Divisors on the device: by a host number, CUDA kernels multiply by the reciprocal
        # instead, which rounds differently.
        self._divisors: dict[float, Tensor] = {}
        self.kept_nbytes: Callable[[], int] = lambda: 0
        """What calls need and find there: no call that is weighed shows it."""

    @property
    def finish_nbytes(self) -> int:
        """A core's second-level cache, or a small share of an accelerator's memory."""
        return 1 << 20 if self._device.type == "cpu" else FINISH_NBYTES

    def upload(self, host_czyx: npt.NDArray[Any]) -> Tensor:
        """Return a tensor of the same dtype; on the CPU it shares the array's memory."""
        return _as_tensor(host_czyx).to(self._device)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros; see `Arrays.zeros`. Fresh pages cost more than clearing old ones."""
        return self._buffer("total", shape).zero_()

    def feed(self, source_czyx: npt.NDArray[Any]) -> Feed:
        """Return the source of a block; see `Arrays.feed`."""
        return Feed(_as_tensor(source_czyx))

    def stage(
        self,
        feed: Feed,
        where: Sequence[Slices],
        *,
        patch_shape: Triple,
        batch_size: int,
    ) -> Staged:
        """Cut patches out, on an accelerator of one layer after the other; see `Arrays.stage`.

        A whole source would take memory that grows with the length of a block.
        """
        source = feed.source_czyx
        batch_shape = batch_size, source.shape[0], *patch_shape
        if self._transfer is None:
            views = [source[(slice(None), *slices)] for slices in where]
            return Staged(patches_nczyx=views, batch_shape=batch_shape)
        self._transfer.pace()
        if len({z.start for z, _, _ in where}) == 1:
            views = [self._layer(feed, z)[:, :, y, x] for z, y, x in where]
            return Staged(patches_nczyx=views, batch_shape=batch_shape)
        # A layer holds only until the next but one is brought.
        raw_nczyx = self._buffer("raw", batch_shape, source.dtype)[: len(where)]
        for patch_czyx, (z, y, x) in zip(raw_nczyx, where, strict=True):
            patch_czyx.copy_(self._layer(feed, z)[:, :, y, x])
        return Staged(patches_nczyx=raw_nczyx, batch_shape=batch_shape)

    def _layer(self, feed: Feed, z: slice) -> Tensor:
        """Return the layer of a source on an accelerator, which is brought there if need be."""
        assert self._transfer is not None
        if feed.layer_czyx is None or feed.start != z.start:
            feed.start, feed.layer_czyx = z.start, self._transfer.bring(feed.source_czyx[:, z])
        return feed.layer_czyx

    def gather(self, staged: Staged, *, scaling: Scaling, turn: PatchTurn = STRAIGHT) -> Tensor:
        """Scale and pad; see `Arrays.gather`."""
        batch_nczyx, raw_nczyx = self._buffer("batch", staged.batch_shape), staged.patches_nczyx
        size, num_patches = staged.batch_shape[0], len(raw_nczyx)
        # On a CPU one by one, so that a patch stays in the cache.
        step = num_patches if self._transfer is not None else 1
        for start in range(0, num_patches, step):
            part = slice(start, start + step)
            self._fill(batch_nczyx[part], raw_nczyx[part], scaling, turn)
        if num_patches < size:
            batch_nczyx[num_patches:] = 0
        return batch_nczyx

    def _fill(
        self, patches: Tensor, raws: Sequence[Tensor] | Tensor, scaling: Scaling, turn: PatchTurn
    ) -> None:
        """Scale and turn some patches of a batch."""
        if self._is_quotient(raws[0].dtype, scaling):
            for patch_czyx, raw_czyx in zip(patches, raws, strict=True):
                torch.div(raw_czyx, self._divisor(scaling.divide), out=patch_czyx)
        else:
            for patch_czyx, raw_czyx in zip(patches, raws, strict=True):
                patch_czyx.copy_(raw_czyx)
            self._scale(patches, scaling)
        if turn != STRAIGHT:
            # torch flips no raw type that it hardly knows, such as uint16, and only by a copy.
            turned = patches.flip(turn.flipped)
            patches.copy_(turned.transpose(-2, -1) if turn.swaps_yx else turned)

    def _is_quotient(self, dtype: torch.dtype, scaling: Scaling) -> bool:
        """Return whether raw values become float32 by one kernel of an accelerator, a division."""
        is_plain = scaling.clip is None and scaling.subtract == 0
        return is_plain and self._transfer is not None and dtype in _DIVIDED_AS_FLOAT32

    def _scale(self, patches: Tensor, scaling: Scaling) -> None:
        """Clip, subtract and divide in place."""
        if scaling.clip is not None:
            patches.clamp_(*scaling.clip)
        if scaling.subtract != 0:
            patches.sub_(scaling.subtract)
        if scaling.divide != 1:
            patches.div_(self._divisor(scaling.divide))

    def activate(self, batch_nczyx: Tensor, activation: str) -> Tensor:
        """Return the batch through the activation; see `Arrays.activate`."""
        if activation == "none":
            return batch_nczyx
        out = self._buffer("activated", batch_nczyx.shape)
        if activation == "sigmoid":
            return torch.sigmoid(batch_nczyx, out=out)
        return torch.softmax(batch_nczyx, 1, out=out)

    def sums(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros; see `Arrays.sums`."""
        return self._buffer("sums", shape).zero_()

    def add_turned(
        self, sum_nczyx: Tensor, batch_nczyx: Tensor, turn: PatchTurn, moves: Sequence[Move]
    ) -> None:
        """Flip one patch's channels at a time, by a copy; see `Arrays.add_turned`."""
        for sum_czyx, patch_czyx in zip(sum_nczyx, batch_nczyx, strict=True):
            for move in moves:
                back = patch_czyx[move.source]
                back = back.transpose(-2, -1) if turn.swaps_yx else back
                back = back.flip(turn.flipped) if turn.flipped else back
                sum_czyx[(move.target, *move.where)].add_(back[(slice(None), *move.part)])

    def multiply(self, array: Tensor, factor: float) -> None:
        """Multiply in place."""
        array.mul_(factor)

    def vector(self, host: npt.NDArray[np.float32]) -> Tensor:
        """Return a copy on the device; see `Arrays.vector`."""
        return self._to_device(host)

    def window(self, z: Tensor, y: Tensor, x: Tensor, used: Tensor | None = None) -> Tensor:
        """Return the whole (z, y, x) product: with it, adding is one kernel per patch."""
        return torch.mul(z[:, None, None], y[:, None] * x, out=used)

    def add_weighted(
        self, total_czyx: Tensor, where: Slices, patch_czyx: Tensor, part: Slices, window: Tensor
    ) -> None:
        """Multiply and add in one pass, without a temporary; see `Arrays.add_weighted`."""
        total_czyx[(slice(None), *where)].addcmul_(patch_czyx[(slice(None), *part)], window[part])

    def apply_mask(self, total_czyx: Tensor, mask_zyx: npt.NDArray[np.bool_]) -> None:
        """Overwrite, since zero times NaN would stay NaN."""
        total_czyx.masked_fill_(self._to_device(~mask_zyx), 0)

    def is_finite(self, array: Tensor) -> Tensor:
        """Return whether both extremes are finite: NaN wins both, and no tensor is made."""
        low, high = torch.aminmax(array)
        return torch.isfinite(low) & torch.isfinite(high)

    def gate(self, total_czyx: Tensor, channel: int, below: float, gated: Sequence[int]) -> None:
        """Overwrite where the gate is shut; see `Arrays.gate`."""
        is_shut = total_czyx[channel] >= _float32(below)
        for other in gated:
            total_czyx[other].masked_fill_(is_shut, 0)

    def best_channel(
        self, total_czyx: Tensor, channels: Sequence[int], out_zyx: Tensor, *, is_vote: bool
    ) -> None:
        """Compare one channel after the other; see `Arrays.best_channel`."""
        first, *others = channels
        best = self._buffer("best", out_zyx.shape)
        best.copy_(total_czyx[first])
        label = torch.full_like(best, int(is_vote))
        is_zero = best == 0
        for number, channel in enumerate(others, start=1 + int(is_vote)):
            candidate = total_czyx[channel]
            label.masked_fill_(candidate > best, number)
            torch.maximum(best, candidate, out=best)
            is_zero &= candidate == 0
        if is_vote:
            label.masked_fill_(is_zero, 0)
        # Through float32: torch fills and copies no uint16 by mask, but converts to it.
        out_zyx.copy_(label)

    def above(self, total_czyx: Tensor, threshold: float, out_czyx: Tensor) -> None:
        """Compare; see `Arrays.above`."""
        out_czyx.copy_(total_czyx > _float32(threshold))

    def quantise(self, total_czyx: Tensor, out_czyx: Tensor) -> None:
        """Convert to the dtype of `out_czyx`; see `Arrays.quantise`."""
        if not out_czyx.dtype.is_floating_point:
            # torch.round rounds half to even.
            total_czyx.clamp_(0, 1).mul_(torch.iinfo(out_czyx.dtype).max).round_()
        out_czyx.copy_(total_czyx)

    def clear(self, array: Tensor) -> None:
        """Set to zero."""
        array.zero_()

    def download(self, array: Tensor) -> npt.NDArray[Any]:
        """Return the tensor as an array; from the CPU it shares the tensor's memory."""
        host: npt.NDArray[Any] = array.contiguous().cpu().numpy()
        return host

    @property
    def is_host(self) -> bool:
        """Whether this is the CPU."""
        return self._device.type == "cpu" and self._transfer is None

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return pinned memory for an accelerator; see `Arrays.host_bytes`."""
        if self._transfer is None:
            return own_pages(nbytes)
        host: npt.NDArray[np.uint8] = self._transfer.host_bytes(nbytes).numpy()
        return host

    def outgoing(self, host_czyx: npt.NDArray[Any]) -> Tensor:
        """Return memory of the device, or on the CPU the part itself; see `Arrays.outgoing`."""
        host = torch.from_numpy(host_czyx)
        if self._transfer is not None:
            return self._transfer.outgoing(host.shape, host.dtype)
        return host if self._device.type == "cpu" else torch.empty_like(host, device=self._device)

    def send(self, array: Tensor, host_czyx: npt.NDArray[Any]) -> None:
        """Begin to copy to the host, or on the CPU do nothing; see `Arrays.send`."""
        host = torch.from_numpy(host_czyx)
        if self._transfer is not None:
            self._transfer.send(array, host)
        elif self._device.type != "cpu":
            host.copy_(array)

    def settle(self, flags: Sequence[Tensor]) -> Callable[[], list[bool]]:
        """Begin to bring flags to the host; see `Arrays.settle`."""
        if self._transfer is not None:
            return self._transfer.settle(flags)
        return lambda: [bool(flag) for flag in flags]

    def wait(self) -> None:
        """Wait for an accelerator; a CPU has always done all."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def peak_nbytes(self, call: Callable[[], None]) -> int | None:
        """Ask the accelerator's allocator; see `Arrays.peak_nbytes`."""
        if self._device.type == "cpu":
            return None
        memory = torch.get_device_module(self._device)
        if not hasattr(memory, "reset_peak_memory_stats"):
            return None
        self.wait()
        memory.reset_peak_memory_stats(self._device)
        before = int(memory.memory_allocated(self._device)) - self.kept_nbytes()
        call()
        self.wait()
        return int(memory.max_memory_allocated(self._device)) - before

    def most_nbytes(self) -> int | None:
        """Ask the accelerator's allocator; see `Arrays.most_nbytes`."""
        if self._device.type == "cpu":
            return None
        memory = torch.get_device_module(self._device)
        if not hasattr(memory, "max_memory_allocated"):
            return None
        return int(memory.max_memory_allocated(self._device))

    def device_nbytes(self) -> tuple[int, int] | None:
        """Ask driver and allocator; see `Arrays.device_nbytes`."""
        if self._device.type == "cpu":
            return None
        memory = torch.get_device_module(self._device)
        if not hasattr(memory, "mem_get_info"):
            return None
        free, _ = memory.mem_get_info(self._device)
        return int(free), int(memory.memory_reserved(self._device))

    def release(self) -> None:
        """Forget the buffers, and give the allocator's idle memory back to the device."""
        self._shaped.clear()
        self._buffers.clear()
        if self._transfer is not None:
            self._transfer.release()
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()

    def _to_device(self, host: npt.NDArray[Any]) -> Tensor:
        """Return a copy of a small host array on the device."""
        if self._transfer is not None:
            return self._transfer.to_device(host)
        return torch.tensor(host, device=self._device)

    def _divisor(self, value: float) -> Tensor:
        """Return a number as a float32 scalar on the device."""
        if value not in self._divisors:
            divisor = torch.tensor(value, dtype=torch.float32, device=self._device)
            self._divisors[value] = divisor
        return self._divisors[value]

    def _buffer(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return memory that is kept for the next call of the same name."""
        key = name, tuple(shape)
        shaped = self._shaped.get(key)
        if shaped is None or shaped.dtype != dtype:
            shaped = self._shaped[key] = self._grown(name, prod(shape), dtype).view(*shape)
        return shaped

    def _grown(self, name: str, num_values: int, dtype: torch.dtype) -> Tensor:
        """Return that many values of a buffer, which is made anew where it is too small."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_values or buffer.dtype != dtype:
            # No view may keep the old one.
            self._shaped = {key: view for key, view in self._shaped.items() if key[0] != name}
            self._buffers.pop(name, None)
            buffer = torch.empty(num_values, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:num_values]


def _float32(value: float) -> float:
    """Return the number as float32 has it, so that every device compares with the same one."""
    return float(np.float32(value))


def _as_tensor(host: npt.NDArray[Any]) -> Tensor:
    """Return a tensor that shares an array's memory if it can."""
    # torch knows no read-only tensors, and warns.
    return torch.from_numpy(np.require(host, requirements=["C", "W"]))
