"""A read or a write under way, whose failure names the volume, the box and the cause.

Knows TensorStore only as something with `force`, `done` and `result`.
"""

import errno
import os
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mpichunk.errors import BlockError, DiskFullError

T = TypeVar("T")

# The words of ENOSPC and EDQUOT: TensorStore tells them in its message only.
_DISK_FULL = re.compile("|".join(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)))

_NOTES = re.compile(r"\s*\[(os_error_code|tensorstore_spec|source locations)=.*", re.DOTALL)


class BlockFuture(Generic[T]):
    """The result of reading or writing one box.

    The operation starts at once, not when its result is asked for: TensorStore's own futures are
    lazy, and nothing would be read ahead.

    Args:
        future: TensorStore's.
        task: What is done, for the message when it fails: `read BOX of VOLUME`.
        finish: Makes the result of TensorStore's.
        disk: Where it is written to, for the message when that is full; None for a read.
    """

    def __init__(
        self, future: Any, *, task: str, finish: Callable[[Any], T], disk: str | None = None
    ) -> None:
        self._future = future
        self._task = task
        self._disk = disk
        self._finish = finish
        future.force()

    def done(self) -> bool:
        """Return whether `result` would return or raise without waiting."""
        return bool(self._future.done())

    def result(self, timeout: float | None = None) -> T:
        """Wait for the operation and return what it gives.

        Raises:
            BlockError: it failed; the message names volume, box and cause.
            DiskFullError: there is no space or no quota left; the same message for every box.
            TimeoutError: it is not done after `timeout` seconds.
        """
        try:
            return self._finish(self._future.result(timeout=timeout))
        except Exception as error:
            if isinstance(error, TimeoutError) and not self._future.done():
                raise
            full = _DISK_FULL.search(str(error))
            if full is not None and self._disk is not None:
                raise DiskFullError(
                    f"the disk of {self._disk} is full ({full[0]}): make room, then run it again"
                ) from error
            raise BlockError(f"could not {self._task}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return an error's text without the specs and source lines that TensorStore appends."""
    return _NOTES.sub("", str(error)).strip() or type(error).__name__
