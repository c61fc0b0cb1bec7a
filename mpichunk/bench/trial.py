"""What one rank measures for a benchmark: whole blocks, bare forwards, stages one by one.

Knows no other rank, and not what the numbers mean.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import TypeVar

from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.backends.stageclock import StageClock
from mpichunk.bench.figures import Pass
from mpichunk.block.inference import BlockInference, texture_batch
from mpichunk.block.pipeline import InputSource, Pipeline, load_block
from mpichunk.errors import UserError
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.plan.plan import Plan
from mpichunk.processmemory import weigh
from mpichunk.rundir.checksum import checksum_of
from mpichunk.schedule.messages import Done, Failed, Lease, Records
from mpichunk.volume import OutputSpec, Writer

T = TypeVar("T")

WARM_SECONDS = 10.0
"""A block that takes longer is not run twice to see its stages."""


@dataclass(slots=True, kw_only=True)
class BlockTrial:
    """One rank's network and volumes, to be measured."""

    plan: Plan
    source: InputSource
    writer: Writer
    output: OutputSpec
    """What `writer` writes."""

    engine: Engine
    request: EngineRequest
    make_inference: Callable[[Engine], BlockInference]
    """Puts an inference around an engine."""

    _inference: BlockInference | None = field(default=None, init=False)
    """That of the last pass, with the memory of its blocks."""

    def whole(self, blocks: Sequence[int]) -> Pass:
        """Run blocks through the pipeline of a run, as many at a time; bytes are written.

        Raises:
            UserError: a block fails.
        """
        found, peak_nbytes = weigh(lambda: self._whole(blocks))
        return replace(found, peak_nbytes=peak_nbytes)

    def _whole(self, blocks: Sequence[int]) -> Pass:
        """Run blocks through the pipeline."""
        inference, self._inference = self._inference or self.make_inference(self.engine), None
        num_batches = inference.num_batches
        records: Records = queue.SimpleQueue()
        waiting = iter(blocks)
        done: list[Done] = []
        may_write = threading.Event()
        may_write.set()
        with Pipeline(
            plan=self.plan,
            source=self.source,
            inference=inference,
            writer=self.writer,
            num_channels=self.output.num_channels,
            dtype=self.output.dtype,
            records=records,
            wake=threading.Event(),
            may_write=lambda lease: may_write.is_set(),
        ) as pipeline:
            started = perf_counter()
            try:
                for block in islice(waiting, BLOCKS_IN_FLIGHT):
                    pipeline.submit(Lease(block=block, attempt=1))
                while len(done) < len(blocks):
                    done.append(_done(records.get()))
                    for block in islice(waiting, 1):
                        pipeline.submit(Lease(block=block, attempt=1))
            except BaseException as error:
                pipeline.drop_waiting()
                may_write.clear()
                if not isinstance(error, Exception):
                    # Whoever interrupts does not wait for the block that is computed just now.
                    pipeline.abandon()
                raise
            seconds = perf_counter() - started
        # In a run, memory is fresh for the first blocks only. After a pass that was interrupted it
        # may still be in use.
        self._inference = inference
        return Pass(
            seconds=seconds,
            num_voxels=sum(item.num_voxels for item in done),
            num_patches=sum(item.num_patches for item in done),
            num_batches=inference.num_batches - num_batches,
            nbytes_read=sum(item.nbytes_read for item in done),
            nbytes_written=sum(item.nbytes_written for item in done),
            num_blocks=len(done),
            read_seconds=sum(item.seconds["read"] for item in done),
            write_seconds=sum(item.seconds["write"] for item in done),
        )

    def bare(self, num_batches: int) -> float:
        """Return the seconds of so many forwards of one batch that is on the device already."""
        return _in_thread(lambda: self._forwards(num_batches))

    def stages(self, index: int) -> dict[str, float]:
        """Return the seconds of each stage of one block, none beside another.

        The memory of the passes before is given back: this takes some of its own.
        """
        self._inference = None
        return _in_thread(lambda: self._stages(index))

    def _stages(self, index: int) -> dict[str, float]:
        clock = StageClock(self.engine)
        inference = self.make_inference(clock)
        self._stage(index, clock, inference)
        if sum(clock.seconds.values()) < WARM_SECONDS:
            # In a run, memory is fresh for the first blocks only.
            clock.seconds.update(dict.fromkeys(clock.seconds, 0.0))
            self._stage(index, clock, inference)
        return clock.seconds

    def _stage(self, index: int, clock: StageClock, inference: BlockInference) -> None:
        """Take one block from its volume to the scratch output, by the clock."""
        block = self.plan[index]
        loaded = load_block(self.source, block)
        clock.seconds["read"] = loaded.seconds
        if loaded.source_czyx is None:
            return
        # As in a run, where a reader thread does it.
        started = perf_counter()
        source_czyx = inference.hold(loaded.source_czyx)
        clock.seconds["read"] += perf_counter() - started
        before = sum(clock.seconds.values())
        started = perf_counter()
        inferred = inference.run(block, source_czyx, loaded.mask_zyx, self.output.dtype)
        core_czyx = inferred.core()
        seconds = perf_counter() - started
        clock.seconds["host"] = seconds - (sum(clock.seconds.values()) - before)
        started = perf_counter()
        written = self.writer.write(block.core, core_czyx)
        checksum_of(core_czyx)
        written.result()
        clock.seconds["write"] = perf_counter() - started
        inferred.release()

    def _forwards(self, num_batches: int) -> float:
        arrays = self.engine.arrays
        batch_nczyx = texture_batch(self.engine, self.request)
        self.engine.infer(batch_nczyx)
        arrays.wait()
        started = perf_counter()
        for _ in range(num_batches):
            self.engine.infer(batch_nczyx)
        arrays.wait()
        return perf_counter() - started


def _in_thread(measure: Callable[[], T]) -> T:
    """Return the result of what runs in a thread of its own, as the pipeline's does.

    An interrupt does not wait for it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(measure())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="measure", daemon=True).start()
    return outcome.result()


def _done(record: object) -> Done:
    """Return the record of a block that is done, or raise why it is not."""
    if isinstance(record, BaseException):
        raise record
    if isinstance(record, Failed):
        raise UserError(f"block {record.lease.block} failed ({record.error}): {record.message}")
    assert isinstance(record, Done)
    return record
