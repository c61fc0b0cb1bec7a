"""Temporary files that a killed process has left in an output volume.

Knows how TensorStore names them; opens no volume.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

# TensorStore writes a key to `key_0123456789abcdef.__lock`, then renames. It never comes back to
# such a file: the next try has a name of its own.
_TEMPORARY = re.compile(r".+_[0-9a-f]{1,16}\.__lock")


def remove_leftovers(folder: Path, *, before: float) -> int:
    """Remove the temporary files below a folder; return how many there were.

    Args:
        folder: where an output volume lies.
        before: seconds since the epoch, of the file system's clock; later files are left alone,
            since somebody who writes another part of the volume may be about to rename them.
    """
    num_removed = 0
    for path in _temporary_files(folder):
        try:
            if path.stat().st_mtime < before:
                path.unlink()
                num_removed += 1
        except FileNotFoundError:
            continue  # renamed meanwhile by its owner
    return num_removed


def _temporary_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are named like temporary ones."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if _TEMPORARY.fullmatch(name))
