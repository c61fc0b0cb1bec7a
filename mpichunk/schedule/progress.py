"""How far the run is: the counters that ranks add up, rates, and the time that is left.

Numbers only. Knows no MPI (counters are a vector of float64, and somebody else sums it over the
ranks), and not how they are shown.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mpichunk.schedule.messages import STAGES, Done, Record

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


class Counters:
    """What one rank has done since the run started; `vector` is what the ranks sum.

    Args:
        host_peak: Returns how much memory of its host the rank has taken at most.
        device_peak: As much of its accelerator; None on a CPU, or if nobody says.
    """

    def __init__(
        self,
        *,
        host_peak: Callable[[], int] = lambda: 0,
        device_peak: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._host_peak = host_peak
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
        """Note how much memory the rank has taken at most."""
        self["peak_bytes"] = self._host_peak()
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


class JournaledDisplay:
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


class Throughput:
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
