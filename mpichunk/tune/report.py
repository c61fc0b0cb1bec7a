"""The trials as a table for people, as JSON for programs, and as the comment of a config.

Only turns numbers into words; measures and decides nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from mpichunk.backends.engine import EngineInfo
from mpichunk.bench.figures import Spread
from mpichunk.config.edit import render_value
from mpichunk.tune.figures import HEADROOM, Largest, Row, verdict
from mpichunk.tune.variants import MOST_PATCHES
from mpichunk.words import count, size

WIDTH = 110
_NAME = 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What `tune` has found."""

    engine: EngineInfo
    """The baseline's engine: device, versions, threads."""

    rows: Sequence[Row]
    """All that was tried; the first is the baseline."""

    best: Row
    tolerance: float
    num_repeats: int
    num_patches: int
    is_real: bool
    """Whether the patches are of the volume."""

    changes: dict[str, Any]
    """Keys of the config whose values should change."""

    available: int | None
    """Memory that a rank may take, bytes; None where nobody knows."""

    largest_batch: Largest | None
    """How many patches fit; None where it is not known."""

    begun: str | None = None
    """Run directory of the config, if its run has begun."""

    keeps_run_dir: bool = False
    """Whether the config that is written names the same run directory."""

    written: str | None = None
    """The config that was written."""

    is_interrupted: bool = False
    """Whether it was ended before its time."""

    has_tried_all: bool = True
    """Whether no variant was left to try."""


def tuning_json(tuning: Tuning) -> dict[str, Any]:
    """Return everything as JSON values; numbers that are not finite as text."""
    return {
        "engine": asdict(tuning.engine),
        "tolerance": tuning.tolerance,
        "num_repeats": tuning.num_repeats,
        "patches": {"count": tuning.num_patches, "of_the_volume": tuning.is_real},
        "available_nbytes": tuning.available,
        "largest_batch": tuning.largest_batch and asdict(tuning.largest_batch),
        "rows": [_row_json(row, tuning) for row in tuning.rows],
        "best": tuning.best.variant.name,
        "changes": tuning.changes,
        "begun": tuning.begun,
        "written": tuning.written,
        "interrupted": tuning.is_interrupted,
    }


def _row_json(row: Row, tuning: Tuning) -> dict[str, Any]:
    difference = row.difference
    return {
        "name": row.variant.name,
        "settings": row.variant.settings,
        "is_tried": row.is_tried,
        "refused": row.refused or None,
        "seconds_per_patch": row.seconds and asdict(row.seconds),
        "speedup": row.speedup and asdict(row.speedup),
        "difference": difference
        and {key: _number(value) for key, value in asdict(difference).items()},
        "nbytes": row.nbytes,
        "verdict": verdict(row, tuning.best, tuning.tolerance),
    }


def _number(value: float) -> float | str:
    return value if value < float("inf") else "inf"


def render_tuning(tuning: Tuning) -> str:
    """Return the table and what follows from it."""
    patches = count(tuning.num_patches, "patch", "patches") + " of the volume"
    if not tuning.is_real:
        patches = "made-up patches, since those of the volume that were looked at are blank"
    lines = [
        f"On {_where(tuning.engine)}",
        f"{patches}; repeats in turns with the first line: {tuning.num_repeats}",
        "",
        f"  {'':<{_NAME}}{'speed':>7}{'least':>7}{'most':>7}"
        f"{'largest':>10}{'mean':>10}{'memory':>10}",
    ]
    for row in tuning.rows:
        lines += _row_lines(row, tuning)
    lines += ["", *_notes(tuning), "", *_conclusion(tuning)]
    return "\n".join(lines)


def _where(engine: EngineInfo) -> str:
    """Return device, threads and version in words."""
    device = f"{engine.device} ({engine.device_kind}), CPU threads: {engine.threads}"
    return f"{device}; {engine.version}"


def _row_lines(row: Row, tuning: Tuning) -> list[str]:
    """Return a line of figures, if there are any, and what they mean."""
    mark = "* " if row is tuning.best else "  "
    words = verdict(row, tuning.best, tuning.tolerance)
    if row.refused or row.speedup is None or row.difference is None:
        told = wrap(words, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
        return [f"{mark}{row.variant.name}", *told]
    speed, apart = row.speedup, row.difference
    figures = f"{speed.median:>7.2f}{speed.least:>7.2f}{speed.most:>7.2f}"
    figures += f"{apart.largest:>10.1e}{apart.mean:>10.1e}"
    figures += f"{size(row.nbytes) if row.nbytes is not None else '-':>10}"
    return [f"{mark}{row.variant.name:<{_NAME}}{figures}   {words}"]


def _notes(tuning: Tuning) -> list[str]:
    """Return what the columns are."""
    text = (
        "speed: patches per second of the network alone, in multiples of the first line's "
        "(blending, reading and writing are not in it: `bench` measures the whole); largest, mean: "
        "difference from its values after model.activation, as shares of their range; memory: of a "
        f"whole rank, where the network computes ({size(tuning.available)} are available)."
    )
    largest = tuning.largest_batch
    if largest is not None:
        most = "up to " + count(largest.num_patches, "patch", "patches")
        if largest.num_patches == MOST_PATCHES:
            most = f"{MOST_PATCHES} patches, the most that `tune` tries,"
        fit = "fit" if largest.is_run else "should fit"
        text += f" Batches of {most} {fit} with {HEADROOM:.0%} to spare"
        text += "." if largest.is_run else ": an extrapolation, which was not run."
    return wrap(text, WIDTH)


def _conclusion(tuning: Tuning) -> list[str]:
    """Return what to change."""
    if tuning.is_interrupted:
        more = "all was tried, but" if tuning.has_tried_all else "more was to be tried, and"
        lines = [f"INTERRUPTED: {more} no config was written."]
        then = "" if tuning.has_tried_all else " until then"
        lines.append(f"The best{then}: {tuning.best.variant.name}.")
        return lines + [f"  {key}: {render_value(value)}" for key, value in tuning.changes.items()]
    num_tried, of_those = sum(row.is_tried for row in tuning.rows), ""
    if num_tried < len(tuning.rows):
        of_those = f" of those tried ({num_tried} of {len(tuning.rows)}: give more time for all)"
    if not tuning.changes:
        return [f"The config already uses the best variant{of_those}: {tuning.best.variant.name}."]
    lines = [f"Best{of_those}: {tuning.best.variant.name}. Against the config as it is:"]
    lines += [f"  {key}: {render_value(value)}" for key, value in tuning.changes.items()]
    if tuning.written:
        lines.append(f"written to {tuning.written}")
        if tuning.begun is not None:
            lines += wrap(f"{_begun_words(tuning)}.", WIDTH)
    return lines


def _begun_words(tuning: Tuning) -> str:
    """Return why the config that is written cannot run as it is, and what to change in it."""
    return (
        f"The run in {tuning.begun} has begun with the old settings, and values of both are not "
        f"mixed: before you run the new config, set in it {_others(tuning)}"
    )


def _others(tuning: Tuning) -> str:
    """Return what the new config must not share with a run of the old one."""
    volume = "another output.volume"
    return f"another run_dir AND {volume}" if tuning.keeps_run_dir else volume


def comment_of(tuning: Tuning, source: str) -> str:
    """Return the comment at the top of the config that is written."""
    best = tuning.best
    assert best.speedup is not None and best.difference is not None
    spread: Spread = best.speedup
    text = [
        f"{source}, tuned by `mpichunk tune` for {_where(tuning.engine)}.",
        f"{best.variant.name}: {spread.median:.2f} times as fast as {tuning.rows[0].variant.name} "
        f"({spread.least:.2f} to {spread.most:.2f} in {count(tuning.num_repeats, 'repeat')}), the "
        "network alone: `mpichunk bench` measures the whole.",
        f"Its values differ by at most {best.difference.largest:.1e} of their range, "
        f"{best.difference.mean:.1e} on average.",
        "Changed: " + "; ".join(f"{k}: {render_value(v)}" for k, v in tuning.changes.items()) + ".",
        f"{_begun_words(tuning)}."
        if tuning.begun is not None
        else f"Once a run of {source} has begun, this needs {_others(tuning)}.",
    ]
    lines = [line for part in text for line in wrap(part, 98)]
    return "".join(f"# {line}\n" for line in lines)
