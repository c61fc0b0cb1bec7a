"""A read or a write under way, whose failure names the volume, the box and the cause.

Knows TensorStore only as something with `force`, `done` and `result`.
"""

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mpichunk.errors import BlockError

T = TypeVar("T")

_NOTES = re.compile(r"\s*\[(tensorstore_spec|source locations)=.*", re.DOTALL)


class BlockFuture(Generic[T]):
    """The result of reading or writing one box.

    The operation starts at once, not when its result is asked for: TensorStore's own futures are
    lazy, and nothing would be read ahead.
    """

    def __init__(self, future: Any, *, task: str, finish: Callable[[Any], T]) -> None:
        self._future = future
        self._task = task
        self._finish = finish
        future.force()

    def done(self) -> bool:
        """Return whether `result` would return or raise without waiting."""
        return bool(self._future.done())

    def result(self, timeout: float | None = None) -> T:
        """Wait for the operation and return what it gives.

        Raises:
            BlockError: it failed; the message names volume, box and cause.
            TimeoutError: it is not done after `timeout` seconds.
        """
        try:
            return self._finish(self._future.result(timeout=timeout))
        except Exception as error:
            if isinstance(error, TimeoutError) and not self._future.done():
                raise
            raise BlockError(f"could not {self._task}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return an error's text without the specs and source lines that TensorStore appends."""
    return _NOTES.sub("", str(error)).strip() or type(error).__name__
