"""A forward on an NVIDIA device as a CUDA graph: recorded once per batch shape, then replayed.

A replay is one launch from the CPU, however many kernels there are. Knows no networks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mpichunk.backends.pytorch.kernels import is_out_of_memory
from mpichunk.backends.pytorch.weights import first_line
from mpichunk.errors import ModelError

NUM_WARM_UPS = 3
"""Forwards before the recording: libraries allocate, choose and compile in the first ones."""


class CapturedForward:
    """Holds the recording of one batch shape, that of the last call."""

    def __init__(self, forward: Callable[[Tensor], Tensor], layout: torch.memory_format) -> None:
        """Take what is to be recorded.

        Args:
            forward: all of it, from the batch to what is returned; must not wait for the device.
            layout: of the batch.
        """
        self._forward = forward
        self._layout = layout
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch_nczyx: Tensor | None = None
        self._output_nczyx: Tensor | None = None
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Device memory that the recording keeps: no replay allocates any.

        Its copy of the batch, what it returns, and all between; 0 before the first call.
        """
        return self._nbytes

    def __call__(self, batch_nczyx: Tensor) -> Tensor:
        """Replay on the current stream, without waiting; the next call overwrites the result.

        Raises:
            ModelError: it cannot be recorded.
        """
        if self._batch_nczyx is None or self._batch_nczyx.shape != batch_nczyx.shape:
            self._record(batch_nczyx)
        assert self._graph is not None and self._batch_nczyx is not None
        assert self._output_nczyx is not None
        with torch.inference_mode():
            self._batch_nczyx.copy_(batch_nczyx)
        self._graph.replay()
        return self._output_nczyx

    def _record(self, batch_nczyx: Tensor) -> None:
        """Record batches of this shape, and forget those of another one."""
        # First of all: batches get smaller because there is no memory left.
        self._graph = self._batch_nczyx = self._output_nczyx = None
        self._nbytes = 0
        device = batch_nczyx.device
        with torch.cuda.device(device), torch.inference_mode():
            static_nczyx = torch.empty_like(batch_nczyx, memory_format=self._layout)
            static_nczyx.copy_(batch_nczyx)
            self._warm_up(static_nczyx)
            graph = torch.cuda.CUDAGraph()
            # What the warm-ups have left; the recording has a pool of its own, and reserves anew.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            try:
                # Other threads, which read and write, may allocate meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    output_nczyx = self._forward(static_nczyx)
            except Exception as error:
                raise _cause(error) from None
            pool_nbytes = max(0, torch.cuda.memory_reserved() - before)
            self._nbytes = pool_nbytes + static_nczyx.nbytes
        self._graph, self._batch_nczyx, self._output_nczyx = graph, static_nczyx, output_nczyx

    def _warm_up(self, batch_nczyx: Tensor) -> None:
        """Run it some times beside the current stream, as torch asks for."""
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                self._forward(batch_nczyx)
        current.wait_stream(side)


def _cause(error: Exception) -> Exception:
    """Return what to raise for a recording that failed: the lack of memory itself, or words."""
    cause: BaseException | None = error
    while cause is not None:
        # The end of a recording that failed is one more error, which hides the first.
        if isinstance(cause, Exception) and is_out_of_memory(cause):
            return cause
        cause = cause.__context__
    first: BaseException = error
    while first.__context__ is not None:
        first = first.__context__
    return ModelError(
        f"the network runs, but not as a CUDA graph: {type(first).__name__}: {first_line(first)}; "
        "it may copy from or to the host, or branch on values. Remove compute.cuda_graphs",
        key="compute.cuda_graphs",
    )
