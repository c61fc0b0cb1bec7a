"""Copies between host and accelerator that run beside the computing, in streams of their own.

Nothing here waits but `pace`, which keeps the host from running far ahead of the device. Knows no
patches and no blocks.

    inward        layer k+1 -> device
    computing     batches of layer k: raw patches, network, sums ...
    outward       part j of the output -> pinned
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpichunk.geometry.buffers import LAYERS_IN_FLIGHT

NUM_SLOTS = LAYERS_IN_FLIGHT
"""Layers of the input, and parts of the output, that are on their way at the same time."""

MOST_BATCHES_AHEAD = 8
"""Batches that the device has been asked for and not begun: work while the host is held up.

They take no memory: each is computed where the one before was, and the layers of the input wait for
their place. The driver's queue holds about a thousand kernels; beyond, asking waits by spinning.
"""

ENOUGH_BATCHES_AHEAD = 2
"""As many as there need be once the device has been asked for `ENOUGH_SECONDS` of work."""

ENOUGH_SECONDS = 0.02
"""No thread of Python holds up another for longer; more would be waited for in the end."""


@dataclass(slots=True)
class _Slot:
    """A place that copies pass through, and what has happened to it last."""

    memory: Tensor | None = None
    """(nbytes,) uint8 on the device."""

    copied: Any = None
    """Event: the last copy is done."""

    used: Any = None
    """Event: what has read it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A batch that the device was asked for."""

    event: Any
    """The device has begun with it."""

    seconds: float
    """When it was asked for, by a monotonic clock."""


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
        self._begun: deque[_Asked] = deque()

    def pace(self) -> None:
        """Wait while the device has not begun with enough that it was asked for."""
        now = monotonic()
        while self._begun and self._is_enough(now - self._begun[0].seconds):
            self._begun.popleft().event.synchronize()
        self._begun.append(_Asked(event=self._mark(), seconds=now))

    def _is_enough(self, seconds: float) -> bool:
        """Return whether to wait for the oldest batch that was asked for, so long ago."""
        least = ENOUGH_BATCHES_AHEAD if seconds > ENOUGH_SECONDS else MOST_BATCHES_AHEAD
        return len(self._begun) >= least

    def bring(self, host: Tensor) -> Tensor:
        """Begin to copy from pinned memory; what comes next on the device sees it there.

        Item by item of the first axis, each of which lies in one piece. The tensor holds until the
        next call but one.
        """
        # All that reads the one before has been asked for by now.
        if self._num_in:
            self._in_slots[(self._num_in - 1) % NUM_SLOTS].used = self._mark()
        slot = self._in_slots[self._num_in % NUM_SLOTS]
        self._num_in += 1
        if _grow(slot, host.nbytes, self._device):
            # It may be memory that what was asked for earlier still works with.
            slot.used = self._mark()
        device = _shaped(slot.memory, host.shape, host.dtype)
        with self._module.stream(self._inward):
            if slot.used is not None:
                self._inward.wait_event(slot.used)
            self._copy_items(device, host)
            slot.copied = self._mark()
        self._current().wait_event(slot.copied)
        return device

    def outgoing(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return device memory for `send`, once what was sent from there before is copied."""
        slot = self._out_slots[self._num_out % NUM_SLOTS]
        _grow(slot, prod(shape) * dtype.itemsize, self._device)
        if slot.copied is not None:
            self._current().wait_event(slot.copied)
        return _shaped(slot.memory, shape, dtype)

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Begin to copy what `outgoing` returned, item by item of the first axis."""
        slot = self._out_slots[self._num_out % NUM_SLOTS]
        self._num_out += 1
        done = self._mark()
        with self._module.stream(self._outward):
            self._outward.wait_event(done)
            self._copy_items(host, tensor)
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

    def _copy_items(self, targets: Tensor, sources: Tensor) -> None:
        """Begin to copy in pieces: else torch would go by way of memory that is not pinned."""
        for target, source in zip(targets, sources, strict=True):
            self._copy(target, source)

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


def _grow(slot: _Slot, nbytes: int, device: torch.device) -> bool:
    """Let a slot hold so many bytes; return whether its memory is new."""
    if slot.memory is not None and slot.memory.numel() >= nbytes:
        return False
    if slot.copied is not None:
        # The memory must not be given to others while it is being copied.
        slot.copied.synchronize()
    slot.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return True


def _shaped(memory: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the first bytes of some memory as a tensor."""
    assert memory is not None
    return memory[: prod(shape) * dtype.itemsize].view(dtype).view(*shape)
