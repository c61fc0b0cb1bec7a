"""One job at a time in a run directory: a lock file that says who holds it.

Knows no MPI and no journal. No `fcntl` or `flock`, which network file systems do not all keep, but
files that are created exclusively and whose time is renewed while their job lives:

    lock.1   {"host": "node7", "machine": "...", "processes": [[4711, 883201], ...], ...}

A job that finds no live lock claims the next number; of two jobs that try at the same moment one at
most succeeds. Who holds a lock is dead when

    on the same machine    none of its processes lives (pid and start time), and it had no others
    elsewhere              the file was not renewed for `STALE_SECONDS`, by the file system's clock

A job of this machine that is only stopped lives, however old its file. In the second case a job
that wants the lock watches the file until one or the other is certain.
"""

import errno
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpichunk.errors import JournalError
from mpichunk.process import Process, start_time, this_machine, this_process

RENEW_SECONDS = 10.0
"""How often the holder renews its file."""

STALE_SECONDS = 90.0
"""A file not renewed for so long belongs to nobody: nine times is no hiccup of a server."""

LOOK_SECONDS = 1.0
"""How often a job that waits looks whether the file is renewed."""

_NAME = re.compile(r"lock\.(\d+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lock file as it was read."""

    path: Path
    """The file."""

    renewed: float
    """Its modification time, by the file system's clock."""

    content: dict[str, Any]
    """Who wrote it; {} for a file whose writer was lost while it wrote."""

    def __str__(self) -> str:
        host = self.content.get("host", "an unknown host")
        pids = [pid for pid, _ in self.content.get("processes", [])]
        return f"a job on {host} (process {pids[0]})" if pids else f"a job on {host}"


class RunLock:
    """The lock of a run directory, held from `acquire` to `release`."""

    def __init__(self, path: Path, content: bytes, *, taken: float) -> None:
        self.path = path
        """The lock file."""

        self.taken = taken
        """When it became this job's, by the file system's clock."""

        self._content = content
        self.is_lost = False
        """Whether another job has taken the run directory, or someone deleted the file."""

        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        *,
        processes: Sequence[Process] = (),
        job: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> "RunLock":
        """Take the lock, after at most `STALE_SECONDS` when it is not certain that it is free.

        Args:
            run_dir: Created if it is not there.
            processes: All ranks of the job, this process included; default: this process.
            job: A name of the job that no other has: its rank that held the lock is lost.
            sleep: Waits for so many seconds.

        Raises:
            JournalError: another job holds it, or the directory cannot be written.
        """
        content = _content(processes or [this_process()], job)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            while True:
                claims = read_claims(run_dir)
                for claim in claims:
                    if not job or claim.content.get("job") != job:
                        _wait_until_dead(claim, run_dir, sleep)
                created = _create(run_dir, claims, content)
                if created is not None:
                    _tidy(claims, job)
                    path, taken = created
                    return cls(path, content, taken=taken)
        except OSError as error:
            raise JournalError(
                f"{error.filename or run_dir}: the run directory cannot be written: "
                f"{error.strerror}; choose a run_dir on a file system that this job may write to",
                key="run_dir",
            ) from error

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        self._thread.join()
        if not self._look():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Look at the file, and raise when the lock is lost, as after a long sleep of this machine.

        Raises:
            JournalError: another job may be writing to the run directory.
        """
        if self._look():
            raise JournalError(
                f"{self.path} is gone: another job has taken the run directory, or the file was "
                "deleted; this job ends before it gets in the way",
                key="run_dir",
            )

    def _renew(self) -> None:
        """Renew the file's time until released: the body of a thread, since roles may be busy."""
        while not self._released.wait(RENEW_SECONDS):
            try:
                if self._look():
                    return
                os.utime(self.path)
            except OSError as error:
                # The server may come back; until it is stale nobody takes the lock.
                log.warning("%s cannot be renewed: %s", self.path, error.strerror)

    def _look(self) -> bool:
        """Return whether the lock is lost: its file is gone, or another job's by the same name."""
        try:
            # Opened, since a network file system asks its server then; and read, since a new file
            # may have the inode of an old one.
            self.is_lost = self.is_lost or self.path.read_bytes() != self._content
        except FileNotFoundError:
            self.is_lost = True
        except OSError:
            # The server may come back; the thread tells of it.
            pass
        return self.is_lost


def read_claims(run_dir: Path) -> list[Claim]:
    """Return the lock files of a run directory, the lowest number first."""
    claims = []
    for path in sorted(filter(_number, run_dir.iterdir()), key=_number):
        try:
            # A network file system asks its server when a file is opened, else not always.
            with path.open("rb") as file:
                text, renewed = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            continue
        claims.append(Claim(path=path, renewed=renewed, content=_parse(text)))
    return claims


def find_holder(run_dir: Path) -> Claim | None:
    """Return who holds the run directory, None if all are certainly dead; waits for nothing.

    Takes this machine's clock for that of the file system: a shared one should agree to a second.
    """
    if not run_dir.is_dir():
        return None
    now, machine = time.time(), this_machine()
    live = [claim for claim in read_claims(run_dir) if not is_dead(claim, now=now, machine=machine)]
    return live[-1] if live else None


def is_dead(
    claim: Claim, *, now: float, machine: str, started: Callable[[int], int | None] = start_time
) -> bool:
    """Return whether the job that wrote a lock file is certainly dead.

    Args:
        claim: The file.
        now: The file system's time.
        machine: This machine.
        started: Returns the start time of a process of this machine, None for a dead one.
    """
    if is_alive_here(claim, machine=machine, started=started):
        return False
    if now - claim.renewed > STALE_SECONDS:
        return True
    return claim.content.get("machine") == machine and claim.content.get("num_elsewhere") == 0


def is_alive_here(
    claim: Claim, *, machine: str, started: Callable[[int], int | None] = start_time
) -> bool:
    """Return whether a process of the job lives on this machine: then there is nothing to watch."""
    if claim.content.get("machine") != machine:
        return False
    return any(started(pid) == when for pid, when in claim.content["processes"])


def _wait_until_dead(claim: Claim, run_dir: Path, sleep: Callable[[float], None]) -> None:
    """Return once the job of a claim is certainly dead.

    Raises:
        JournalError: it is alive.
    """
    machine, seen = this_machine(), claim.renewed
    is_told = False
    while not is_dead(claim, now=_file_system_time(run_dir), machine=machine):
        is_renewed = claim.renewed != seen
        if is_renewed or is_alive_here(claim, machine=machine):
            raise JournalError(
                f"{run_dir} is in use by {claim}, which is alive; wait for it, or end it "
                "(`python -m mpichunk stop`), or choose another run_dir",
                key="run_dir",
            )
        if not is_told:
            is_told = True
            log.warning(
                "%s: waiting at most %.0f s to see whether %s, which holds it, is alive",
                claim.path,
                STALE_SECONDS,
                claim,
            )
        sleep(LOOK_SECONDS)
        found = [other for other in read_claims(run_dir) if other.path == claim.path]
        if not found:
            return
        claim = found[0]


def _create(run_dir: Path, dead: Sequence[Claim], content: bytes) -> tuple[Path, float] | None:
    """Claim the number after those of the dead; return None when another was quicker.

    Returns the file, and when it was there, by the file system's clock.
    """
    path = run_dir / f"lock.{max((_number(claim.path) for claim in dead), default=0) + 1}"
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        taken = os.fstat(file).st_mtime
        if os.write(file, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        path.unlink()
        error.filename = str(path)
        raise
    finally:
        os.close(file)
    # A job that judged by an older list of files may have claimed another number meanwhile.
    if any(claim.path != path and claim not in dead for claim in read_claims(run_dir)):
        path.unlink()
        return None
    return path, taken


def _tidy(dead: Sequence[Claim], job: str) -> None:
    """Remove the claims of the dead; those of other jobs are told."""
    for claim in dead:
        if not job or claim.content.get("job") != job:
            log.warning("%s was left by %s, which is dead; going on", claim.path, claim)
        claim.path.unlink(missing_ok=True)


def _content(processes: Sequence[Process], job: str) -> bytes:
    """Return what is written into a lock file."""
    machine = this_machine()
    here = [process for process in processes if process.machine == machine]
    content = {
        "host": socket.gethostname(),
        "machine": machine,
        "processes": [[process.pid, process.started] for process in here],
        "num_elsewhere": len(processes) - len(here),
        "job": job,
        "nonce": secrets.token_hex(8),
    }
    return json.dumps(content).encode() + b"\n"


def _parse(text: bytes) -> dict[str, Any]:
    """Return the content of a lock file, {} for one that is not whole."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "processes" in content else {}


def _number(path: Path) -> int:
    """Return the number of a lock file, 0 for another file."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _file_system_time(run_dir: Path) -> float:
    """Return the time by the clock that also sets the time of lock files."""
    path = run_dir / f".clock.{secrets.token_hex(8)}"
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)
