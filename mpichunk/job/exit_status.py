"""How a run ends: the journal's last line, the proof that no block is missing, the exit code.

Knows the journal alone: neither ranks nor volumes.
"""

import logging
from pathlib import Path

from mpichunk.errors import ExitCode, JournalError
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.runstatus import MOST_FAILURES_SHOWN, RunStatus, read_status
from mpichunk.schedule.messages import FAILURES, Failure, Stop
from mpichunk.words import agree, count

log = logging.getLogger(__name__)


def note_end(journal: Journal, ending: Stop) -> None:
    """Note why no more blocks were leased; on a full disk it is only told."""
    journal.append_end({"reason": ending.reason, "why": ending.why})
    try:
        journal.sync()
    except OSError as error:
        journal.give_up()
        log.error("%s: the end of the run cannot be recorded: %s", journal.path, error.strerror)


def conclude(run_dir: Path, ending: Stop | None, *, num_blocks: int) -> ExitCode:
    """Read the journal once more, and let what it proves decide the exit code.

    "Every block done" is read off one state per block of the plan, filled from the file and not
    from what this process believes.

    Args:
        run_dir: Where the journal is.
        ending: Why no more blocks were leased, None if none was to be computed.
        num_blocks: Length of the plan.

    Raises:
        JournalError: the journal is of another plan.
    """
    found = read_status(run_dir)
    if found.num_blocks != num_blocks:
        raise JournalError(
            f"{run_dir}: the journal has {count(found.num_blocks, 'block')}, but this run has "
            f"{num_blocks}: another job has started a run here meanwhile; end it, then run this "
            "one again",
            key="run_dir",
        )
    _tell(found)
    if ending is not None and ending.reason == FAILURES and found.num_done < num_blocks:
        return ExitCode.BLOCKS_FAILED
    return found.exit_code


def _tell(found: RunStatus) -> None:
    """Tell what has become of the blocks."""
    blocks = count(found.num_blocks, "block")
    if found.exit_code == ExitCode.ALL_DONE:
        num = found.num_blocks
        log.info("%s", agree(num, "the only block is done", f"all {num:,} blocks are done"))
    alike: dict[str, list[Failure]] = {}
    for failure in found.failures:
        alike.setdefault(failure.message, []).append(failure)
    for message, failures in list(alike.items())[:MOST_FAILURES_SHOWN]:
        block, core, num_alike = failures[0].block, failures[0].core, len(failures)
        if num_alike == 1:
            log.error("block %d, %s, failed: %s", block, core, message)
        else:
            told = "%d blocks failed alike: %s; the first is block %d, %s"
            log.error(told, num_alike, message, block, core)
    if found.num_failed:
        log.error(
            "%s of %s failed; `python -m mpichunk status` shows why; run again to retry",
            f"{found.num_failed:,}",
            blocks,
        )
    num_left = found.num_blocks - found.num_done - found.num_failed
    if num_left:
        log.warning(
            "%s of %s %s still to be computed; run it again to go on",
            f"{num_left:,}",
            blocks,
            agree(num_left, "is", "are"),
        )
