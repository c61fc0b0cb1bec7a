"""Whether a block may be written: a rank that is late, or not the only one, asks first.

Between the writer threads of the pipeline, which wait, and the main thread, which sends and
receives. Knows neither what is written nor who answers.

    writer thread    may_write(lease) ---.                    .--> True or False
                                         v                    |
    main thread     questions() -> AskToWrite    WriteVerdict -> answer(lease)
"""

import threading
import time
from collections.abc import Callable, Iterable

from mpichunk.schedule.messages import Lease


class Permits:
    """The leases of one rank, each from its beginning to its record.

    Args:
        wake: Set when there is a question.
        clock: Monotonic seconds.
    """

    def __init__(self, wake: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._wake = wake
        self._clock = clock
        self._changed = threading.Condition()
        self._since: dict[Lease, float] = {}
        self._writing: set[Lease] = set()
        self._contested: set[Lease] = set()
        self._asked: list[Lease] = []
        self._open: set[Lease] = set()
        self._answers: dict[Lease, bool] = {}
        self._is_closed = False

        self.lease_seconds = float("inf")
        """A lease is late after so long."""

    def begin(self, lease: Lease) -> None:
        """Note that a lease begins."""
        with self._changed:
            self._since[lease] = self._clock()
            self._answers.pop(lease, None)

    def end(self, lease: Lease) -> None:
        """Note that there is a record of a lease."""
        with self._changed:
            self._since.pop(lease, None)
            self._contested.discard(lease)
            self._writing.discard(lease)

    def contest(self, lease: Lease) -> bool:
        """Make a lease ask before it is written; return False when that is too late."""
        with self._changed:
            if lease not in self._since or lease in self._writing:
                return False
            self._contested.add(lease)
            return True

    def writing(self) -> set[Lease]:
        """Return what is being written, or was, and has no record taken in yet."""
        with self._changed:
            return set(self._writing)

    def may_write(self, lease: Lease) -> bool:
        """Return whether a block is to be written; waits for an answer when it must ask."""
        with self._changed:
            now = self._clock()
            is_late = now - self._since.get(lease, now) > self.lease_seconds
            must_ask = is_late or lease.is_backup or lease in self._contested
            if must_ask and not self._is_closed:
                self._asked.append(lease)
                self._open.add(lease)
                self._wake.set()
                self._changed.wait_for(lambda: self._is_closed or lease in self._answers)
                self._open.discard(lease)
            if lease in self._answers:
                return self._answers.pop(lease)
            if self._is_closed:
                return False
            self._writing.add(lease)
            return True

    def questions(self) -> list[Lease]:
        """Return, once, the leases that are to be asked for: late, contested, or backups."""
        with self._changed:
            asked, self._asked = self._asked, []
            return asked

    def ask_again(self) -> None:
        """Ask again for all that has not been answered: who was asked is lost."""
        with self._changed:
            self._asked = [lease for lease in self._open if lease not in self._answers]

    def answer(self, lease: Lease, may_write: bool) -> None:
        """Let a writer thread go on."""
        with self._changed:
            # Once closed nobody counts on a thread that has not woken yet: it is to write nothing.
            if lease in self._open and not self._is_closed:
                self._answers[lease] = may_write
                if may_write:
                    # Now, not when the thread wakes: others may ask meanwhile what is written.
                    self._writing.add(lease)
                self._changed.notify_all()

    def close(self, held: Iterable[Lease]) -> set[Lease]:
        """Let nothing more be written than is being written; return what of `held` that is."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            return self._writing.intersection(held)
