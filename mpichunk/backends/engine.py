"""What a backend must be: the protocols between the blending and any network.

Knows no framework. An engine brings the few array operations that blending needs on its own device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpichunk.config.scaling import Scaling
from mpichunk.errors import UserError
from mpichunk.geometry.box import Slices, Triple
from mpichunk.geometry.symmetry import STRAIGHT, Move, PatchTurn

DeviceArray = Any
"""An array in the engine's own framework and on its own device."""

Feed = Any
"""The raw source of a block, as an engine's arrays keep it."""

Staged = Any
"""Raw patches of one batch on their way to the device, as an engine's arrays keep them."""

Vectors = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Host vectors along z, y and x whose outer product is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How a network runs, where the backend has a choice; none of it is assumed to help."""

    compile: bool = False
    """Kernels are made for this network, machine and batch."""

    channels_last: bool = False
    """The channels of a voxel are kept side by side."""

    fold_batch_norm: bool = False
    """Batch norms are multiplied into the convolutions before them."""

    cuda_graphs: bool = False
    """The forward of a batch is recorded once and replayed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are on."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What really runs, for the log and the provenance."""

    backend: str
    """Name of the backend, as in the config."""

    version: str
    """Version of the framework."""

    device: str
    """Device in words, e.g. "cuda:0 NVIDIA H100" or "cpu"."""

    device_kind: str
    """What the bytes depend on: accelerator model, or CPU instruction set."""

    precision: str
    """Precision really used."""

    threads: int
    """CPU threads of the forward pass, as the framework tells."""

    kernels: tuple[str, ...] = ()
    """Kernel options that are in effect."""

    @property
    def how(self) -> str:
        """Precision and kernels in words."""
        return ", ".join((self.precision, *self.kernels))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What a backend is asked for; shapes in voxels, zyx."""

    patch_shape: Triple
    """Spatial shape of the network's input."""

    crop: Triple
    """Border that is cut off each side of the network's output, or that it has cut itself."""

    batch_size: int
    """Patches per forward; every forward gets exactly this many, or fewer for lack of memory."""

    in_channels: int
    """Channels of the input volume."""

    out_channels: int
    """Channels that the network must return."""

    threads: int
    """CPU threads for the forward pass."""

    precision: str
    """`float32`, `tf32`, `bfloat16` or `float16`; what goes in and comes out is float32 always."""

    device: str
    """`cpu`, or the framework's name of one accelerator, e.g. `cuda:0`."""

    deterministic: bool
    """Whether algorithms must be chosen deterministically."""

    kernels: Kernels = Kernels()
    """How the network runs."""


class Arrays(Protocol):
    """The array operations of blending, on one device.

    `czyx` arrays hold float32 unless said otherwise. Nothing here decides: geometry and order of
    operations belong to `inference`. One engine's arrays serve one thread.
    """

    @property
    def finish_nbytes(self) -> int:
        """Bytes of float32 that are finished at a time: on a CPU what its cache holds."""

    def upload(self, host_czyx: npt.NDArray[Any]) -> DeviceArray:
        """Return the host array on the device, in its own dtype."""

    def zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a float32 array of zeros, which the next such call overwrites."""

    def feed(self, source_czyx: npt.NDArray[Any]) -> Feed:
        """Return what `stage` takes the patches of one block from; the array must not change."""

    def stage(
        self,
        feed: Feed,
        where: Sequence[Slices],
        *,
        patch_shape: Triple,
        batch_size: int,
    ) -> Staged:
        """Begin to bring the raw patches of one batch to the device, in lattice order.

        Waits where the device has not begun with several batches before, so that the host does not
        run far ahead. What is returned holds until the next call.
        """

    def gather(
        self, staged: Staged, *, scaling: Scaling, turn: PatchTurn = STRAIGHT
    ) -> DeviceArray:
        """Scale staged patches to float32, and pad the batch with zero patches.

        A `turn` is applied to each patch; one that exchanges y and x needs a square patch.

        Returns (batch_size, channels, *patch_shape), in a buffer that the next call overwrites.
        """

    def activate(self, batch_nczyx: DeviceArray, activation: str) -> DeviceArray:
        """Return the batch through `none`, `sigmoid`, or `softmax` over channels.

        What is returned may be a buffer that the next call overwrites; the batch stays untouched.
        """

    def sums(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a float32 array of zeros for `add_turned`, which the next such call overwrites."""

    def add_turned(
        self,
        sum_nczyx: DeviceArray,
        batch_nczyx: DeviceArray,
        turn: PatchTurn,
        moves: Sequence[Move],
    ) -> None:
        """Turn predictions of a turned batch back, and add what each move takes to the sum."""

    def multiply(self, array: DeviceArray, factor: float) -> None:
        """Multiply in place."""

    def vector(self, host: npt.NDArray[np.float32]) -> DeviceArray:
        """Return a small host vector on the device, without waiting."""

    def window(
        self, z: DeviceArray, y: DeviceArray, x: DeviceArray, used: DeviceArray | None = None
    ) -> DeviceArray:
        """Return the product of three vectors in the form that `add_weighted` likes best.

        It lies in the memory of `used`, a window of the same shape that nobody needs any more, or
        in memory of its own.
        """

    def add_weighted(
        self,
        total_czyx: DeviceArray,
        where: Slices,
        patch_czyx: DeviceArray,
        part: Slices,
        window: DeviceArray,
    ) -> None:
        """Do total[:, where] += (patch * window)[:, part], in float32.

        `window` comes from `window` and covers the whole patch.
        """

    def apply_mask(self, total_czyx: DeviceArray, mask_zyx: npt.NDArray[np.bool_]) -> None:
        """Set to zero, in place, what the mask excludes, whatever was there."""

    def is_finite(self, array: DeviceArray) -> DeviceArray:
        """Return whether the array holds neither NaN nor inf: a flag on the device."""

    def gate(
        self, total_czyx: DeviceArray, channel: int, below: float, gated: Sequence[int]
    ) -> None:
        """Set channels to zero, in place, wherever one channel is not below a value."""

    def best_channel(
        self,
        total_czyx: DeviceArray,
        channels: Sequence[int],
        out_zyx: DeviceArray,
        *,
        is_vote: bool,
    ) -> None:
        """Write which of the channels is largest, the first of equal ones, counted from 0.

        A vote is counted from 1, and is 0 where all the channels are zero.
        """

    def above(self, total_czyx: DeviceArray, threshold: float, out_czyx: DeviceArray) -> None:
        """Write 1 where a value is greater than the threshold, else 0."""

    def quantise(self, total_czyx: DeviceArray, out_czyx: DeviceArray) -> None:
        """Convert into an array of the output dtype; what was in `total_czyx` is lost.

        Integers: clip to [0, 1], times the dtype's maximum, rounded half to even in float32.
        float16 and float32 are plain casts.
        """

    def clear(self, array: DeviceArray) -> None:
        """Set to zero."""

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """Return the array on the host, C contiguous; it may share the array's memory."""

    @property
    def is_host(self) -> bool:
        """Whether arrays lie in the host's memory; else the device copies from `host_bytes`."""

    def host_bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return new memory on the host that the device can copy to by itself."""

    def outgoing(self, host_czyx: npt.NDArray[Any]) -> DeviceArray:
        """Return where on the device to make what `send` will bring to a part of the host.

        Of the same shape and dtype, its values undefined; on the host it is the part itself.
        """

    def send(self, array: DeviceArray, host_czyx: npt.NDArray[Any]) -> None:
        """Begin to copy what `outgoing` returned to the same part, each channel in one piece."""

    def settle(self, flags: Sequence[DeviceArray]) -> Callable[[], list[bool]]:
        """Begin to bring flags to the host.

        What is returned waits for them and for all that was sent before; any thread may call it.
        """

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""

    def peak_nbytes(self, call: Callable[[], None]) -> int | None:
        """Return the device memory that a call takes at its peak.

        None, and no call, for a host's memory, or if nobody says.
        """

    def most_nbytes(self) -> int | None:
        """Return the most device memory that was ever taken, the network's included.

        Since the last `peak_nbytes`; None for a host's memory, or if nobody says. Any thread may
        ask.
        """

    def device_nbytes(self) -> tuple[int, int] | None:
        """Return what nobody holds of the device's memory, and what this process holds.

        None for a host's memory, or if nobody says.
        """

    def release(self) -> None:
        """Give back all memory that is only kept for later calls."""


class Engine(Protocol):
    """A network, loaded, on one device."""

    @property
    def arrays(self) -> Arrays:
        """The array operations of the engine's device."""

    @property
    def info(self) -> EngineInfo:
        """What really runs."""

    def infer(self, batch_nczyx: DeviceArray) -> DeviceArray:
        """Run the network on (n, c, *patch_shape) float32; return (n, out_channels, *Q) float32.

        Q is patch_shape - 2 * crop: the engine has cut what the network had not cut itself.
        What is returned may be a buffer that the next call overwrites.

        Raises:
            ModelError: the network returned something else.
        """

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether the device had no memory left, so that a smaller batch may do."""

    def explain(self, error: Exception) -> UserError:
        """Say what the user can do about an exception that `infer` raised in its first forward."""
