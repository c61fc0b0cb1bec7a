"""The durable record of a run: `journal.jsonl`, append-only, one writer, any number of readers.

Knows no scheduler and no MPI. A line is written only for bytes that are already durable, so losing
the last lines costs work, never correctness.

    {"format":"mpichunk-journal-1","fingerprint":{...},"num_blocks":500,"versions":{...},...}
    {"start":{"time":1760000000.0,"num_done":0,"num_ranks":4,...}}        each start of the run
    {"stage":"blocks","block":0,"state":"done","core":[[0,0,0],[64,64,64]],"rank":1,...}
    {"stage":"blocks","block":7,"state":"retry",...,"error":"BlockError","message":"..."}
    {"end":{"time":1760000900.0,"reason":"drained","why":"..."}}      each end in good order

The last line about a block counts; a state other than `done` and `failed` means: to be computed.
A line that does not end with a brace and a newline was torn by a crash and does not exist; an empty
one keeps what another job has written apart from what came after.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from json.encoder import encode_basestring_ascii as _text
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mpichunk.errors import JournalError
from mpichunk.geometry.box import Box
from mpichunk.plan.fingerprint import differences
from mpichunk.rundir.journal_offsets import JournalOffsets
from mpichunk.rundir.layout import JOURNAL
from mpichunk.schedule.messages import Done, Failed, Record, State
from mpichunk.words import count

NAME = JOURNAL
FORMAT = "mpichunk-journal-1"
CHUNK_NBYTES = 16 << 20

# Stage, block and state come first so that a resume need not parse the rest: 10 million lines take
# 8 s this way and over a minute as JSON.
_LINE = re.compile(rb'\{"stage":"blocks","block":(\d+),"state":"(\w+)"[^\n]*\}\n')
_HEADER = frozenset({"format", "fingerprint", "num_blocks", "versions"})
_STATES = {b"done": State.DONE, b"failed": State.FAILED}


class Journal:
    """The writer: lines are collected by `append_*` and made durable together by `sync`."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        header: Mapping[str, Any],
        states: npt.NDArray[np.uint8],
        clock: Callable[[], float],
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = Path(file.name)
        """The file."""

        self.header = header
        """The first line."""

        self.states = states
        """(num_blocks,) the `State` of each block when the journal was opened."""

        self.offsets = JournalOffsets(self.path, len(states))
        """Where lines stand that are written once it is asked to note them."""

        self._file = file
        # Where the file ends if nobody else has written to it.
        self._end = file.tell()
        self._clock = clock
        self._guard = guard
        self._has_given_up = False
        self._lines: list[bytes] = []

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        num_blocks: int,
        fingerprint: Mapping[str, Any],
        versions: Mapping[str, str],
        fresh: bool = False,
        clock: Callable[[], float] = time.time,
        guard: Callable[[], None] = lambda: None,
    ) -> "Journal":
        """Open the journal of a run directory to append to it, or begin a new one.

        Args:
            run_dir: Created if it is not there.
            num_blocks: Length of the plan.
            fingerprint: What the result depends on, JSON values by name.
            versions: Versions of libraries, by name.
            fresh: Set an existing journal aside under another name.
            clock: Seconds since the epoch, for the `time` of each line.
            guard: Raises before lines are written that this job must not write any more.

        Raises:
            JournalError: it belongs to a run of another fingerprint, or cannot be written.
        """
        path = run_dir / NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if fresh or not belongs(path, num_blocks, fingerprint):
                set_aside(path)
            header = read_header(path)
            if header is None:
                header = _write_header(path, num_blocks, fingerprint, versions, clock())
            states = np.zeros(num_blocks, np.uint8)
            end = scan(path, states)
            # Appends, so that a job that has lost the run directory and does not know it yet cannot
            # overwrite lines.
            file = path.open("a+b", buffering=0)
            # What a crash left after the last whole line would be glued to the next one.
            file.truncate(end)
            file.seek(end)
        except OSError as error:
            raise JournalError(
                f"{error.filename or path}: the journal cannot be written: {error.strerror}; "
                "choose a run_dir on a file system that this job may write to",
                key="run_dir",
            ) from error
        return cls(file, header=header, states=states, clock=clock, guard=guard)

    def append_start(self, facts: Mapping[str, Any]) -> None:
        """Note that the run starts here; `facts` are JSON values such as num_ranks and hosts."""
        num_done = int(np.count_nonzero(self.states == State.DONE))
        self._append({"start": {"time": self._time, "num_done": num_done, **facts}})

    def append_beat(self, facts: Mapping[str, Any]) -> None:
        """Note that the run is alive; `facts` are JSON values such as num_held."""
        self._append({"beat": {"time": self._time, **facts}})

    def append_end(self, facts: Mapping[str, Any]) -> None:
        """Note that the run ends in good order; `facts` are JSON values: reason and why."""
        self._append({"end": {"time": self._time, **facts}})

    def append(self, record: Record, state: str, *, core: Box, rank: int, host: str) -> None:
        """Note what has become of a block: `done`, `failed`, or `retry` if it is tried again."""
        if not self._has_given_up:
            line = _block_line(record, state, core=core, rank=rank, host=host, time=self._time)
            self._lines.append(line)

    def sync(self) -> float:
        """Make every line appended so far durable; return the seconds that it took.

        Raises:
            OSError: it could not be written; the file is left as it was at the last `sync`.
        """
        if not self._lines:
            return 0.0
        started = time.monotonic()
        self._guard()
        text = b"".join(self._lines)
        end = begin = self._file.seek(0, os.SEEK_END)
        if end != self._end:
            # What somebody else has written may be half a line.
            text, begin = b"\n" + text, end + 1
        try:
            _write_durably(self._file, text)
        except OSError:
            self._take_back(text, end)
            raise
        self._end = end + len(text)
        self.offsets.note(self._lines, begin)
        self._lines.clear()
        return time.monotonic() - started

    def _take_back(self, text: bytes, end: int) -> None:
        """Cut off the part of `text` that was written from `end` on, if nothing came after it."""
        file = self._file.fileno()
        nbytes = os.fstat(file).st_size - end
        if nbytes > 0 and text.startswith(os.pread(file, nbytes, end)):
            self._file.truncate(end)

    def give_up(self) -> None:
        """Forget what could not be written, and take no more lines but how the run ends."""
        self._has_given_up = True
        self._lines.clear()

    def close(self) -> None:
        """Make the last lines durable and close the file."""
        self.sync()
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _time(self) -> float:
        return round(self._clock(), 3)

    def _append(self, line: Mapping[str, Any]) -> None:
        if not self._has_given_up or "end" in line:
            self._lines.append(_encode(line))


def read_states(
    run_dir: Path, *, num_blocks: int, fingerprint: Mapping[str, Any]
) -> npt.NDArray[np.uint8]:
    """Return (num_blocks,) the `State` of each block that `Journal.open` would find.

    Writes nothing.

    Raises:
        JournalError: the journal belongs to a run of another fingerprint, or cannot be read.
    """
    path = run_dir / NAME
    states = np.zeros(num_blocks, np.uint8)
    if read_header(path) is not None and belongs(path, num_blocks, fingerprint):
        scan(path, states)
    return states


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the first line, or None if there is no journal or its first line was torn.

    Raises:
        JournalError: the file is something else, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(
            f"{path} cannot be read: {error.strerror}; choose a run_dir that you may read",
            key="run_dir",
        ) from error
    if not line.endswith(b"\n"):
        return None
    header: dict[str, Any] = {}
    with suppress(ValueError):
        found = json.loads(line)
        header = found if isinstance(found, dict) else {}
    if not _HEADER.issubset(header) or header["format"] != FORMAT:
        raise JournalError(
            f"{path}: its first line is not that of a journal of format {FORMAT}; "
            "choose another run_dir, or set the file aside with --fresh",
            key="run_dir",
        )
    return header


def scan(path: Path, states: npt.NDArray[np.uint8], start: int = 0) -> int:
    """Bring `states` up to date with the lines from byte `start` on; return where they end.

    May be called while a run writes, again and again from where the last call ended.

    Raises:
        JournalError: a line names a block that the plan does not have.
    """
    with path.open("rb") as file:
        file.seek(start)
        for lines in whole_lines(file):
            start += len(lines)
            found = _LINE.findall(lines)
            blocks = np.array([int(block) for block, _ in found], np.int64)
            if len(blocks) and blocks.max() >= len(states):
                raise JournalError(
                    f"{path}: names block {blocks.max()}, but the plan has "
                    f"{count(len(states), 'block')}",
                    key="run_dir",
                )
            # Of equal indices the last one counts.
            states[blocks] = [_STATES.get(state, State.PENDING) for _, state in found]
    return start


def set_aside(path: Path) -> Path | None:
    """Rename a journal so that a new one can begin; return its new path, None if there is none."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(target)


def _write_header(
    path: Path,
    num_blocks: int,
    fingerprint: Mapping[str, Any],
    versions: Mapping[str, str],
    now: float,
) -> dict[str, Any]:
    """Begin a new journal; return its header."""
    parts = _as_json(fingerprint)
    header = {
        "format": FORMAT,
        "fingerprint": {"sha256": hashlib.sha256(_encode(parts)).hexdigest(), "parts": parts},
        "num_blocks": num_blocks,
        "versions": dict(versions),
        "time": round(now, 3),
    }
    with path.open("wb", buffering=0) as file:
        _write_durably(file, _encode(header))
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return header


def belongs(path: Path, num_blocks: int, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether a journal, if there is one, is of this run.

    One of another run in which no block is done may be set aside.

    Raises:
        JournalError: it is of another run, and its blocks would not hold the same values.
    """
    header = read_header(path)
    if header is None:
        return True
    old = {**header["fingerprint"]["parts"], "number of blocks": header["num_blocks"]}
    new = {**_as_json(fingerprint), "number of blocks": num_blocks}
    differing = differences(old, new)
    if not differing:
        return True
    states = np.zeros(header["num_blocks"], np.uint8)
    scan(path, states)
    if (states == State.DONE).any():
        raise JournalError(
            f"{path} belongs to a run with other settings:\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nundo these changes, set another run_dir AND output.volume, or start over: --fresh",
            key="run_dir",
        )
    return False


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a file in big pieces, each of whole lines; drop a torn last line."""
    rest = b""
    while piece := file.read(CHUNK_NBYTES):
        end = piece.rfind(b"\n") + 1
        if end:
            yield rest + piece[:end]
            rest = piece[end:]
        else:
            rest += piece


def _write_durably(file: BinaryIO, text: bytes) -> None:
    """Write all of `text` and return when it is on disk."""
    rest = memoryview(text)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def _block_line(
    record: Record, state: str, *, core: Box, rank: int, host: str, time: float
) -> bytes:
    """Return what is noted of a block.

    Written by hand: a general encoder takes three times as long, and this is on the path of every
    lease.
    """
    (z0, y0, x0), (z1, y1, x1) = core.start, core.stop
    match record:
        case Done(seconds=seconds, batch_size=size):
            stages = ",".join([f"{_text(stage)}:{round(s, 4)}" for stage, s in seconds.items()])
            batch = "" if size is None else f'"batch_size":{size},'
            rest = (
                f'"seconds":{{{stages}}},"num_patches":{record.num_patches},{batch}'
                f'"checksum":{_text(record.checksum)}'
            )
        case Failed(error=error, message=message):
            rest = f'"error":{_text(error)},"message":{_text(message)}'
    return (
        f'{{"stage":"blocks","block":{record.lease.block},"state":"{state}",'
        f'"core":[[{z0},{y0},{x0}],[{z1},{y1},{x1}]],"rank":{rank},"host":{_text(host)},'
        f'"attempt":{record.lease.attempt},"time":{time},{rest}}}\n'
    ).encode()


def _encode(value: Any) -> bytes:
    """Return one line of compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a journal will give back for `fingerprint`: lists for tuples, keys in order."""
    parts: dict[str, Any] = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
    return parts
