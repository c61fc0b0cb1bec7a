"""The `tune` verb: tries how this config's network runs best here, and writes the winner.

No MPI; one process, and another one for what a library looks at once per process. Touches neither
the output nor the run directory; changes no geometry, and no results beyond the tolerance.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpichunk.backends.devices.probing import cpu_kind
from mpichunk.backends.optional import PACKAGES, is_installed
from mpichunk.config.edit import edit
from mpichunk.config.file import LoadedConfig, dump_config, load_config
from mpichunk.config.schema import Config
from mpichunk.config.text import parse
from mpichunk.errors import ExitCode, LaunchError, UserError
from mpichunk.job.assembly import bind_ranks
from mpichunk.job.startup import prepare
from mpichunk.processmemory import settle_allocator
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.ranks.launcher import WORLD_SIZE_VARIABLES
from mpichunk.rundir import journal
from mpichunk.rundir.logs import close_logs, log_to_terminal
from mpichunk.tune.figures import Largest, Row, largest_batch
from mpichunk.tune.measure import Meter, read_patches
from mpichunk.tune.report import Tuning, comment_of, render_tuning, tuning_json
from mpichunk.tune.search import Search
from mpichunk.tune.variants import Facts, baseline, changed, variant_of, with_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to tune."""

    num_repeats: int
    """Turns of each variant."""

    tolerance: float
    """Largest difference allowed from float32, as a share of the range of the activated values."""

    limit_seconds: float
    """No variant is begun after this time."""

    write: Path | None = None
    """Where the winner is written; None for CONFIG-tuned.yaml beside the config."""

    as_json: bool = False
    """Print JSON."""


def tune(config_path: Path, overrides: Sequence[str], options: Options) -> int:
    """Try the variants of a config, print them, write the best; return the exit code.

    Raises:
        UserError: the config cannot be run as it is in float32, or the target cannot be written.
        KeyboardInterrupt: it was interrupted; what was measured until then is printed.
    """
    settle_allocator()
    log_to_terminal(0)
    # As Ctrl-C: so that what was measured is told.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _refuse_ranks(os.environ)
        loaded = load_config(config_path, overrides)
        target = options.write or config_path.with_name(f"{config_path.stem}-tuned.yaml")
        _refuse_target(target)
        with loaded.locating():
            tuning = _tune(loaded.config, options)
        is_named = "run_dir" in loaded.lines or "run_dir" in loaded.overrides
        tuning = replace(tuning, keeps_run_dir=is_named)
        try:
            if tuning.changes and not tuning.is_interrupted:
                with _undisturbed():
                    _write(target, loaded, overrides, tuning)
                    tuning = replace(tuning, written=str(target))
            text = json.dumps(tuning_json(tuning), indent=2) if options.as_json else None
            print(text or render_tuning(tuning), flush=True)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*_written_words(tuning)) from error
        if tuning.is_interrupted:
            raise KeyboardInterrupt
        return ExitCode.ALL_DONE
    finally:
        signal.signal(signal.SIGTERM, before)
        close_logs()


def _tune(config: Config, options: Options) -> Tuning:
    """Measure, and return what was found, also if that is interrupted after the first variant."""
    job = prepare(config)
    start = baseline(config)
    first = replace(job, config=with_settings(config, start.settings))
    binding = bind_ranks(SerialCommunicator(), first).of(0)
    facts = facts_of(binding.device)
    patches_nczyx, is_real = read_patches(job)
    meter = Meter(
        job,
        patches_nczyx,
        num_repeats=options.num_repeats,
        num_local=_num_local(binding.threads),
        deadline=time.perf_counter() + options.limit_seconds,
    )
    search = Search(config, facts, meter.measure, options.tolerance)
    largest, has_tried_all, is_interrupted = None, False, False
    try:
        best = search.run()
        has_tried_all = True
        largest = _largest_batch(meter, search.rows, best)
    except KeyboardInterrupt:
        if not search.rows:
            raise
        best, is_interrupted = search.best, True
    return Tuning(
        engine=meter.baseline.engine.info,
        rows=search.rows,
        best=best,
        tolerance=options.tolerance,
        num_repeats=options.num_repeats,
        num_patches=len(patches_nczyx),
        is_real=is_real,
        changes=changed(config, best.variant.settings),
        available=meter.available,
        largest_batch=largest,
        begun=str(job.run_dir) if (job.run_dir / journal.NAME).exists() else None,
        is_interrupted=is_interrupted,
        has_tried_all=has_tried_all,
    )


def _largest_batch(meter: Meter, rows: Sequence[Row], best: Row) -> Largest | None:
    """Return how many patches of the best variant fit, run if there is time."""
    same = replace(best.variant, batch_size=1)
    sizes = [row for row in rows if replace(row.variant, batch_size=1) == same]
    patch_seconds = best.seconds.median if best.seconds is not None else 0.0
    return largest_batch(
        sizes,
        meter.available,
        lambda n: meter.is_fitting(replace(best.variant, batch_size=n), n * patch_seconds),
    )


def facts_of(device: str, which: Callable[[str], str | None] = shutil.which) -> Facts:
    """Return what this machine has, for networks on a device."""
    installed = {backend for backend in PACKAGES if is_installed(backend)}
    compilers = ("g++", "clang++", "c++") if device == "cpu" else ("cc", "gcc", "clang")
    has_compiler = any(which(name) for name in compilers)
    if device != "cpu":
        has_compiler = has_compiler and find_spec("triton") is not None
    return Facts(
        device=device,
        installed=frozenset(installed),
        has_compiler=has_compiler,
        has_avx512=device == "cpu" and cpu_kind() == "cpu AVX512",
    )


def _num_local(threads: int) -> int:
    """Return how many ranks of so many threads a run will have here: as many as share the cores."""
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _refuse_ranks(environ: Mapping[str, str]) -> None:
    """Refuse several processes: each would measure while the others do."""
    for variable, launcher in WORLD_SIZE_VARIABLES.items():
        if environ.get(variable, "1") not in ("", "0", "1"):
            raise LaunchError(
                f"{launcher} started {environ[variable]} tasks, and `tune` measures one: start it "
                f"without {launcher}, and set compute.threads to what each rank of a run will have"
            )


def _refuse_target(target: Path) -> None:
    """Refuse, before minutes of measuring, to write where that cannot or must not be.

    Raises:
        UserError: there is something, or no folder that can be written.
    """
    if target.exists():
        raise UserError(
            f"{target} exists, and is not overwritten; name another file with --write, or remove it"
        )
    folder = target.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{folder} is not a writable folder; name a file with --write")


def _write(target: Path, loaded: LoadedConfig, overrides: Sequence[str], tuning: Tuning) -> None:
    """Write the config with the changes: the user's own text where its relative paths stay valid.

    Raises:
        UserError: it cannot be written.
    """
    config = with_settings(loaded.config, tuning.changes)
    if not tuning.keeps_run_dir:
        # Where it is left open the name of a config gives it.
        run_dir = target.absolute().parent / "runs" / target.stem
        config = config.model_copy(update={"run_dir": str(run_dir)})
    if target.absolute().parent == loaded.path.absolute().parent:
        given = dict(_override(text) for text in overrides)
        text = edit(loaded.path.read_text(encoding="utf-8-sig"), {**given, **tuning.changes})
    else:
        text = dump_config(config)
    comment = comment_of(tuning, loaded.path.name)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(comment + text)
        if not _says(target, tuning):
            # What describes the network may say more than the text of the config.
            target.write_text(comment + dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off what interrupts, for as long as it takes to write a file as a whole.

    Raises:
        KeyboardInterrupt: at the end, if something has.
    """
    numbers: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: numbers.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if numbers:
        raise KeyboardInterrupt


def _written_words(tuning: Tuning) -> list[str]:
    """Return what is to be told of an interrupt, if it is not that nothing was written."""
    return [f"{tuning.written} was written"] if tuning.written else []


def _says(path: Path, tuning: Tuning) -> bool:
    """Return whether a config runs its network as the best variant does."""
    try:
        return variant_of(load_config(path).config) == tuning.best.variant
    except UserError:
        return False


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key.strip(), parse(value, key).values
