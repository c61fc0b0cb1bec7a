"""The array operations of blending in torch, on a CPU or an accelerator.

Every operation writes into memory that is there already, and none waits for the device but
`is_finite` and `download`. Knows no geometry beyond the slices it is given.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpichunk.backends.engine import Scaling, Vectors
from mpichunk.geometry.box import Slices, Triple
from mpichunk.geometry.symmetry import STRAIGHT, Move, Turn


class TorchArrays:
    """Arrays are tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        # Divisors on the device: by a host number, CUDA kernels multiply by the reciprocal
        # instead, which rounds differently.
        self._divisors: dict[float, Tensor] = {}

    @property
    def slab_nbytes(self) -> int:
        """A core's second-level cache, or a small share of an accelerator's memory."""
        return 1 << 20 if self._device.type == "cpu" else 1 << 28

    def upload(self, host_czyx: npt.NDArray[Any]) -> Tensor:
        """Return a tensor of the same dtype; on the CPU it shares the array's memory."""
        host_czyx = np.ascontiguousarray(host_czyx)
        if not host_czyx.flags.writeable:
            # torch knows no read-only tensors, and warns.
            host_czyx = host_czyx.copy()
        return torch.from_numpy(host_czyx).to(self._device)

    def zeros(self, shape: tuple[int, ...], *, reuse: bool) -> Tensor:
        """Return zeros; see `Arrays.zeros`. Fresh pages cost more than clearing old ones."""
        if not reuse:
            return torch.zeros(shape, dtype=torch.float32, device=self._device)
        return self._buffer("total", shape).zero_()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """Return a tensor, its values undefined."""
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=self._device)

    @torch.no_grad()
    def gather(
        self,
        source_czyx: Tensor,
        where: Sequence[Slices],
        *,
        patch_shape: Triple,
        batch_size: int,
        scaling: Scaling,
        turn: Turn = STRAIGHT,
    ) -> Tensor:
        """Cut, scale and pad; see `Arrays.gather`."""
        batch_nczyx = self._buffer("batch", (batch_size, source_czyx.shape[0], *patch_shape))
        for patch_czyx, slices in zip(batch_nczyx, where, strict=False):
            patch_czyx.copy_(source_czyx[(slice(None), *slices)])
            if scaling.clip is not None:
                patch_czyx.clamp_(*scaling.clip)
            if scaling.subtract != 0:
                patch_czyx.sub_(scaling.subtract)
            if scaling.divide != 1:
                patch_czyx.div_(self._divisor(scaling.divide))
            if turn != STRAIGHT:
                # torch flips no raw type that it hardly knows, such as uint16, and only by a copy.
                turned = patch_czyx.flip(turn.flipped)
                patch_czyx.copy_(turned.transpose(-2, -1) if turn.swaps_yx else turned)
        batch_nczyx[len(where) :] = 0
        return batch_nczyx

    @torch.no_grad()
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

    @torch.no_grad()
    def add_turned(
        self, sum_nczyx: Tensor, batch_nczyx: Tensor, turn: Turn, moves: Sequence[Move]
    ) -> None:
        """Flip one patch's channels at a time, by a copy; see `Arrays.add_turned`."""
        for sum_czyx, patch_czyx in zip(sum_nczyx, batch_nczyx, strict=True):
            for move in moves:
                back = patch_czyx[move.source]
                back = back.transpose(-2, -1) if turn.swaps_yx else back
                back = back.flip(turn.flipped) if turn.flipped else back
                sum_czyx[(move.target, *move.where)].add_(back[(slice(None), *move.part)])

    @torch.no_grad()
    def multiply(self, array: Tensor, factor: float) -> None:
        """Multiply in place."""
        array.mul_(factor)

    def window(self, vectors: Vectors) -> Tensor:
        """Return the whole (z, y, x) product: with it, adding is one kernel per patch."""
        z, y, x = (self._vector(vector) for vector in vectors)
        return z[:, None, None] * (y[:, None] * x)

    @torch.no_grad()
    def add_weighted(
        self, total_czyx: Tensor, where: Slices, patch_czyx: Tensor, part: Slices, window: Tensor
    ) -> None:
        """Multiply and add in one pass, without a temporary; see `Arrays.add_weighted`."""
        total_czyx[(slice(None), *where)].addcmul_(patch_czyx[(slice(None), *part)], window[part])

    @torch.no_grad()
    def divide(self, total_czyx: Tensor, sums: Vectors) -> None:
        """Divide by the product of the vectors, made for this slab only; see `Arrays.divide`."""
        z, y, x = (self._vector(vector) for vector in sums)
        weight = self._buffer("weight", total_czyx.shape[1:])
        torch.mul(z[:, None, None], y[:, None] * x, out=weight)
        total_czyx.div_(weight)

    @torch.no_grad()
    def apply_mask(self, total_czyx: Tensor, mask_zyx: npt.NDArray[np.bool_]) -> None:
        """Overwrite, since zero times NaN would stay NaN."""
        total_czyx.masked_fill_(self.upload(~mask_zyx), 0)

    @torch.no_grad()
    def is_finite(self, array: Tensor) -> bool:
        """Return whether both extremes are finite: NaN wins both, and no tensor is made."""
        low, high = torch.aminmax(array)
        return bool(torch.isfinite(low) & torch.isfinite(high))

    @torch.no_grad()
    def gate(self, total_czyx: Tensor, channel: int, below: float, gated: Sequence[int]) -> None:
        """Overwrite where the gate is shut; see `Arrays.gate`."""
        is_shut = total_czyx[channel] >= _float32(below)
        for other in gated:
            total_czyx[other].masked_fill_(is_shut, 0)

    @torch.no_grad()
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

    @torch.no_grad()
    def above(self, total_czyx: Tensor, threshold: float, out_czyx: Tensor) -> None:
        """Compare; see `Arrays.above`."""
        out_czyx.copy_(total_czyx > _float32(threshold))

    @torch.no_grad()
    def quantise(self, total_czyx: Tensor, out_czyx: Tensor) -> None:
        """Convert to the dtype of `out_czyx`; see `Arrays.quantise`."""
        if not out_czyx.dtype.is_floating_point:
            # torch.round rounds half to even.
            total_czyx.clamp_(0, 1).mul_(torch.iinfo(out_czyx.dtype).max).round_()
        out_czyx.copy_(total_czyx)

    def download(self, array: Tensor) -> npt.NDArray[Any]:
        """Return the tensor as an array; from the CPU it shares the tensor's memory."""
        host: npt.NDArray[Any] = array.contiguous().cpu().numpy()
        return host

    def wait(self) -> None:
        """Wait for an accelerator; a CPU has always done all."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def peak_nbytes(self, call: Callable[[], None]) -> int | None:
        """Ask the accelerator's allocator; see `Arrays.peak_nbytes`."""
        if self._device.type == "cpu":
            return None
        self.wait()
        memory = torch.get_device_module(self._device)
        memory.reset_peak_memory_stats(self._device)
        before = int(memory.memory_allocated(self._device))
        call()
        self.wait()
        return int(memory.max_memory_allocated(self._device)) - before

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
        self._buffers.clear()
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()

    def _vector(self, vector: npt.NDArray[np.float32]) -> Tensor:
        """Return a copy of a small host vector on the device."""
        return torch.tensor(vector, device=self._device)

    def _divisor(self, value: float) -> Tensor:
        """Return a number as a float32 scalar on the device."""
        if value not in self._divisors:
            divisor = torch.tensor(value, dtype=torch.float32, device=self._device)
            self._divisors[value] = divisor
        return self._divisors[value]

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return float32 memory that is kept for the next call of the same name."""
        num_values = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_values:
            buffer = torch.empty(num_values, dtype=torch.float32, device=self._device)
            self._buffers[name] = buffer
        return buffer[:num_values].view(*shape)


def _float32(value: float) -> float:
    """Return the number as float32 has it, so that every device compares with the same one."""
    return float(np.float32(value))
