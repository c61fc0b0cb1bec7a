"""One rank's blocks on their way: read -> predict -> crop -> write, several in flight.

Runs beside the main thread, which owns MPI. Knows no ranks, no scheduling and no journal: leases go
in, records come out.

    main thread     submit(lease) --.                                  .--> records, wake
                                    v                                  |
    reader threads         mask, input, padding      block k+1         |
    compute thread                    `--> infer     block k           |
    settle thread                            `--> wait for the device  |
    writer threads                                   `--> checksum, write   block k-1
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.block.inference import BlockInference, Inferred
from mpichunk.config.types import Pad
from mpichunk.errors import BlockError
from mpichunk.geometry.box import Box
from mpichunk.geometry.masking import BoolArray, MaskGrid
from mpichunk.geometry.padding import pad, source_box
from mpichunk.plan.plan import Block, Plan
from mpichunk.processmemory import trim
from mpichunk.rundir.checksum import checksum_of
from mpichunk.schedule.messages import Done, Dropped, Failed, Lease, Record, Records
from mpichunk.volume import Reader, Writer

NUM_IO_THREADS = 2
"""Blocks read, and blocks written, at the same time."""

TRIM_SECONDS = 30.0
"""How often memory is given back that has become free between what is used.

What comes and goes does not always lie where it lay before. Taking the rest of it anew costs a
forward less than a second.
"""

BLOCK_FAILURES = (BlockError, OSError, MemoryError, RuntimeError)
"""What fails one block and not the job: storage, memory, the framework. The rest is a bug."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSource:
    """Where blocks are read from."""

    volume: Reader
    """The input."""

    pad: Pad
    """What lies outside the input."""

    mask: Reader | None
    """The mask, if there is one."""

    mask_grid: MaskGrid | None
    """How the mask lies over the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBlock:
    """A block that has been read."""

    source_czyx: npt.NDArray[Any] | None
    """Raw input over the block's input box, padded; None where the mask wants nothing."""

    mask_zyx: BoolArray | None
    """Wanted voxels of the block's output box; None without a mask."""

    nbytes_read: int
    """Bytes of input that were read, uncompressed."""

    seconds: float
    """Time it took."""


def load_block(source: InputSource, block: Block) -> LoadedBlock:
    """Read what a block needs: the mask first, and no input when the mask excludes it all.

    Raises:
        BlockError: it cannot be read.
    """
    started = monotonic()
    mask_zyx = _load_mask(source, block)
    source_czyx, nbytes_read = None, 0
    core = block.core.slices(block.output_box.start)
    if mask_zyx is None or mask_zyx[core].any():
        domain = source.volume.info.domain
        inside = source_box(block.input_box, domain)
        inside_czyx = source.volume.read(inside).result()
        nbytes_read = inside_czyx.nbytes
        source_czyx = pad(inside_czyx, inside, block.input_box, domain, source.pad)
    return LoadedBlock(
        source_czyx=source_czyx,
        mask_zyx=mask_zyx,
        nbytes_read=nbytes_read,
        seconds=monotonic() - started,
    )


def _load_mask(source: InputSource, block: Block) -> BoolArray | None:
    """Return which voxels of the block's output box are wanted."""
    mask, grid = source.mask, source.mask_grid
    if mask is None or grid is None:
        return None
    inside = grid.source_box(block.output_box)
    values: npt.NDArray[Any] = np.zeros(inside.shape, dtype=np.bool_)
    if not inside.is_empty:
        values = mask.read(inside).result()[0]
    return grid.expand(values, inside, block.output_box)


class Pipeline:
    """Computes the blocks that are submitted, in order, and puts a record of each in a queue."""

    def __init__(
        self,
        *,
        plan: Plan,
        source: InputSource,
        inference: BlockInference,
        writer: Writer,
        num_channels: int,
        dtype: np.dtype[Any],
        records: Records,
        wake: threading.Event,
        may_write: Callable[[Lease], bool] = lambda lease: True,
    ) -> None:
        self._plan = plan
        self._source = source
        self._inference = inference
        self._writer = writer
        self._num_channels = num_channels
        self._dtype = dtype
        self._records = records
        self._wake = wake
        self._may_write = may_write
        self._num_steps = 0
        self._trimmed = monotonic()
        self._stepping = threading.Lock()
        self._is_abandoned = False
        self._loading: queue.SimpleQueue[tuple[Lease, Block, Future[LoadedBlock]] | None]
        self._loading = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(NUM_IO_THREADS, thread_name_prefix="read")
        self._settler = ThreadPoolExecutor(1, thread_name_prefix="settle")
        self._settled = 0.0
        self._writers = ThreadPoolExecutor(NUM_IO_THREADS, thread_name_prefix="write")
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def __enter__(self) -> "Pipeline":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, lease: Lease) -> None:
        """Begin to read a block; it is computed once all that were submitted before are."""
        block = self._plan[lease.block]
        self._loading.put((lease, block, self._readers.submit(self._load, block)))

    @property
    def num_steps(self) -> int:
        """Changes whenever a block comes forward: is read, infers a batch, is written."""
        return self._num_steps + self._inference.num_batches

    def drop_waiting(self) -> list[Lease]:
        """Forget the blocks that are read, or about to be, but not yet computed; return them."""
        dropped: list[Lease] = []
        while not self._loading.empty():
            try:
                item = self._loading.get_nowait()
            except queue.Empty:
                break  # the compute thread was quicker
            if item is not None:
                item[2].cancel()
                dropped.append(item[0])
        return dropped

    def abandon(self) -> None:
        """End no threads when closed: they compute what nobody waits for."""
        self._is_abandoned = True

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        if self._is_abandoned:
            return
        self._loading.put(None)
        self._thread.join()
        self._readers.shutdown()
        self._settler.shutdown()
        self._writers.shutdown()

    def _run(self) -> None:
        """Compute blocks until closed: the body of the compute thread."""
        while (item := self._loading.get()) is not None:
            self._guarded(self._compute, *item)

    def _guarded(self, step: Any, lease: Lease, *arguments: Any) -> None:
        """Run one step of a block; turn what it raises into a record, or into a crash.

        Nobody reads the futures of what settles and writes: through here nothing is raised in them.
        """
        try:
            step(lease, *arguments)
        except BLOCK_FAILURES as error:
            kind = error.kind if isinstance(error, BlockError) else ""
            name = type(error).__name__
            self._put(Failed(lease=lease, error=name, message=str(error), kind=kind))
        except SystemExit as error:
            # A network that calls sys.exit would end the run as if all were well.
            self._put(RuntimeError(f"something called sys.exit({error.code}) in a block"))
        except BaseException as error:
            self._put(error)

    def _put(self, record: Record | Dropped | BaseException) -> None:
        self._step()
        self._records.put(record)
        self._wake.set()

    def _step(self) -> None:
        """Count a step. Of two threads that add at once one could take the number back."""
        with self._stepping:
            self._num_steps += 1

    def _load(self, block: Block) -> LoadedBlock:
        """Read what a block needs."""
        loaded = load_block(self._source, block)
        if loaded.source_czyx is not None:
            loaded = replace(loaded, source_czyx=self._inference.hold(loaded.source_czyx))
        self._step()
        return loaded

    def _compute(self, lease: Lease, block: Block, loading: Future[LoadedBlock]) -> None:
        """Infer one block, and let it be written once it is there."""
        loaded = loading.result()
        started = monotonic()
        if loaded.source_czyx is None:
            shape = (self._num_channels, *block.core.shape)
            inferred = Inferred(core_czyx=np.zeros(shape, dtype=self._dtype), num_patches=0)
        else:
            inferred = self._inference.run(block, loaded.source_czyx, loaded.mask_zyx, self._dtype)
        self._settler.submit(
            self._guarded, self._settle, lease, block.core, inferred, loaded, started
        )
        if monotonic() - self._trimmed > TRIM_SECONDS:
            trim()
            self._trimmed = monotonic()

    def _settle(
        self, lease: Lease, core: Box, inferred: Inferred, loaded: LoadedBlock, started: float
    ) -> None:
        """Wait for the device, which works on one block after the other; hand over to a writer."""
        core_czyx = inferred.core()
        # An accelerator may have been asked for this block while it worked on the one before.
        started, self._settled = max(started, self._settled), monotonic()
        seconds = {"read": loaded.seconds, "infer": self._settled - started}
        self._writers.submit(
            self._guarded,
            self._write,
            lease,
            core,
            inferred,
            core_czyx,
            loaded.nbytes_read,
            seconds,
        )

    def _write(
        self,
        lease: Lease,
        core: Box,
        inferred: Inferred,
        core_czyx: npt.NDArray[Any],
        nbytes_read: int,
        seconds: dict[str, float],
    ) -> None:
        """Store a core; report it only when its bytes are durable."""
        if not self._may_write(lease):
            inferred.release()
            self._put(Dropped(lease=lease))
            return
        started = monotonic()
        written = self._writer.write(core, core_czyx)
        try:
            checksum = checksum_of(core_czyx)
        finally:
            written.result()
        self._put(
            Done(
                lease=lease,
                num_patches=inferred.num_patches,
                num_voxels=core.num_voxels,
                nbytes_read=nbytes_read,
                nbytes_written=core_czyx.nbytes,
                seconds=seconds | {"write": monotonic() - started},
                checksum=checksum,
                batch_size=inferred.batch_size,
            )
        )
        # Not after a failure: other chunks of what failed may still be on their way to the disk.
        inferred.release()
