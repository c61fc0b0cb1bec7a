"""The `plan` verb: what a run would do and cost, before it is run.

Opens the input's metadata, and nothing else of it; starts neither MPI nor torch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mpichunk.config.file import load_config
from mpichunk.errors import ExitCode
from mpichunk.job.startup import Job, masked_blocks, open_config_mask, prepare
from mpichunk.plan.report import plan_json, render_plan
from mpichunk.volume import check_output

MOST_BLOCKS_MASKED = 100_000
"""Above so many blocks the masked ones are not counted: it would take more than a minute."""


def preview(
    config_path: Path, overrides: Sequence[str], *, num_ranks: int, as_json: bool
) -> ExitCode:
    """Print the plan of a config.

    Raises:
        UserError: the run could not work.
    """
    loaded = load_config(config_path, overrides)
    with loaded.locating():
        job = prepare(loaded.config)
        check_output(job.output, sources=job.sources)
        num_masked = _num_masked(job)
        arguments = job.plan, job.config, job.volume, job.estimate()
        if as_json:
            found = plan_json(*arguments, num_ranks=num_ranks, num_masked=num_masked)
            print(json.dumps(found, indent=2))
        else:
            print(render_plan(*arguments, num_ranks=num_ranks, num_masked=num_masked))
        for line in (*loaded.notes, *loaded.warnings()):
            print(f"mpichunk: {line}", file=sys.stderr)
    return ExitCode.ALL_DONE


def _num_masked(job: Job) -> int | None:
    """Return how many blocks the mask excludes; None without a mask, or for too many blocks."""
    if job.config.mask is None or job.mask_grid is None:
        return None
    with open_config_mask(job.config.mask) as mask:
        return masked_blocks(job.plan, job.mask_grid, mask, limit=MOST_BLOCKS_MASKED)
