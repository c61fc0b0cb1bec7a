"""A temporary output like the real one, which leaves nothing behind unless the process is killed.

Knows no blocks. The only place where mpichunk removes files: those that it has just made.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpichunk.errors import VolumeError
from mpichunk.volume import OutputSpec, create_output, local_folder, moved_to

NUM_LOOKS, LOOK_SECONDS = 3, 0.05
"""How often, and how long after one another, a removed folder is looked for again."""


def scratch_parent(spec: OutputSpec, wanted: Path | None) -> Path:
    """Return the folder that a scratch output should lie in.

    That of the real output, or the nearest there is above it, so that the same disk is measured; on
    this host's temporary directory where the real one is no file.

    Raises:
        VolumeError: the folder that was `wanted` is not there.
    """
    if wanted is not None:
        if not wanted.is_dir():
            raise VolumeError(f"{wanted} is not a folder; --scratch requires an existing one")
        return wanted
    folder = local_folder(spec)
    if folder is None:
        return Path(tempfile.gettempdir())
    return next(parent for parent in folder.parents if parent.is_dir())


@contextmanager
def scratch_output(spec: OutputSpec, parent: Path) -> Iterator[OutputSpec]:
    """Create an output like `spec` in a new folder below `parent`; remove it at the end.

    Raises:
        VolumeError: it cannot be created.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".mpichunk-bench-", dir=parent))
    except OSError as error:
        raise VolumeError(
            f"{parent} cannot be written: {error.strerror}; name another folder with --scratch",
            key="output.volume",
        ) from error
    try:
        scratch = moved_to(spec, folder / "output")
        create_output(scratch)
        yield scratch
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, also what a write that was under way has put there meanwhile."""
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(NUM_LOOKS):
        time.sleep(LOOK_SECONDS)
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
