"""From one block's raw voxels to its finished core: cut, predict, blend, quantise.

Knows no framework (an engine brings its arrays), no volumes and no ranks. What enters a batch
depends on the block alone, so that the bytes do too.

    source --stage, gather--> batch --infer, activate--> patches --> slab --finish--> core

On an accelerator all of this is only asked for: the host prepares batches that come later while the
network runs, and whoever writes the core waits for it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpichunk.backends.engine import DeviceArray, Engine, EngineRequest, Feed, Staged
from mpichunk.block.blank import is_blank
from mpichunk.block.hostpool import HostPool
from mpichunk.block.nonfinite import Patch, Patches, blame_patch
from mpichunk.block.slab import Slab, Target, Unsettled
from mpichunk.block.windows import Windows
from mpichunk.config.reduction import Reduction
from mpichunk.config.scaling import Scaling
from mpichunk.config.schema import Normalize
from mpichunk.config.types import Window
from mpichunk.errors import BlockError, DeviceMemoryError, ModelError, UserError
from mpichunk.geometry.blending import window
from mpichunk.geometry.box import Slices, Triple, subtract
from mpichunk.geometry.symmetry import STRAIGHT, Augmentation, PatchTurn
from mpichunk.plan.plan import Block
from mpichunk.words import count

_BYTE = Scaling(divide=255.0)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """A block that has been through the network; its core may still be on its way to the host."""

    num_patches: int
    """Patches that went through the network."""

    batch_size: int | None = None
    """Patches per forward, where it had to be less than was asked for; else None."""

    core_czyx: npt.NDArray[Any]
    """(channels, z, y, x) in the output's dtype; for `core` and `release`."""

    unsettled: Unsettled | None = None
    """What to wait for; None for nothing."""

    give_back: Callable[[], None] = lambda: None
    """Lets the memory of the block be used again."""

    def core(self) -> npt.NDArray[Any]:
        """Return the finished core, which nothing else uses; wait until it is there.

        Raises:
            BlockError: it holds NaN or inf, or more than float16 can where that is written; its
                memory is released.
        """
        if self.unsettled is not None:
            try:
                self.unsettled.wait()
            except BlockError:
                self.release()
                raise
        return self.core_czyx

    def release(self) -> None:
        """Let the memory of the block be used again: its core is written."""
        self.give_back()


class BlockInference:
    """Runs blocks one after the other through one engine; serves one thread."""

    def __init__(
        self,
        engine: Engine,
        request: EngineRequest,
        *,
        scaling: Scaling,
        window_name: Window,
        activation: Literal["none", "sigmoid", "softmax"],
        skip_blank: bool,
        augmentation: Augmentation | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """Prepare what all blocks share.

        Args:
            engine: the network, loaded with `request`.
            request: what the engine was asked for.
            scaling: how raw input becomes float32; see `scaling_for`.
            window_name: blending weights of one output patch.
            activation: what acts on each patch before it is weighted.
            skip_blank: do not run patches whose raw input is all zero.
            augmentation: the turns over which each patch is averaged; None for none.
            reduction: what is made of the blended channels; default: all are written.
        """
        self._engine = engine
        self._request = request
        self._scaling = scaling
        self._activation = activation
        self._skip_blank = skip_blank
        self._augmentation = augmentation
        self._reduction = reduction or Reduction(channels=tuple(range(request.out_channels)))
        self._batch_size = request.batch_size
        output_shape = subtract(subtract(request.patch_shape, request.crop), request.crop)
        self._output_shape = output_shape
        z, y, x = (window(window_name, length) for length in output_shape)
        self._windows = Windows(engine.arrays, (z, y, x))
        self._sources = HostPool(engine.arrays.host_bytes)
        self._cores = HostPool(engine.arrays.host_bytes)

        self.num_batches = 0
        """Batches that went through the network."""

    def hold(self, source_czyx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a block's raw input where the device can take it from by itself; any thread may.

        To be passed to `run`, which sees to its memory.
        """
        if self._engine.arrays.is_host:
            return source_czyx
        held_czyx = self._sources.take(source_czyx.shape, source_czyx.dtype)
        np.copyto(held_czyx, source_czyx)
        return held_czyx

    @property
    def device_peak_nbytes(self) -> int | None:
        """The most device memory that blocks have taken; None on a CPU, or if nobody says."""
        return self._engine.arrays.most_nbytes()

    def run(
        self,
        block: Block,
        source_czyx: npt.NDArray[Any],
        mask_zyx: npt.NDArray[np.bool_] | None,
        out_dtype: np.dtype[Any],
    ) -> Inferred:
        """Return one block's core, finished or about to be.

        Where the device runs out of memory, the block is begun again with half the patches per
        forward, and so are all later ones: the values may then differ by rounding.

        Args:
            block: where its patches are.
            source_czyx: raw input over `block.input_box`, padded; best as `hold` returns it.
            mask_zyx: wanted voxels of `block.output_box`, or None for all.
            out_dtype: dtype of the output.

        Raises:
            DeviceMemoryError: there is no memory for a single patch.
        """
        while True:
            try:
                return self._run(block, source_czyx, mask_zyx, out_dtype)
            except BaseException as error:
                # Copies from the source and to the core may be under way, and their memory is about
                # to be somebody else's. A device that is broken has none under way.
                with suppress(RuntimeError):
                    self._engine.arrays.wait()
                if not isinstance(error, Exception) or isinstance(error, BlockError):
                    raise
                if not self._engine.is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # Only now are the arrays of the failed try free.
            self._windows.clear()
            self._engine.arrays.release()
            self._halve_batch(block, reason)

    def _halve_batch(self, block: Block, reason: str) -> None:
        """Make batches smaller from now on, and say so."""
        device = self._engine.info.device
        if self._batch_size == 1:
            raise DeviceMemoryError(
                f"block {block.index}, {block.core}: not even one patch fits into the memory of "
                f"{device}: {reason}; reduce patch.shape or block.shape"
            )
        self._batch_size //= 2
        log.warning(
            "block %d: %s is out of memory (%s); this rank runs %s per forward from now "
            "on instead of %d, and its values may differ by rounding",
            block.index,
            device,
            reason,
            count(self._batch_size, "patch", "patches"),
            self._request.batch_size,
        )

    def _run(
        self,
        block: Block,
        source_czyx: npt.NDArray[Any],
        mask_zyx: npt.NDArray[np.bool_] | None,
        out_dtype: np.dtype[Any],
    ) -> Inferred:
        """Do what `run` does, with batches of the size that holds now."""
        patches = self._wanted(block, source_czyx, mask_zyx)
        shape = self._reduction.num_channels, *block.core.shape
        core_czyx, slab, num_patches = None, None, 0
        feed = self._engine.arrays.feed(source_czyx)
        while batch := list(islice(patches, self._batch_size)):
            if core_czyx is None or slab is None:
                core_czyx = self._cores.take(shape, out_dtype)
                slab = self._slab(block, mask_zyx, core_czyx)
            output_nczyx = self._predict(self._stage(feed, [seen for _, seen in batch]))
            for (box, _), patch_czyx in zip(batch, output_nczyx, strict=False):
                slab.add(box, patch_czyx)
            num_patches += len(batch)
        if core_czyx is None or slab is None:
            self._sources.give_back(source_czyx)
            return Inferred(core_czyx=np.zeros(shape, dtype=out_dtype), num_patches=0)
        again = self._wanted(block, source_czyx, mask_zyx)
        is_halved = self._batch_size != self._request.batch_size
        return Inferred(
            num_patches=num_patches,
            batch_size=self._batch_size if is_halved else None,
            core_czyx=core_czyx,
            unsettled=slab.finish(partial(self._blame, source_czyx, again)),
            give_back=partial(self._give_back, source_czyx, core_czyx),
        )

    def _give_back(self, source_czyx: npt.NDArray[Any], core_czyx: npt.NDArray[Any]) -> None:
        """Let the memory of a block be used again."""
        self._sources.give_back(source_czyx)
        self._cores.give_back(core_czyx)

    def _slab(
        self, block: Block, mask_zyx: npt.NDArray[np.bool_] | None, core_czyx: npt.NDArray[Any]
    ) -> Slab:
        """Return where the patches of a block are added up."""
        core, arrays = block.core, self._engine.arrays
        target = Target(
            core=core,
            core_czyx=core_czyx,
            mask_zyx=None if mask_zyx is None else mask_zyx[core.slices(block.output_box.start)],
            reduction=self._reduction,
        )
        self._windows.begin(block)
        return Slab(
            arrays,
            self._windows,
            num_channels=self._request.out_channels,
            patch_length=block.patch_shape[0],
            target=target,
        )

    def _wanted(
        self,
        block: Block,
        source_czyx: npt.NDArray[Any],
        mask_zyx: npt.NDArray[np.bool_] | None,
    ) -> Patches:
        """Yield the patches that must run, in lattice order.

        Each by its output box, and by where in the block's source its input is.
        """
        origin, size = block.output_box.start, self._request.patch_shape
        for box in block.patches():
            if mask_zyx is not None and not mask_zyx[box.slices(origin)].any():
                continue
            # The source begins by `crop` before the output, and so does the input of a patch.
            z, y, x = subtract(box.start, origin)
            seen = slice(z, z + size[0]), slice(y, y + size[1]), slice(x, x + size[2])
            if self._skip_blank and is_blank(source_czyx[(slice(None), *seen)]):
                continue
            yield box, seen

    def _blame(self, source_czyx: npt.NDArray[Any], patches: Patches, voxel: Triple) -> str:
        """Say which patch has made a voxel NaN or inf; on a host it is run again."""
        arrays = self._engine.arrays
        feed = arrays.feed(source_czyx)

        def are_sound(suspects: Sequence[Patch]) -> list[bool]:
            answers, left = [], iter(suspects)
            while batch := list(islice(left, self._batch_size)):
                output_nczyx = self._predict(self._stage(feed, [seen for _, seen in batch]))
                for (box, _), patch_czyx in zip(batch, output_nczyx, strict=False):
                    z, y, x = subtract(voxel, box.start)
                    answers.append(bool(arrays.is_finite(patch_czyx[:, z, y, x])))
            return answers

        return blame_patch(voxel, patches, source_czyx, are_sound if arrays.is_host else None)

    def _stage(self, feed: Feed, where: Sequence[Slices]) -> Staged:
        """Begin to bring the raw patches of one batch to the device."""
        return self._engine.arrays.stage(
            feed,
            where,
            patch_shape=self._request.patch_shape,
            batch_size=self._batch_size,
        )

    def _predict(self, staged: Staged) -> DeviceArray:
        """Return the activated prediction of one batch, or its mean over all turns."""
        augmentation = self._augmentation
        if augmentation is None:
            return self._predict_turned(staged, STRAIGHT)
        arrays = self._engine.arrays
        # One sum, however many turns there are.
        mean_nczyx = arrays.sums(
            (self._batch_size, self._request.out_channels, *self._output_shape)
        )
        for turn, moves in zip(augmentation.turns, augmentation.moves, strict=True):
            output_nczyx = self._predict_turned(staged, turn)
            arrays.add_turned(mean_nczyx, output_nczyx, turn, moves)
        for share in augmentation.shares:
            part = mean_nczyx[(slice(None), share.channels, *share.part)]
            arrays.multiply(part, share.factor)
        return mean_nczyx

    def _predict_turned(self, staged: Staged, turn: PatchTurn) -> DeviceArray:
        """Return the activated prediction of one batch of turned patches, as turned as they are."""
        arrays = self._engine.arrays
        batch_nczyx = arrays.gather(staged, scaling=self._scaling, turn=turn)
        output_nczyx = arrays.activate(self._engine.infer(batch_nczyx), self._activation)
        self.num_batches += 1
        return output_nczyx


def scaling_for(dtype: np.dtype[Any], normalize: Normalize | None) -> Scaling:
    """Return how raw input of a dtype becomes the network's float32.

    Integers are divided by the maximum of their dtype; bool and floats are taken as they are;
    `normalize` replaces both.

    Raises:
        UserError: the dtype is not a number that float32 can stand for.
    """
    if dtype.kind not in "buif":
        raise UserError(
            f"input of type {dtype} cannot be fed to a network; expected integers or floats",
            key="input.volume",
        )
    if normalize is not None:
        return Scaling(clip=normalize.clip, subtract=normalize.subtract, divide=normalize.divide)
    if dtype.kind in "ui":
        return Scaling(divide=float(np.iinfo(dtype).max))
    return Scaling()


def texture_batch(engine: Engine, request: EngineRequest) -> DeviceArray:
    """Return a full batch of ordinary texture, values in [0, 1], on the engine's device."""
    shape = request.in_channels, *request.patch_shape
    texture_czyx = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole: Slices = slice(None), slice(None), slice(None)
    staged = engine.arrays.stage(
        engine.arrays.feed(texture_czyx),
        [whole] * request.batch_size,
        patch_shape=request.patch_shape,
        batch_size=request.batch_size,
    )
    return engine.arrays.gather(staged, scaling=_BYTE)


def check_engine(engine: Engine, request: EngineRequest) -> npt.NDArray[np.float32]:
    """Run one real batch through the network before any block depends on it.

    Returns (out_channels, *Q) of its first patch, on the host: the same on every sound rank.

    Raises:
        ModelError: the network fails, returns another shape than was asked for, or NaN or inf.
    """
    arrays, batch_nczyx = engine.arrays, texture_batch(engine, request)
    try:
        output_nczyx = engine.infer(batch_nczyx)
    except UserError:
        raise
    except Exception as error:
        raise engine.explain(error) from error
    (is_finite,) = arrays.settle([arrays.is_finite(output_nczyx)])()
    if not is_finite and request.precision == "float16":
        raise ModelError(
            "the network returned NaN or inf for an ordinary texture with values in [0, 1]: "
            "float16 holds nothing above 65504; use 'bfloat16' or 'float32'",
            key="compute.precision",
        )
    if not is_finite:
        raise ModelError(
            "the network returned NaN or inf for an ordinary texture with values in [0, 1]; its "
            "weights may be damaged, or belong to another network",
            key="model.weights",
        )
    # A copy: what is downloaded may be a buffer that the first block overwrites.
    return np.array(arrays.download(output_nczyx[0]), np.float32)
