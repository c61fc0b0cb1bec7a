"""The array operations of blending in torch, on a CPU or an accelerator.

Every operation writes into memory that is there already, and none waits for the device but
`is_finite` and `download`. Knows no geometry beyond the slices it is given.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpichunk.engine import Scaling, Vectors
from mpichunk.geometry import Slices, Triple


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
