"""What tests read back from a journal."""

from pathlib import Path

import numpy as np

from mpichunk.rundir.history import History
from mpichunk.rundir.journal import NAME, scan


def read_states(run_dir: Path, num_blocks: int) -> np.ndarray:
    """Return the state of each block."""
    states = np.zeros(num_blocks, np.uint8)
    scan(run_dir / NAME, states)
    return states


def read_history(path: Path) -> History:
    """Return what a whole journal tells besides them."""
    history = History()
    history.follow(path)
    return history
