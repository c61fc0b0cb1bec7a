"""How far the run is: the counters that ranks add up, and how rank 0 shows the sums.

Knows no MPI: counters are a vector of float64, and somebody else sums it over the ranks.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mpichunk.processmemory import peak_nbytes
from mpichunk.schedule.messages import STAGES, Done, Record
from mpichunk.words import count, duration, size

COUNTERS = (
    "blocks",  # done by this rank since the run started
    "failures",  # attempts that failed
    "patches",
    "voxels",
    "bytes_read",
    "bytes_written",
    "busy",  # 1 while the rank holds a block
    "held",  # blocks that the rank holds
    "ended",  # 1 once the rank has nothing more to do
    "peak_bytes",  # of the host's memory
    "device_peak_bytes",  # of the accelerator's; 0 on a CPU, or if nobody says
    "steps",  # changes whenever a block comes forward
    *STAGES,  # seconds
)
Totals = Mapping[str, float]

log = logging.getLogger(__name__)


class Counters:
    """What one rank has done since the run started; `vector` is what the ranks sum.

    Args:
        device_peak: Returns how much memory of its accelerator the rank has taken at most.
    """

    def __init__(self, device_peak: Callable[[], int | None] = lambda: None) -> None:
        self._device_peak = device_peak
        # Plain floats: counting is part of what every block costs.
        self._values = dict.fromkeys(COUNTERS, 0.0)

    @property
    def vector(self) -> npt.NDArray[np.float64]:
        """(counters,) in the order of `COUNTERS`."""
        return np.array(list(self._values.values()))

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __setitem__(self, name: str, value: float) -> None:
        assert name in self._values, name
        self._values[name] = float(value)

    def measure_memory(self) -> None:
        """Note how much memory the process has taken at most."""
        self["peak_bytes"] = peak_nbytes()
        self["device_peak_bytes"] = self._device_peak() or 0

    def count(self, record: Record) -> None:
        """Add a finished or failed block."""
        values = self._values
        if not isinstance(record, Done):
            values["failures"] += 1
            return
        values["blocks"] += 1
        values["patches"] += record.num_patches
        values["voxels"] += record.num_voxels
        values["bytes_read"] += record.nbytes_read
        values["bytes_written"] += record.nbytes_written
        for stage in STAGES:
            values[stage] += record.seconds.get(stage, 0.0)


def totals(vector: npt.NDArray[np.float64] | tuple[float, ...]) -> dict[str, float]:
    """Return a vector of counters by their names."""
    return dict(zip(COUNTERS, map(float, vector), strict=True))


class Display(Protocol):
    """What is done with the sums over all ranks."""

    def update(self, summed: Totals, now: float) -> None:
        """Show the newest sums; `now` in seconds of a monotonic clock."""

    def close(self) -> None:
        """Leave the terminal in order."""


class Heartbeat:
    """Passes the sums on, and notes now and then that the run is alive.

    Args:
        display: What shows the sums.
        note: Takes facts about the run, JSON values, e.g. into the journal.
        interval: Seconds between notes.
    """

    def __init__(
        self, display: Display, note: Callable[[Mapping[str, int]], None], *, interval: float
    ) -> None:
        self._display = display
        self._note = note
        self._interval = interval
        self._next = float("-inf")
        self._has_begun = False

    def update(self, summed: Totals, now: float) -> None:
        """Show the newest sums, and note them if it is time to, or when the first block is held."""
        self._display.update(summed, now)
        begins = bool(summed["held"]) and not self._has_begun
        if now >= self._next or begins:
            self._has_begun = bool(summed["held"])
            self._next = now + self._interval
            self._note({"num_held": int(summed["held"])})

    def close(self) -> None:
        """Leave the terminal in order."""
        self._display.close()


class Pace:
    """Rates over the last minute or so, and the time that is left.

    Args:
        num_blocks: Blocks of the plan.
        num_before: Blocks that were done before this run started.
        start: `now` when it started.
    """

    def __init__(self, *, num_blocks: int, num_before: int, start: float) -> None:
        self.num_blocks = num_blocks
        self.num_before = num_before
        self.start = start
        self._samples: deque[tuple[float, float, float]] = deque([(start, 0.0, 0.0)], maxlen=30)

    def add(self, summed: Totals, now: float) -> None:
        """Take in a new sample."""
        self._samples.append((now, summed["blocks"], summed["voxels"]))

    @property
    def num_done(self) -> int:
        """Blocks done, those of earlier runs included."""
        return self.num_before + int(self._samples[-1][1])

    @property
    def voxel_rate(self) -> float:
        """Voxels per second over the samples."""
        (t0, _, v0), (t1, _, v1) = self._samples[0], self._samples[-1]
        return (v1 - v0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all blocks are done at the mean rate since the start, if it is known."""
        now, num_now, _ = self._samples[-1]
        if num_now == 0 or now <= self.start:
            return None
        return (self.num_blocks - self.num_done) * (now - self.start) / num_now


class LineDisplay:
    """A log line now and then: often at first, later about every fifth of the time gone by."""

    def __init__(
        self, pace: Pace, *, size: int, emit: Callable[[str], None], most_seconds: float = 60.0
    ) -> None:
        self._pace = pace
        self._size = size
        self._emit = emit
        self._most_seconds = most_seconds
        self._next = pace.start

    def update(self, summed: Totals, now: float) -> None:
        """Log a line if it is time for one."""
        self._pace.add(summed, now)
        if now >= self._next:
            self._next = now + min(self._most_seconds, (now - self._pace.start) / 5)
            self._emit(_line(self._pace, summed, self._size))

    def close(self) -> None:
        """Do nothing."""


class BarDisplay:
    """One line on a terminal that is written over again and again."""

    def __init__(self, pace: Pace, *, size: int, stream: TextIO) -> None:
        self._pace = pace
        self._size = size
        console = Console(file=stream)
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("blocks{task.description}")
        # No refreshing thread: the sums are what changes. The cursor stays visible, since a rank
        # that is killed could not bring it back.
        self._bar = Progress(*columns, console=console, auto_refresh=False)
        self._bar.start()
        console.show_cursor(True)
        self._task = self._bar.add_task("", total=pace.num_blocks, completed=pace.num_before)

    def update(self, summed: Totals, now: float) -> None:
        """Redraw the line."""
        self._pace.add(summed, now)
        rest = _rest(self._pace, summed, self._size)
        self._bar.update(self._task, completed=self._pace.num_done, description=rest, refresh=True)

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.stop()


def get_display(
    *, size: int, num_blocks: int, num_before: int, start: float, stream: TextIO
) -> Display:
    """Return what shows the progress: a bar on a terminal, else lines of the log."""
    pace = Pace(num_blocks=num_blocks, num_before=num_before, start=start)
    if stream.isatty():
        return BarDisplay(pace, size=size, stream=stream)
    return LineDisplay(pace, size=size, emit=log.info)


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


def _line(pace: Pace, summed: Totals, size: int) -> str:
    """Return the progress as one line."""
    return f"{pace.num_done:,} of {count(pace.num_blocks, 'block')}{_rest(pace, summed, size)}"


def _rest(pace: Pace, summed: Totals, size: int) -> str:
    """Return rate, time left and ranks at work."""
    left = pace.seconds_left
    parts = [
        f"{pace.voxel_rate / 1e6:.2f} Mvox/s",
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
