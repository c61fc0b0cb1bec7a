"""What the verbs that many ranks run share: logs, a guard, and mistakes that are told once.

Knows no verb.
"""

import os
import sys
from collections.abc import Callable

from mpichunk.errors import ExitCode, UserError
from mpichunk.ranks.communicator import Communicator
from mpichunk.ranks.crash import crash_guard
from mpichunk.ranks.launcher import check_world_size
from mpichunk.rundir.logs import close_logs, log_to_terminal


def on_ranks(comm: Communicator, body: Callable[[], int]) -> int:
    """Return the exit code of `body`, which every rank calls and whose mistakes all ranks share.

    Only rank 0 prints them. Whatever else is raised ends the job.
    """
    log_to_terminal(comm.rank)
    with crash_guard(comm):
        try:
            check_world_size(comm.size, os.environ)
            return body()
        except UserError as error:
            if comm.is_coordinator:
                print(f"mpichunk: {error}", file=sys.stderr)
            return ExitCode.USER_ERROR
        finally:
            close_logs()
