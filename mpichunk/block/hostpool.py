"""Host memory for finished cores, used again once it is written.

Fresh memory is slow: a CPU must clear each page, an accelerator's driver must pin it. Knows no
blocks. Any thread may take and give back.
"""

from collections.abc import Callable
from math import prod
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from mpichunk.errors import BlockError
from mpichunk.words import size

Bytes = npt.NDArray[np.uint8]


class HostPool:
    """Keeps what was given back for the next that fits.

    Args:
        allocate: Returns that many bytes of new memory.
    """

    def __init__(self, allocate: Callable[[int], Bytes]) -> None:
        self._allocate = allocate
        self._free: list[Bytes] = []
        # By identity; what nobody holds any more is forgotten.
        self._lent: WeakValueDictionary[int, Bytes] = WeakValueDictionary()
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array, its values undefined.

        Raises:
            BlockError: the host has no memory for it.
        """
        nbytes = prod(shape) * dtype.itemsize
        with self._lock:
            fitting = [index for index, memory in enumerate(self._free) if memory.nbytes >= nbytes]
            if fitting:
                memory = self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
            else:
                # Blocks at the faces of the ROI come first: what is too small will not be needed.
                self._free.clear()
                memory = self._new(nbytes)
            self._lent[id(memory)] = memory
        return memory[:nbytes].view(dtype).reshape(shape)

    def _new(self, nbytes: int) -> Bytes:
        """Return new memory; pinning it may fail as if it were the device's that is short."""
        try:
            return self._allocate(nbytes)
        except (MemoryError, RuntimeError) as error:
            raise BlockError(
                f"this host has no memory for {size(nbytes)} of a block: "
                f"{(str(error) or type(error).__name__).splitlines()[0]}; start fewer ranks per "
                "node, or use a smaller block.shape"
            ) from error

    def give_back(self, array: npt.NDArray[Any]) -> None:
        """Let memory that `take` returned be used again; nothing may read it any more.

        Other memory is left alone.
        """
        memory = array
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        with self._lock:
            if self._lent.pop(id(memory), None) is memory:
                self._free.append(memory)
