"""Copies between host and accelerator that run beside the computing, in streams of their own.

Nothing here waits but `incoming`, for a copy that began two batches ago: that also keeps the host
from running far ahead of the device. Knows no patches and no blocks.

    host       fill pinned k+1 |  fill pinned k+2 ...
    inward           copy k ----'--> copy k+1
    computing                 network k-1 ---> network k ...
    outward                         part j-1 of the output -> pinned
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_SLOTS = 2
"""Batches, and parts of the output, that are on their way at the same time."""


@dataclass(slots=True)
class _Slot:
    """A place that copies pass through, and what has happened to it last."""

    host: Tensor | None = None
    """(nbytes,) uint8, pinned."""

    device: Tensor | None = None
    """(nbytes,) uint8."""

    copied: Any = None
    """Event: the last copy is done."""

    used: Any = None
    """Event: what reads the device's side is done."""


class Transfer:
    """The copies of one thread's computing on one accelerator.

    Args:
        device: The accelerator.
        module: Its streams, such as `torch.cuda`.
        make_event: Makes an event of it.
        is_pinned: Whether host memory can be pinned for it.
    """

    def __init__(
        self,
        device: torch.device,
        module: Any,
        make_event: Callable[[], Any],
        *,
        is_pinned: bool = True,
    ) -> None:
        self._device = device
        self._module = module
        self._make_event = make_event
        self._is_pinned = is_pinned
        self._inward, self._outward = module.Stream(device), module.Stream(device)
        self.release()

    def release(self) -> None:
        """Wait for all copies, and forget the memory that they pass through."""
        self._inward.synchronize()
        self._outward.synchronize()
        self._in_slots = [_Slot() for _ in range(NUM_SLOTS)]
        self._out_slots = [_Slot() for _ in range(NUM_SLOTS)]
        self._num_in = self._num_out = 0

    def incoming(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return pinned host memory to be filled for `bring`; wait until it is free."""
        slot = self._in_slots[self._num_in % NUM_SLOTS]
        if slot.copied is not None:
            slot.copied.synchronize()
        nbytes = prod(shape) * dtype.itemsize
        if slot.host is None or slot.host.numel() < nbytes:
            slot.host = self.host_bytes(nbytes)
            slot.device = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            # It may be memory that what was asked for earlier still works with.
            slot.used = self._mark()
        return _shaped(slot.host, shape, dtype)

    def bring(self, host: Tensor) -> Tensor:
        """Begin to copy what `incoming` returned; what comes next on the device sees it there.

        The tensor holds until the next call but one.
        """
        # All that reads the batch before has been asked for by now, in this order.
        if self._num_in:
            self._in_slots[(self._num_in - 1) % NUM_SLOTS].used = self._mark()
        slot = self._in_slots[self._num_in % NUM_SLOTS]
        self._num_in += 1
        assert slot.device is not None, "incoming comes first"
        device = _shaped(slot.device, host.shape, host.dtype)
        with self._module.stream(self._inward):
            if slot.used is not None:
                self._inward.wait_event(slot.used)
            self._copy(device, host)
            slot.copied = self._mark()
        self._current().wait_event(slot.copied)
        return device

    def outgoing(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return device memory for `send`, once what was sent from there before is copied."""
        slot = self._out_slots[self._num_out % NUM_SLOTS]
        nbytes = prod(shape) * dtype.itemsize
        if slot.device is None or slot.device.numel() < nbytes:
            if slot.copied is not None:
                # The memory must not be given to others while it is being read.
                slot.copied.synchronize()
            slot.device = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if slot.copied is not None:
            self._current().wait_event(slot.copied)
        return _shaped(slot.device, shape, dtype)

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Begin to copy what `outgoing` returned, item by item of the first axis."""
        slot = self._out_slots[self._num_out % NUM_SLOTS]
        self._num_out += 1
        done = self._mark()
        with self._module.stream(self._outward):
            self._outward.wait_event(done)
            for target, source in zip(host, tensor, strict=True):
                # In one piece: else torch would copy by way of memory that is not pinned.
                self._copy(target, source)
            slot.copied = self._mark()

    def settle(self, flags: Sequence[Tensor]) -> Callable[[], list[bool]]:
        """Begin to bring flags to the host; what is returned waits for them and all that was sent.

        Any thread may call it.
        """
        found = torch.stack(list(flags)) if flags else torch.empty(0, device=self._device)
        host = _shaped(self.host_bytes(len(flags)), [len(flags)], torch.bool)
        done = self._mark()
        with self._module.stream(self._outward):
            self._outward.wait_event(done)
            self._copy(host, found)
            arrived = self._mark()

        def wait() -> list[bool]:
            arrived.synchronize()
            # Kept until here: the allocator would give its memory to what is computed next.
            assert len(found) == len(host)
            return [bool(flag) for flag in host.tolist()]

        return wait

    def to_device(self, host: npt.NDArray[Any]) -> Tensor:
        """Begin to copy a small array; what comes next on the device sees it there."""
        tensor = torch.from_numpy(np.ascontiguousarray(host))
        # torch keeps memory that it has pinned itself until the copy is done.
        pinned = tensor.pin_memory() if self._is_pinned else tensor
        return pinned.to(self._device, non_blocking=True)

    def host_bytes(self, nbytes: int) -> Tensor:
        """Return (nbytes,) uint8 of pinned memory; torch rounds it up to a power of two."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy, in the current stream."""
        target.copy_(source, non_blocking=True)

    def _mark(self) -> Any:
        """Return an event: what was asked of the current stream so far is done."""
        event = self._make_event()
        event.record(self._current())
        return event

    def _current(self) -> Any:
        """Return the stream that takes what this thread asks for."""
        return self._module.current_stream(self._device)


def make_transfer(device: torch.device) -> Transfer | None:
    """Return the copies of a device of CUDA or ROCm; None for others, which wait for each."""
    if device.type != "cuda":
        return None
    # An event that is waited for by spinning would take a core from reading and writing.
    return Transfer(device, torch.cuda, partial(torch.cuda.Event, blocking=True))


def _shaped(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the first bytes of some memory as a tensor."""
    return memory[: prod(shape) * dtype.itemsize].view(dtype).view(*shape)
