"""How rank 0 shows the progress of a run: a line that is written over, or log lines; a summary.

Draws on the terminal, and alone knows the library for that. Counts nothing.
"""

import logging
from collections.abc import Callable
from typing import TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mpichunk.schedule.messages import STAGES
from mpichunk.schedule.progress import COUNTERS, Display, Throughput, Totals, totals
from mpichunk.words import count, duration, size

log = logging.getLogger(__name__)

LINE_SECONDS = 60.0
"""At most so long after a log line the next one comes."""


class LineDisplay:
    """A log line now and then: often at first, later about every fifth of the time gone by."""

    def __init__(
        self,
        throughput: Throughput,
        *,
        size: int,
        emit: Callable[[str], None],
    ) -> None:
        self._throughput = throughput
        self._size = size
        self._emit = emit
        self._next = throughput.start

    def update(self, summed: Totals, now: float) -> None:
        """Log a line if it is time for one."""
        self._throughput.add(summed, now)
        if now >= self._next:
            self._next = now + min(LINE_SECONDS, (now - self._throughput.start) / 5)
            self._emit(_line(self._throughput, summed, self._size))

    def close(self) -> None:
        """Do nothing."""


class BarDisplay:
    """One line on a terminal that is written over again and again."""

    def __init__(self, throughput: Throughput, *, size: int, stream: TextIO) -> None:
        self._throughput = throughput
        self._size = size
        console = Console(file=stream)
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("blocks{task.description}")
        # No refreshing thread: the sums are what changes. The cursor stays visible, since a rank
        # that is killed could not bring it back.
        self._bar = Progress(*columns, console=console, auto_refresh=False)
        self._bar.start()
        console.show_cursor(True)
        self._task = self._bar.add_task(
            "", total=throughput.num_blocks, completed=throughput.num_before
        )

    def update(self, summed: Totals, now: float) -> None:
        """Redraw the line."""
        self._throughput.add(summed, now)
        rest = _rest(self._throughput, summed, self._size)
        self._bar.update(
            self._task, completed=self._throughput.num_done, description=rest, refresh=True
        )

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.stop()


def get_display(
    *, size: int, num_blocks: int, num_before: int, start: float, stream: TextIO
) -> Display:
    """Return what shows the progress: a bar on a terminal, else lines of the log."""
    throughput = Throughput(num_blocks=num_blocks, num_before=num_before, start=start)
    if stream.isatty():
        return BarDisplay(throughput, size=size, stream=stream)
    return LineDisplay(throughput, size=size, emit=log.info)


def summarise(
    vectors: npt.NDArray[np.float64],
    *,
    num_blocks: int,
    num_before: int,
    seconds: float,
    num_done: int | None = None,
) -> str:
    """Return the last words of a run.

    Args:
        vectors: (ranks, counters) what each rank has counted.
        num_blocks: Blocks of the plan.
        num_before: Blocks that were done before this run started.
        seconds: Wall time from the first lease to the end.
        num_done: Blocks done since the start, where lost ranks can no longer tell.
    """
    summed = totals(vectors.sum(axis=0))
    num_done = int(summed["blocks"]) if num_done is None else num_done
    before = f", {num_before} before" if num_before else ""
    failures = f"; attempts that failed: {int(summed['failures'])}" if summed["failures"] else ""
    rate = summed["voxels"] / seconds / 1e6 if seconds else 0.0
    lines = [
        f"blocks   {num_done} done{before}, of {num_blocks}{failures}",
        f"patches  {int(summed['patches'])}",
        f"output   {summed['voxels'] / 1e6:.1f} Mvox in {duration(seconds)}: {rate:.2f} Mvox/s; "
        f"{size(int(summed['bytes_read']))} read, {size(int(summed['bytes_written']))} written",
        f"{'seconds of a rank in':<22}{'min':>9}{'median':>9}{'max':>9}   over "
        f"{count(len(vectors), 'rank')}",
    ]
    for stage in STAGES:
        lines.append(_spread(stage, vectors[:, COUNTERS.index(stage)]))
    infer = vectors[:, COUNTERS.index("infer")]
    lines.append(_spread("busy inferring, %", infer / seconds * 100 if seconds else infer))
    lines.append(_spread("peak memory, MiB", vectors[:, COUNTERS.index("peak_bytes")] / 2**20))
    on_device = vectors[:, COUNTERS.index("device_peak_bytes")]
    if on_device.any():
        lines.append(_spread("peak on device, MiB", on_device / 2**20))
    return "\n".join(lines)


def _line(throughput: Throughput, summed: Totals, size: int) -> str:
    """Return the progress as one line."""
    done = f"{throughput.num_done:,} of {count(throughput.num_blocks, 'block')}"
    return done + _rest(throughput, summed, size)


def _rest(throughput: Throughput, summed: Totals, size: int) -> str:
    """Return rate, time left and ranks at work."""
    left = throughput.seconds_left
    parts = [
        f"{throughput.voxel_rate / 1e6:.2f} Mvox/s",
        f"{duration(left)} left" if left is not None else "time left unknown",
        f"{int(summed['busy'])} of {count(size, 'rank')} busy",
    ]
    if summed["failures"]:
        parts.append(f"{count(int(summed['failures']), 'attempt')} failed")
    return ", " + ", ".join(parts)


def _spread(name: str, values: npt.NDArray[np.float64]) -> str:
    """Return minimum, median and maximum over ranks as one row."""
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"  {name:<20}{low:>9.1f}{middle:>9.1f}{high:>9.1f}"
