"""The `verify` verb: re-reads the output and compares it, block by block, with the journal.

Starts no network. On several ranks every rank reads every n-th block; rank 0 tells the result, and
with `--repair` marks in the journal what the next `run` must compute again.

    journal says   the output holds            found
    done           what the checksum says      -
    done           nothing but zeros           missing       its files are gone
    done           other values                different
    done           what cannot be read         unreadable
    not done       something                   extra         harmless: the next run overwrites it
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.config.file import LoadedConfig, load_run_config
from mpichunk.errors import BlockError, ExitCode, JournalError
from mpichunk.geometry.box import Box
from mpichunk.job.startup import Job, library_versions, prepare
from mpichunk.plan.fingerprint import make_fingerprint
from mpichunk.ranks.agreement import on_every_rank, on_rank_0
from mpichunk.ranks.comm import Communicator, SerialCommunicator, start_mpi
from mpichunk.ranks.launcher import is_launched
from mpichunk.rundir import journal
from mpichunk.rundir.checksum import digest_of
from mpichunk.rundir.digests import Digests, read_digests
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.lock import RunLock
from mpichunk.rundir.runstatus import MOST_FAILURES_SHOWN
from mpichunk.schedule.messages import Failed, Lease, State
from mpichunk.verbs.onranks import on_ranks
from mpichunk.volume import check_output, open_output
from mpichunk.words import agree, count


class Kind(StrEnum):
    """How a block is not as the journal says."""

    MISSING = "missing"
    DIFFERENT = "different"
    UNREADABLE = "unreadable"
    EXTRA = "extra"


WORDS = {
    Kind.MISSING: "nothing of it is stored",
    Kind.DIFFERENT: "holds other values than were written",
    Kind.UNREADABLE: "cannot be read",
    Kind.EXTRA: "holds values, but is not done; the next run overwrites it",
}
PROGRESS_SECONDS = 30.0

Read = Callable[[Box], npt.NDArray[Any]]
"""Returns the stored (c, z, y, x) of a core."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFinding:
    """One block that is not as the journal says."""

    block: int
    """Index in the plan."""

    kind: Kind
    """How."""

    message: str
    """What the user is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """What rank 0 has read, for every rank."""

    job: Job
    """The run."""

    header: dict[str, Any]
    """First line of the journal."""

    is_there: bool
    """Whether the output exists."""

    states: npt.NDArray[np.uint8]
    """(num_blocks,) the `State` of each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification found."""

    states: npt.NDArray[np.uint8]
    """(num_blocks,) the `State` of each block before any repair."""

    findings: tuple[BlockFinding, ...]
    """In plan order."""

    @property
    def bad(self) -> list[BlockFinding]:
        """Blocks that are done but not as they were written."""
        return [finding for finding in self.findings if finding.kind != Kind.EXTRA]

    @property
    def exit_code(self) -> ExitCode:
        """3 where anything is bad or failed, 75 where there is more to do, else 0."""
        counts = np.bincount(self.states, minlength=len(State))
        if counts[State.DONE] + counts[State.FAILED] < len(self.states) and not self.bad:
            return ExitCode.DRAINED
        is_good = not self.bad and not counts[State.FAILED]
        return ExitCode.ALL_DONE if is_good else ExitCode.BLOCKS_FAILED


def verify(config_path: Path, overrides: Sequence[str], *, repair: bool, as_json: bool) -> int:
    """Verify the output of a config; return the exit code. To be called by every rank."""
    comm = start_mpi() if is_launched(os.environ) else SerialCommunicator()
    return on_ranks(
        comm, lambda: _verify(comm, config_path, overrides, repair=repair, as_json=as_json)
    )


def _verify(
    comm: Communicator, config_path: Path, overrides: Sequence[str], *, repair: bool, as_json: bool
) -> int:
    """Do what `verify` does, or raise the same UserError on every rank."""
    loaded = on_rank_0(comm, lambda: load_run_config(config_path, overrides))
    with ExitStack() as stack:

        def open_run() -> StoredRun:
            job, header = _open_job(loaded)
            if repair:
                stack.enter_context(RunLock.acquire(job.run_dir))
            return _read_stored(job, header)

        stored = on_rank_0(comm, open_run)
        blocks = range(comm.rank, len(stored.states), comm.size)
        path = stored.job.run_dir / journal.NAME
        digests = on_every_rank(comm, lambda: read_digests(path, blocks))
        num_threads = max(1, len(os.sched_getaffinity(0)) // comm.local_size)
        # Together: a rank that does not see the output must not leave the others waiting.
        read = on_every_rank(comm, lambda: _reader(stored, num_threads))
        found = comm.gather(_find_all(stored, blocks, digests, read, num_threads))

        def conclude() -> ExitCode:
            findings = sorted((f for part in found or [] for f in part), key=lambda f: f.block)
            verdict = Verification(states=stored.states, findings=tuple(findings))
            if repair and verdict.bad:
                _mark_undone(stored, verdict.bad, host=comm.host)
            print(_as_json(stored, verdict, repair) if as_json else _text(stored, verdict, repair))
            return verdict.exit_code

        return on_rank_0(comm, conclude)


def find(
    block: int, core: Box, state: State, digest: npt.NDArray[np.uint8], read: Read
) -> BlockFinding | None:
    """Compare one block with what the journal says of it."""
    try:
        core_czyx = read(core)
    except BlockError as error:
        kind = Kind.UNREADABLE if state == State.DONE else Kind.EXTRA
        return BlockFinding(block=block, kind=kind, message=str(error))
    if state == State.DONE:
        if digest_of(core_czyx) == digest.tobytes():
            return None
        kind = Kind.DIFFERENT if core_czyx.any() else Kind.MISSING
    elif core_czyx.any():
        kind = Kind.EXTRA
    else:
        return None
    return BlockFinding(block=block, kind=kind, message=WORDS[kind])


def check_same_config(header: dict[str, Any], job: Job, path: Path) -> None:
    """Refuse a config whose blocks are not those of the journal.

    The network's bytes and the device are taken as they were: nothing is computed.
    """
    old = header["fingerprint"]["parts"]
    new = make_fingerprint(
        job.config,
        volume=job.volume,
        mask=job.mask,
        model_files=(),
        device_kind=old.get("compute.device_kind", ""),
        threads=old.get("compute.threads"),
    )
    new |= {key: value for key, value in old.items() if key.startswith("model.files.")}
    if not journal.belongs(path, len(job.plan), new):
        raise JournalError(
            f"{path} belongs to a run with other settings, of which no block is done: there is "
            "nothing to compare with",
            key="run_dir",
        )


def _open_job(loaded: LoadedConfig) -> tuple[Job, dict[str, Any]]:
    """Return what the config asks for and the header of its journal, on rank 0."""
    with loaded.locating():
        job = prepare(loaded.config)
        path = job.run_dir / journal.NAME
        header = journal.read_header(path)
        if header is None:
            raise JournalError(
                f"{path} does not exist: this config has not been run yet, so there is nothing "
                "to compare with",
                key="run_dir",
            )
        check_same_config(header, job, path)
    return job, header


def _read_stored(job: Job, header: dict[str, Any]) -> StoredRun:
    """Read the journal, on rank 0."""
    path = job.run_dir / journal.NAME
    states = np.zeros(len(job.plan), np.uint8)
    journal.scan(path, states)
    return StoredRun(
        job=job,
        header=header,
        is_there=check_output(job.output, sources=job.sources),
        states=states,
    )


def _find_all(
    stored: StoredRun, blocks: range, digests: Digests, read: Read, num_threads: int
) -> list[BlockFinding]:
    """Compare this rank's blocks, several at a time."""

    def look(block: int) -> BlockFinding | None:
        core, state = stored.job.plan.grid[block], State(int(stored.states[block]))
        return find(block, core, state, digests[blocks.index(block)], read)

    findings: list[BlockFinding] = []
    next_told = time.monotonic() + PROGRESS_SECONDS
    for num_read, finding in enumerate(_in_order(look, blocks, num_threads), start=1):
        if finding is not None:
            findings.append(finding)
        if blocks.start == 0 and time.monotonic() > next_told:
            next_told = time.monotonic() + PROGRESS_SECONDS
            log.info(
                "%s of %s read, %d found",
                f"{num_read:,}",
                count(len(blocks), "block"),
                len(findings),
            )
    return findings


def _reader(stored: StoredRun, num_threads: int) -> Read:
    """Return what reads a core; where there is no output, every core is zero."""
    spec = stored.job.output
    if stored.is_there:
        return open_output(spec, num_threads=num_threads).read
    return lambda core: np.zeros((spec.num_channels, *core.shape), spec.dtype)


def _in_order(
    look: Callable[[int], BlockFinding | None], blocks: Iterable[int], num_threads: int
) -> Iterator[BlockFinding | None]:
    """Yield what `look` returns for each block, with few blocks in memory at a time."""
    pending: deque[Future[BlockFinding | None]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="verify") as pool:
        for block in blocks:
            pending.append(pool.submit(look, block))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _mark_undone(stored: StoredRun, bad: Sequence[BlockFinding], *, host: str) -> None:
    """Note in the journal that these blocks are to be computed again."""
    with Journal.open(
        stored.job.run_dir,
        num_blocks=len(stored.states),
        fingerprint=stored.header["fingerprint"]["parts"],
        versions=library_versions(),
    ) as ledger:
        for finding in bad:
            lease = Lease(block=finding.block, attempt=0)
            record = Failed(lease=lease, error=finding.kind, message=finding.message)
            core = stored.job.plan.grid[finding.block]
            ledger.append(record, "undone", core=core, rank=0, host=host)


def _counts(stored: StoredRun, verdict: Verification) -> dict[str, int]:
    """Return how many blocks there are of each sort."""
    counts = np.bincount(stored.states, minlength=len(State))
    kinds = [finding.kind for finding in verdict.findings]
    return {
        "num_blocks": len(stored.states),
        "num_done": int(counts[State.DONE]),
        "num_failed": int(counts[State.FAILED]),
        **{f"num_{kind}": kinds.count(kind) for kind in Kind},
    }


def _as_json(stored: StoredRun, verdict: Verification, repair: bool) -> str:
    """Return the verdict as JSON, every finding in it."""
    grid = stored.job.plan.grid
    blocks = [
        {
            "block": finding.block,
            "core": [grid[finding.block].start, grid[finding.block].stop],
            "kind": finding.kind,
            "message": finding.message,
        }
        for finding in verdict.findings
    ]
    found = {
        "run_dir": str(stored.job.run_dir),
        "output": stored.job.output.volume,
        "output_exists": stored.is_there,
        **_counts(stored, verdict),
        "num_marked_undone": len(verdict.bad) if repair else 0,
        "blocks": blocks,
        "exit_code": int(verdict.exit_code),
    }
    return json.dumps(found, indent=2)


def _text(stored: StoredRun, verdict: Verification, repair: bool) -> str:
    """Return the verdict as a few lines."""
    counts = _counts(stored, verdict)
    num_good = counts["num_done"] - len(verdict.bad)
    kinds = ", ".join(f"{counts[f'num_{kind}']} {kind}" for kind in Kind)
    gone = "" if stored.is_there else "; it does not exist"
    lines = [
        f"output   {stored.job.output.volume}{gone}",
        f"blocks   {counts['num_done']} of {counts['num_blocks']} done, {num_good} of these as "
        f"they were written; {kinds}",
    ]
    for finding in verdict.findings[:MOST_FAILURES_SHOWN]:
        core = stored.job.plan.grid[finding.block]
        lines.append(f"{finding.kind:<10} block {finding.block}, {core}: {finding.message}")
    if len(verdict.findings) > MOST_FAILURES_SHOWN:
        lines.append(f"and {len(verdict.findings) - MOST_FAILURES_SHOWN} more: --json")
    lines.append(f"state    {_state(verdict, repair)}")
    return "\n".join(lines)


def _state(verdict: Verification, repair: bool) -> str:
    """Return what that means, and what to do next."""
    if verdict.bad and repair:
        num = len(verdict.bad)
        them = agree(
            num, "is marked undone; `run` computes it", "are marked undone; `run` computes them"
        )
        return f"{count(num, 'block')} {them} again"
    if verdict.bad:
        return (
            "damaged; `verify --repair` marks these blocks undone, then `run` computes them again"
        )
    if verdict.exit_code == ExitCode.ALL_DONE:
        return "complete and as it was written"
    return "what is done is as it was written; `run` goes on with the rest"
