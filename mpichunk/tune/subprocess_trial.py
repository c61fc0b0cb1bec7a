"""A network as one variant runs it, in a process of its own: what a library looks at only once.

    this process    load       outputs       forwards(n)    (its own turn)    forwards(n)    close
                      |           |               |                                |
    the other one  loads ... computes ...  computes ...         waits       computes ...     ends

Only one of the two is ever busy, so that neither is measured while the other computes.
"""

import logging
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import DEVICE_FAILURES, DeviceError
from mpichunk.job.startup import Job
from mpichunk.processmemory import settle_allocator
from mpichunk.rundir.logs import log_to_terminal
from mpichunk.tune.figures import Outputs
from mpichunk.tune.trial import VariantTrial, reason
from mpichunk.tune.variants import Variant

END_SECONDS = 10.0
"""How long the other process may take to end, once nobody asks it any more."""


class SubprocessTrial:
    """As `VariantTrial`, with the same cores and threads; it ends with `close`."""

    def __init__(self, job: Job, variant: Variant, patches_nczyx: npt.NDArray[np.float32]) -> None:
        """Start the process, and load the network there.

        Raises:
            DeviceError: the process has ended, or what failed in it.
        """
        self.variant = variant
        # Not a fork: it would hold the libraries that have looked already.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        # The other process has it: here it would hide the end of that.
        theirs.close()
        try:
            self._ask("load", job, variant, patches_nczyx)
        except BaseException:
            self.close()
            raise

    def forwards(self, count: int) -> float:
        """Return the seconds of so many forwards."""
        return float(self._ask("forwards", count))

    def outputs(self) -> Outputs:
        """Return what would be blended for each of the patches."""
        found: Outputs = self._ask("outputs")
        return found

    def forward_nbytes(self) -> int | None:
        """Return the memory of a forward, beyond input, output and weights."""
        found: int | None = self._ask("forward_nbytes")
        return found

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Return what a method returns there."""
        try:
            self._connection.send((name, arguments))
            is_done, found = self._connection.recv()
        except KeyboardInterrupt:
            # Nobody waits for what it computes.
            self._process.kill()
            raise
        except (EOFError, OSError) as error:
            raise DeviceError(f"its own process {self._how_it_ended()}") from error
        if not is_done:
            raise DeviceError(found)
        return found

    def _how_it_ended(self) -> str:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"was ended by signal {-code}, which happens for lack of memory, too"
        return f"ended by itself, with exit code {code}"


def _serve(connection: Connection) -> None:
    """Load a network, and answer until the other end is closed."""
    settle_allocator()
    log_to_terminal(0)
    logging.disable(logging.INFO)
    trial: VariantTrial | None = None
    # Nobody asks any more, or Ctrl-C, which reaches both.
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            name, arguments = connection.recv()
            answer: tuple[bool, Any]
            try:
                if name == "load":
                    trial, found = VariantTrial.load(*arguments), None
                else:
                    found = getattr(trial, name)(*arguments)
                answer = True, found
            except DEVICE_FAILURES as error:
                answer = False, reason(error)
            connection.send(answer)
