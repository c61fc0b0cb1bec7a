"""The one tree of errors, and the exit code that each branch stands for.

Knows nothing but words. A message says who, what was found, what was expected and what to do next.

    MpichunkError
    |-- UserError                 exit 2: the user can fix it; one clear message, never a traceback
    |   |-- ConfigError           mistakes of a config file, all of them, each with its line
    |   |-- VolumeError           an input, mask or output that is missing or does not fit
    |   |-- ModelError            a network that does not load or does not fit
    |   |-- DeviceError           no such accelerator, or one shared by two ranks
    |   |-- LaunchError           ranks that were started wrongly or do not see the same files
    |   `-- JournalError          a run directory of another run
    |       `-- NotStartedError   or of none yet, where only a run could tell what is asked
    |-- RankLost                  a rank died; the survivors meet and go on
    |-- StartOver                 they have met, but not all were computing: all begin anew
    |-- MustEnd                   the job cannot go on, and every rank is told; brings its exit code
    `-- BlockError                one block failed; the run goes on and ends with exit 3
        |-- DiskFullError         no space or quota left to write to; the run stops with exit 3
        `-- DeviceMemoryError     not even one patch fits into the memory of the device
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self


class ExitCode(IntEnum):
    """What the process tells the shell."""

    ALL_DONE = 0
    UNEXPECTED = 1
    USER_ERROR = 2
    BLOCKS_FAILED = 3
    DRAINED = 75


class MpichunkError(Exception):
    """Anything that mpichunk raises on purpose."""


class UserError(MpichunkError):
    """A mistake that the user can fix.

    `key` is the dotted config key that the message is about, if there is one: the command line
    puts the file and line of that key before the message.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.key = key

    def prefixed(self, where: str) -> Self:
        """Return the error with `where` before what it tells; `message` stays as it is."""
        self.args = (f"{where}: {self}",)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a config file."""

    key: str
    """Dotted key, or "" for the file as a whole."""

    message: str
    """What was found, what was expected, what to do."""


class ConfigError(UserError):
    """Every mistake found in one config file."""

    def __init__(self, problems: Sequence[Problem], lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.problems = tuple(problems)
        self.lines = tuple(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between ranks: exceptions are pickled by their arguments."""
        return type(self), (self.problems, self.lines)


class VolumeError(UserError):
    """An input, mask or output that is missing, unreadable, or does not fit."""


class ModelError(UserError):
    """A network that does not load, or whose output does not fit the config."""


class DeviceError(UserError):
    """An accelerator that is not there, or that two ranks would share."""


class LaunchError(UserError):
    """Ranks that were started wrongly, or that do not see the same files."""


class JournalError(UserError):
    """A run directory that belongs to another run."""


class NotStartedError(JournalError):
    """A run directory in which no run has kept what is asked."""

    def __init__(self, message: str, *, run_dir: Path | None = None) -> None:
        super().__init__(message, key="run_dir")
        self.run_dir = run_dir


class RankLost(MpichunkError):  # noqa: N818
    """A rank has died, as MPI or another rank says: all survivors must agree and leave it."""


class StartOver(MpichunkError):  # noqa: N818
    """The survivors have met, but not all of them had begun to compute."""


class MustEnd(MpichunkError):  # noqa: N818
    """The job cannot go on, and every rank must be told; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class BlockError(MpichunkError):
    """One block could not be computed; the run goes on with the others.

    `kind` is the same for all blocks that fail alike, where their messages differ in more than
    numbers; else "".
    """

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class DiskFullError(BlockError):
    """No space, or no quota, is left where the output is written: every other block would fail.

    The message is the same for every block.
    """


class DeviceMemoryError(BlockError):
    """Not even a batch of one patch of this block fits into the memory of the rank's device."""


DEVICE_FAILURES = UserError, RuntimeError, OSError, MemoryError, ImportError
"""What a network, device, driver, library or memory raises; anything else is a bug."""
