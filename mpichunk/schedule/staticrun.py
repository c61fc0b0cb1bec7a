"""How the blocks still to do are cut into one contiguous run per rank: static scheduling.

Numbers only. Knows no ranks and no states.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

WINDOW = 4096
"""Blocks that are looked at in one piece: a list of all would take gigabytes."""


def static_run(num_todo: int, size: int, rank: int) -> range:
    """Return the places, among the blocks still to do, of the run of `rank`.

    The runs of all ranks are contiguous, in order, and their lengths differ by at most one.
    """
    length, num_longer = divmod(num_todo, size)
    start = rank * length + min(rank, num_longer)
    return range(start, start + length + (rank < num_longer))


def static_blocks(todo: npt.NDArray[np.bool_], size: int, rank: int) -> Iterator[int]:
    """Yield the blocks of the static run of `rank`; `todo` is (num_blocks,)."""
    run = static_run(int(np.count_nonzero(todo)), size, rank)
    if not run:
        return
    find = _place_finder(todo)
    start, stop = find(run[0]), find(run[-1]) + 1
    for first in range(start, stop, WINDOW):
        yield from (np.flatnonzero(todo[first : min(first + WINDOW, stop)]) + first).tolist()


def static_starts(todo: npt.NDArray[np.bool_], size: int) -> list[int]:
    """Return the first block of the run of each rank that has one; `todo` is (num_blocks,)."""
    num_todo = int(np.count_nonzero(todo))
    find = _place_finder(todo)
    runs = (static_run(num_todo, size, rank) for rank in range(size))
    return [find(run.start) for run in runs if run]


def _place_finder(todo: npt.NDArray[np.bool_]) -> Callable[[int], int]:
    """Return what finds the block of a place among those to do, without a list of them all."""
    starts = np.arange(0, len(todo), WINDOW)
    num_before = np.cumsum(np.add.reduceat(todo, starts, dtype=np.int64))

    def find(place: int) -> int:
        window = int(np.searchsorted(num_before, place, side="right"))
        in_window = place - (int(num_before[window - 1]) if window else 0)
        start = window * WINDOW
        return start + int(np.flatnonzero(todo[start : start + WINDOW])[in_window])

    return find
