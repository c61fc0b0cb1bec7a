"""The figures of a benchmark as text for people and as JSON for programs.

Only turns numbers into words; measures and decides nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpichunk.backends.engine import EngineInfo
from mpichunk.backends.stageclock import BENCH_STAGES
from mpichunk.bench.figures import Figures, RankFigures, Spread
from mpichunk.config.schema import Config
from mpichunk.geometry.symmetry import turns_of
from mpichunk.plan.advice import Advice
from mpichunk.plan.table import bullets
from mpichunk.plan.work import Work
from mpichunk.words import count, duration

_LABEL = 24
_STEADY = 1.3
"""Repeats that differ by more are not of the same machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark that has ended."""

    config: Config
    work: Work
    engine: EngineInfo
    """What ran, on rank 0."""

    ranks: Sequence[RankFigures]
    blocks: Sequence[int]
    """Blocks that were run, by index in the plan."""

    num_blocks: int
    """Blocks per rank and repeat."""

    scratch: str
    """Folder that the scratch output lay in."""

    figures: Figures
    advice: Sequence[Advice]

    @property
    def num_turns(self) -> int:
        """Forwards of each patch."""
        return len(turns_of(self.config.model.augment))

    @property
    def seconds_of_run(self) -> float | None:
        """What the whole run would take on these ranks at this pace; None if nothing was done."""
        rate = self.figures.whole.median * 1e6
        return self.work.num_roi_voxels / rate if rate else None


def bench_json(bench: Bench) -> dict[str, Any]:
    """Return all figures as JSON values: seconds, Mvox/s of output, shares of the time."""
    figures, work = bench.figures, bench.work
    return {
        "engine": asdict(bench.engine),
        "num_ranks": len(bench.ranks),
        "num_repeats": len(bench.ranks[0].whole),
        "blocks": {
            "shape": bench.config.block.shape,
            "per_rank": bench.num_blocks,
            "indices": list(bench.blocks),
            "num_voxels": figures.num_voxels,
            "num_patches": figures.num_patches,
        },
        "scratch": bench.scratch,
        "mvox_per_second": {"bare": asdict(figures.bare), "whole": asdict(figures.whole)},
        "efficiency": asdict(figures.efficiency),
        "redundancy": work.redundancy,
        "turns": bench.num_turns,
        "passes_per_voxel": work.num_passes * bench.num_turns,
        "seconds_per_batch": figures.seconds_per_batch,
        "stages": dict(figures.stages),
        "shares": {
            "network": figures.network,
            "blending": figures.blending,
            "waiting": figures.waiting,
            "host": figures.host,
        },
        "bound_by": figures.bound_by,
        "seconds_of_run": bench.seconds_of_run,
        "advice": [asdict(advice) for advice in bench.advice],
        "ranks": [
            {
                "host": rank.host,
                "device": rank.device,
                "whole": [asdict(item) for item in rank.whole],
                "bare_seconds": list(rank.bare),
                "stages": dict(rank.stages),
            }
            for rank in bench.ranks
        ],
    }


def render_bench(bench: Bench) -> str:
    """Return the figures for people, in lines of at most 100 characters or so."""
    sections = [
        _what_lines(bench),
        _rate_lines(bench),
        _stage_lines(bench),
        bullets("What to change", bench.advice),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _what_lines(bench: Bench) -> list[str]:
    """Return what was measured, and where."""
    engine, num_repeats = bench.engine, len(bench.ranks[0].whole)
    blocks, repeats = count(bench.num_blocks, "block"), count(num_repeats, "repeat")
    patches = count(bench.figures.num_patches, "patch", "patches")
    devices = sorted({rank.device for rank in bench.ranks})
    each = " each" if len(bench.ranks) > 1 else ""
    rows = [
        ("network", f"{engine.backend}, {engine.version}, {engine.how}"),
        ("device", f"{', '.join(devices)} ({engine.device_kind})"),
        ("ranks", f"{len(bench.ranks)}, CPU threads{each}: {engine.threads}"),
        (
            "measured",
            f"{blocks} per rank and repeat, {repeats}; {patches} a repeat",
        ),
        ("scratch output", f"in {bench.scratch}, removed"),
    ]
    return ["Benchmark", *(f"  {name:<{_LABEL}}{text}" for name, text in rows)]


def _rate_lines(bench: Bench) -> list[str]:
    """Return the rates of bare forwards and of the whole, and how much one is of the other."""
    figures, work = bench.figures, bench.work
    lines = [f"{'Mvox/s of output':<{_LABEL + 2}}{'median':>10}{'least':>10}{'most':>10}"]
    lines.append(_spread_row("bare forward", figures.bare, "nothing but the network"))
    lines.append(_spread_row("whole", figures.whole, "read to written"))
    lines.append(_spread_row("efficiency", figures.efficiency, "bare seconds / whole seconds"))
    if figures.is_noise:
        lines.append(
            "  the repeats differ too much to tell; use more repeats on a quiet machine (--repeats)"
        )
    elif figures.bare.most > _STEADY * figures.bare.least:
        lines.append(
            "  the bare forward differs much from repeat to repeat: is something else running here?"
        )
    passes = work.num_passes * bench.num_turns
    turns = f", {bench.num_turns} of them turned ways" if bench.num_turns > 1 else ""
    rows = [
        ("redundancy", f"{work.redundancy:.2f}", "times the patches of one lattice over the ROI"),
        ("passes", f"{passes:.2f}", f"times the network predicts each voxel{turns}"),
        ("one forward", f"{1000 * figures.seconds_per_batch:.1f} ms", _batch_words(bench.config)),
    ]
    if bench.seconds_of_run is not None:
        text = f"for all of the {count(work.num_blocks, 'block')} of this config on these ranks"
        rows.append(("at this pace", duration(bench.seconds_of_run), text))
    lines += [f"  {name:<{_LABEL}}{value:>10}   {text}" for name, value, text in rows]
    return lines


def _stage_lines(bench: Bench) -> list[str]:
    """Return the stages of one block, and where the time of the whole goes."""
    figures = bench.figures
    total = sum(figures.stages.values())
    lines = [f"{'One block, stage by stage':<{_LABEL + 2}}{'ms':>10}{'share':>10}"]
    words = {
        "read": "read, decoded, padded",
        "gather": "patches cut out and scaled",
        "forward": "the network",
        "accumulate": "activation, window, sum",
        "finalise": "checked, reduced, quantised",
        "host": "work between these, in Python",
        "write": "encoded and durably written",
    }
    for name in BENCH_STAGES:
        seconds = figures.stages[name]
        share = f"{seconds / total:.1%}" if total else "-"
        lines.append(f"  {name:<{_LABEL}}{1000 * seconds:>10.1f}{share:>10}   {words[name]}")
    lines.append(
        f"  of the whole's time: {figures.network:.1%} network, {figures.blending:.1%} "
        f"blending, {figures.waiting:.1%} waiting for input and output, {figures.host:.1%} host"
    )
    lines.append(f"  bound by {figures.bound_by}")
    return lines


def _spread_row(name: str, spread: Spread, text: str) -> str:
    """Return a row of median, least and most."""
    numbers = "".join(f"{_figure(v):>10}" for v in (spread.median, spread.least, spread.most))
    return f"  {name:<{_LABEL}}{numbers}   {text}"


def _figure(value: float) -> str:
    """Return three figures or more of a number."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _batch_words(config: Config) -> str:
    size = config.patch.batch_size
    return "of one patch" if size == 1 else f"of {size} patches"
