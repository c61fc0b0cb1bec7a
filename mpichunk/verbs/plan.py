"""The `plan` verb: what a run would do and cost, and which blocks would do better, before it runs.

Opens the input's metadata, and nothing else of it; starts neither MPI nor torch.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpichunk.backends.optional import missing_package
from mpichunk.config.file import LoadedConfig, load_config
from mpichunk.errors import ExitCode, UserError
from mpichunk.job.forward_probe import read_peak
from mpichunk.job.host_memory import host_room, memory_groups
from mpichunk.job.masking import masked_blocks
from mpichunk.job.startup import Job, open_config_mask, prepare
from mpichunk.plan.estimate import estimate
from mpichunk.plan.fit import Room
from mpichunk.plan.memory import Memory
from mpichunk.plan.prediction import forecast
from mpichunk.plan.probe import Probe
from mpichunk.plan.report import plan_json, render_plan
from mpichunk.plan.suggestion import runs_on_cpu, suggest
from mpichunk.plan.suggestionreport import nothing_words, render_suggestions, suggestions_json
from mpichunk.volume import check_output

MEMORY, HOST = "--memory", "--host-memory"
"""The options that say what a rank may take."""

MOST_BLOCKS_MASKED = 100_000
"""Above so many blocks the masked ones are not counted: it would take more than a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to print."""

    num_ranks: int = 1
    """Ranks to plan for."""

    as_json: bool = False
    """Print JSON."""

    suggest: bool = False
    """Print block shapes that would be better, instead of the plan."""

    memory_nbytes: int | None = None
    """What one rank may take, where its network runs; None: what is there."""

    host_memory_nbytes: int | None = None
    """What one rank may take of its host, its network being elsewhere; None: what is there."""


def preview(config_path: Path, overrides: Sequence[str], options: Options) -> ExitCode:
    """Print the plan of a config, or what would be better.

    Raises:
        UserError: the run could not work.
    """
    loaded = load_config(config_path, overrides)
    with loaded.locating():
        job = prepare(loaded.config)
        if options.suggest:
            _print_suggestions(loaded, job, options)
        else:
            check_output(job.output, sources=job.sources)
            _print_plan(job, options)
        missing = missing_package(loaded.config.model.backend)
        for line in (*loaded.notes, *loaded.warnings(), *([missing] if missing else [])):
            print(f"mpichunk: {line}", file=sys.stderr)
    return ExitCode.ALL_DONE


def _print_plan(job: Job, options: Options) -> None:
    """Print what a run would do."""
    num_masked = _num_masked(job)
    premise = job.premise(options.num_ranks)
    found = estimate(premise)
    num_wanted = found.work.num_blocks - (num_masked or 0)
    expected = forecast(premise, found.work).of_blocks(num_wanted)
    arguments = job.plan, job.config, job.volume, found
    peak = read_peak(job.run_dir, job.config, job.model_files())
    make = plan_json if options.as_json else render_plan
    printed = make(
        *arguments,
        num_ranks=options.num_ranks,
        num_masked=num_masked,
        expected=expected,
        peak=peak,
    )
    print(printed if isinstance(printed, str) else json.dumps(printed, indent=2))


def _print_suggestions(loaded: LoadedConfig, job: Job, options: Options) -> None:
    """Print which blocks would be better.

    Raises:
        UserError: nobody knows how much memory there is, or no shape fits it.
    """
    premise = job.premise(options.num_ranks)
    probe = premise.probe
    memory: Memory = "cpu" if runs_on_cpu(job.config, probe) else "device"
    room = _room(memory, options, probe)
    # What lies beside an accelerator is often what is short.
    beside = None if memory == "cpu" else _host_room(options, options.host_memory_nbytes, HOST)
    found = suggest(
        premise,
        limit_nbytes=room.nbytes,
        memory=memory,
        host_limit_nbytes=None if beside is None else beside.nbytes,
        is_chunk_open="output.chunk_shape" in loaded.defaulted,
    )
    if options.as_json:
        values = suggestions_json(found, room=room, memory=memory, host_room=beside)
        text = json.dumps(values, indent=2)
    else:
        text = render_suggestions(
            job.plan, job.config, found, room=room, memory=memory, probe=probe, host_room=beside
        )
    print(text, flush=True)
    if not found.rows:
        raise UserError(nothing_words(found, room, beside))


def _room(memory: Memory, options: Options, probe: Probe | None) -> Room:
    """Return what one rank may take of the memory that its network runs in."""
    if memory == "cpu":
        return _host_room(options, options.memory_nbytes, MEMORY)
    if options.memory_nbytes is not None:
        return Room(nbytes=options.memory_nbytes, words=f"as set with {MEMORY}")
    if probe is None or probe.free_nbytes is None:
        raise UserError(
            "the memory of the accelerator is unknown; set it, e.g. --memory 80GB, or measure it "
            "with `bench`",
            key="compute.device",
        )
    words = f"what a rank could have on {probe.device} when it was measured; or set --memory"
    return Room(nbytes=probe.free_nbytes, words=words)


def _host_room(options: Options, wanted_nbytes: int | None, option: str) -> Room:
    """Return what one rank may take of its host: what was asked for, or what this machine has."""
    if wanted_nbytes is not None:
        return Room(nbytes=wanted_nbytes, words=f"as set with {option}")
    # Ranks that this machine has no core for run on others.
    num_local = min(options.num_ranks, os.cpu_count() or 1)
    groups = [(group, num_local) for group in memory_groups()]
    room = host_room(num_local, groups, own_nbytes=0)
    return Room(nbytes=room.nbytes, words=f"of this machine: {room.words}; or set {option}")


def _num_masked(job: Job) -> int | None:
    """Return how many blocks the mask excludes; None without a mask, or for too many blocks."""
    if job.config.mask is None or job.mask_grid is None:
        return None
    with open_config_mask(job.config.mask) as mask:
        return masked_blocks(job.plan, job.mask_grid, mask, limit=MOST_BLOCKS_MASKED)
