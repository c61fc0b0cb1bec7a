"""Volumes, read and written: TensorStore, h5py and cloud-volume, and nothing of them outside.

Arrays are (c, z, y, x) and coordinates absolute zyx whatever the format; knows no blocks.
"""

from mpichunk.volume.layout import OutputSpec
from mpichunk.volume.reader import Reader, open_input
from mpichunk.volume.writer import (
    Writer,
    check_output,
    create_output,
    holds_chunks,
    local_folder,
    moved_to,
    open_output,
)

__all__ = [
    "OutputSpec",
    "Reader",
    "Writer",
    "check_output",
    "create_output",
    "holds_chunks",
    "local_folder",
    "moved_to",
    "open_input",
    "open_output",
]
