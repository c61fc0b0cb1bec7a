"""A plan and its estimate as text for people and as JSON for programs.

Only turns numbers into words; knows no files and computes no geometry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from mpichunk.config.rules import CPU_BACKENDS
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box, ceil_div
from mpichunk.geometry.symmetry import turns_of
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.plan.estimate import Estimate
from mpichunk.plan.memory import MemoryPart
from mpichunk.plan.plan import Plan
from mpichunk.plan.prediction import Forecast, forecast_json
from mpichunk.plan.probe import Peak
from mpichunk.plan.suggestion import runs_on_cpu
from mpichunk.plan.table import Row, bullets, table, value_rows
from mpichunk.words import count, duration, size

_ON_CPU, _DEVICE = "on a CPU", "accelerator"
_Column = tuple[str, Sequence[int | None], int]


def render_plan(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    estimate: Estimate,
    *,
    num_ranks: int = 1,
    num_masked: int | None = None,
    expected: Forecast | None = None,
    peak: Peak | None = None,
) -> str:
    """Return what a run would do, for people, in lines of at most 100 characters or so.

    Args:
        plan: the plan of `config` over the volume of `info`.
        config: the effective config.
        info: the input.
        estimate: what `plan` takes.
        num_ranks: how many ranks would share the work.
        num_masked: blocks that the mask leaves nothing of; None without a mask.
        expected: how long it is expected to take.
        peak: what the largest rank of the last run took.
    """
    sections = [
        _volume_lines(plan, config, info),
        _shape_lines(plan, config),
        _work_lines(plan, config, info, estimate, num_masked, expected),
        _memory_lines(config, estimate, peak),
        _rank_lines(config, estimate, num_ranks, num_masked) if num_ranks > 1 else [],
        bullets("Could be better", estimate.advice),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def plan_json(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    estimate: Estimate,
    *,
    num_ranks: int = 1,
    num_masked: int | None = None,
    expected: Forecast | None = None,
    peak: Peak | None = None,
) -> dict[str, Any]:
    """Return what `render_plan` tells, as JSON values: voxels zyx, bytes, counts; None: unknown."""
    probe = estimate.probe
    return {
        **_geometry_json(plan, config, info),
        **_work_json(plan, config, estimate, num_masked),
        "memory": {
            "parts": [asdict(part) for part in estimate.memory],
            "cpu_nbytes": estimate.cpu_nbytes,
            "host_nbytes": estimate.host_nbytes,
            "device_nbytes": estimate.device_nbytes,
            "is_complete": _is_complete(estimate.memory),
            "measured_nbytes": None if peak is None else peak.nbytes,
            "measured_device_nbytes": None if peak is None else peak.device_nbytes,
        },
        "prediction": forecast_json(expected),
        "ranks": _ranks_json(estimate, num_ranks, num_masked),
        "probe": None if probe is None else asdict(probe),
        "advice": [asdict(advice) for advice in estimate.advice],
    }


def _geometry_json(plan: Plan, config: Config, info: VolumeInfo) -> dict[str, Any]:
    """Return where the voxels are, and the shapes of patch, block and chunk."""
    return {
        "input": {
            "location": info.location,
            **_box_json(plan.volume),
            "num_channels": info.num_channels,
            "dtype": info.dtype.name,
            "voxel_size": info.voxel_size,
            "chunk_shape": info.chunk_shape,
        },
        "roi": _box_json(plan.roi),
        "output": {
            **_box_json(plan.output_domain),
            "num_channels": config.num_written_channels,
            "dtype": config.output.dtype,
            "chunk_shape": config.chunk_shape,
            "shard_shape": config.output.shard_shape,
        },
        "patch": {
            "shape": plan.patch_shape,
            "crop": plan.crop,
            "output_shape": plan.output_patch_shape,
            "overlap": plan.overlap,
            "stride": plan.stride,
        },
        "block": {
            "shape": plan.block_shape,
            "stitch": plan.stitch,
            "margin": plan.margin if plan.stitch == "crop" else None,
        },
    }


def _work_json(
    plan: Plan, config: Config, estimate: Estimate, num_masked: int | None
) -> dict[str, Any]:
    """Return what is computed, read and written."""
    work, num_turns = estimate.work, len(turns_of(config.model.augment))
    least, typical, most = work.patches_per_block
    return {
        "blocks": {
            "num": work.num_blocks,
            "grid": plan.grid.shape,
            "num_whole": estimate.num_whole_blocks,
            "num_masked": num_masked,
        },
        "patches": {
            "num": work.num_patches,
            "fewest": work.lattice_patches,
            "redundancy": work.redundancy,
            "per_block": {"least": least, "typical": typical, "most": most},
            "turns": num_turns,
            "passes_per_voxel": work.num_passes * num_turns,
        },
        "read": {
            "nbytes": estimate.read_nbytes,
            "amplification": work.read_amplification,
            "amplification_in_chunks": work.decode_amplification,
        },
        "write": {"nbytes": estimate.output_nbytes, "num_files": estimate.num_files},
    }


def _box_json(box: Box) -> dict[str, Any]:
    """Return a box as its two corners."""
    return {"start": box.start, "stop": box.stop}


def _ranks_json(estimate: Estimate, num_ranks: int, num_masked: int | None) -> dict[str, Any]:
    """Return how the blocks fall on the ranks."""
    num_blocks = estimate.work.num_blocks - (num_masked or 0)
    most = ceil_div(num_blocks, num_ranks)
    return {
        "num": num_ranks,
        "least_blocks": num_blocks // num_ranks,
        "most_blocks": most,
        "idle_share": 1 - num_blocks / (most * num_ranks) if most else 0.0,
        "cpu_nbytes": num_ranks * estimate.cpu_nbytes,
        "host_nbytes": num_ranks * estimate.host_nbytes,
    }


# ---- Sections of the text ---------------------------------------------------------------------


def _volume_lines(plan: Plan, config: Config, info: VolumeInfo) -> list[str]:
    """Return where the voxels are: input, ROI, output."""
    kind = f"{info.dtype.name}, {count(info.num_channels, 'channel')}"
    if info.voxel_size is not None:
        kind += f", voxels of {' x '.join(f'{size:g}' for size in info.voxel_size)} nm"
    clipped = plan.roi != plan.volume
    rows: list[Row] = [
        ("input", plan.volume.shape, kind),
        ("starts at", plan.volume.start, "its voxel offset") if any(plan.volume.start) else None,
        ("ROI from", plan.roi.start, "what is computed and written") if clipped else None,
        ("ROI to", plan.roi.stop, "one past its last voxel") if clipped else None,
        (
            "output",
            plan.output_domain.shape,
            f"{config.output.dtype}, {count(config.num_written_channels, 'channel')}",
        ),
    ]
    return table("Volumes, in voxels", rows)


def _shape_lines(plan: Plan, config: Config) -> list[str]:
    """Return the shapes of patch, block and write unit, each explained."""
    unit = "shard" if config.output.shard_shape else "chunk"
    chunk = config.chunk_shape if config.output.shard_shape else None
    rows: list[Row] = [
        ("patch", plan.patch_shape, "what the network sees"),
        ("crop", plan.crop, "cut off each side of its output") if any(plan.crop) else None,
        ("output patch", plan.output_patch_shape, "what is left of it") if any(plan.crop) else None,
        ("overlap", plan.overlap, "of neighbouring output patches, where they are blended"),
        ("stride", plan.stride, "from one output patch to the next"),
        ("block", plan.block_shape, "what a rank computes and writes in one piece"),
        ("margin", plan.margin, "computed around a block and cut away")
        if plan.stitch == "crop"
        else None,
        ("chunk", chunk, "smallest piece of the output that can be read") if chunk else None,
        (unit, config.write_unit, "one file of the output; never shared by two blocks"),
    ]
    stitch = {
        "crop": "stitch: crop, each block has patches of its own",
        "seamless": "stitch: seamless, blocks share the patches of the whole volume",
    }[plan.stitch]
    return [*table("Shapes, in voxels", rows), f"  {stitch}"]


def _work_lines(
    plan: Plan,
    config: Config,
    info: VolumeInfo,
    estimate: Estimate,
    num_masked: int | None,
    expected: Forecast | None,
) -> list[str]:
    """Return what is computed, read and written."""
    work = estimate.work
    least, typical, most = work.patches_per_block
    spread = "in every block" if least == most else f"in most; from {least:,} to {most:,}"
    grid = " x ".join(f"{n:,}" for n in plan.grid.shape)
    decoded = work.decode_amplification
    whole_chunks = "" if decoded is None else f"; {decoded:.2f} times in whole storage chunks"
    unit = "shards" if config.output.shard_shape else "chunks"
    share = work.num_patches / work.num_blocks
    num_turns = len(turns_of(config.model.augment))
    rows = [
        ("blocks", f"{work.num_blocks:,}", f"{grid}; {_clipped(estimate)}"),
        (
            "masked blocks",
            f"{num_masked:,}",
            f"skipped, about {count(round(num_masked * share), 'patch', 'patches')}: the mask "
            "leaves nothing of them",
        )
        if num_masked is not None
        else None,
        ("patches per block", f"{typical:,}", spread),
        (
            "patches to run",
            f"{work.num_patches:,}",
            f"{work.redundancy:.2f} times the {work.lattice_patches:,} of one lattice over the ROI",
        ),
        (
            "augmentation",
            f"{num_turns}",
            "forwards of each patch, turned differently, whose predictions are averaged",
        )
        if num_turns > 1
        else None,
        (
            "passes",
            f"{work.num_passes * num_turns:.2f}",
            "times the network predicts each voxel, on average",
        ),
        (
            "read",
            size(estimate.read_nbytes),
            f"every voxel {work.read_amplification:.2f} times{whole_chunks}",
        ),
        (
            "written",
            size(estimate.output_nbytes),
            f"before compression, in {count(estimate.num_files, 'file')} ({unit})",
        ),
        _forward_row(config, estimate),
        _forecast_row(expected),
    ]
    return ["Work", *value_rows(rows)]


def _clipped(estimate: Estimate) -> str:
    """Return how many blocks are whole."""
    clipped = estimate.work.num_blocks - estimate.num_whole_blocks
    if clipped == 0:
        return "all of them whole"
    return f"{estimate.num_whole_blocks:,} whole, {clipped:,} clipped by the ROI"


def _forward_row(config: Config, estimate: Estimate) -> tuple[str, str, str] | None:
    """Return how long the network will take, if a forward has told."""
    if config.model.backend == "identity":
        return None
    if estimate.probe is None:
        return "network time", "unmeasured", "`bench` measures it, and what memory it takes"
    num_forwards = estimate.work.num_patches * len(turns_of(config.model.augment))
    seconds = estimate.probe.seconds * num_forwards / config.patch.batch_size
    return "network time", duration(seconds), f"for one rank, measured on {estimate.probe.device}"


def _forecast_row(expected: Forecast | None) -> tuple[str, str, str] | None:
    """Return how long everything will take, if `bench` has measured everything."""
    if expected is None or expected.basis != "bench":
        return None
    ranks = count(expected.num_ranks, "rank")
    remark = f"predicted for {ranks}, {expected.idle_share:.1%} of it idle at the end"
    if expected.num_ranks > 1:
        remark += "; as if each stayed as fast as in `bench`"
    return "wall time", duration(expected.seconds), remark


def _memory_lines(config: Config, estimate: Estimate, peak: Peak | None) -> list[str]:
    """Return the peak memory of a rank, part by part."""
    columns = _memory_columns(config, estimate)
    head = "".join(f"{title:>{width}}" for title, _, width in columns)
    lines = [f"{'Memory of one rank at its peak':<40}{head}"]
    for index, part in enumerate(estimate.memory):
        cells = [
            f"{size(values[index]) if values[index] != 0 else '-':>{width}}"
            for _, values, width in columns
        ]
        lines.append(f"  {part.name:<38}{''.join(cells)}")
    totals = "".join(
        f"{size(sum(v or 0 for v in values)):>{width}}" for _, values, width in columns
    )
    name = "together" if _is_complete(estimate.memory) else "together, without the network"
    lines.append(f"  {name:<38}{totals}")
    if peak is not None:
        on_cpu = runs_on_cpu(config, estimate.probe)
        cells = [f"{_measured(title, peak, on_cpu=on_cpu):>{width}}" for title, _, width in columns]
        lines.append(f"  {'measured, last run, largest rank':<38}{''.join(cells).rstrip()}")
    return lines


def _measured(title: str, peak: Peak, *, on_cpu: bool) -> str:
    """Return what a run took of the memory of one column, "" where it was not there."""
    if on_cpu != (title == _ON_CPU):
        return ""
    return size(peak.device_nbytes if title == _DEVICE else peak.nbytes)


def _memory_columns(config: Config, estimate: Estimate) -> list[_Column]:
    """Return the columns that can apply: CPU, and host and accelerator."""
    cpu: _Column = (_ON_CPU, [part.cpu_nbytes for part in estimate.memory], 14)
    host: _Column = ("host", [part.host_nbytes for part in estimate.memory], 14)
    device: _Column = (_DEVICE, [part.device_nbytes for part in estimate.memory], 14)
    if config.model.backend in CPU_BACKENDS or config.compute.device == "cpu":
        return [cpu]
    return [cpu, host, device] if config.compute.device == "auto" else [host, device]


def _rank_lines(
    config: Config, estimate: Estimate, num_ranks: int, num_masked: int | None
) -> list[str]:
    """Return how the blocks and the memory fall on the ranks."""
    ranks = _ranks_json(estimate, num_ranks, num_masked)
    least, most, idle = ranks["least_blocks"], ranks["most_blocks"], ranks["idle_share"]
    each = f"{most:,}" if least == most else f"{least:,} or {most:,}"
    remark = "as many for each"
    if least != most:
        remark = f"{idle:.1%} of the ranks' time is idle, if every block takes equally long"
    if least == 0:
        remark = f"more ranks than blocks: {idle:.1%} of their time is idle"
    on_cpu = config.model.backend in CPU_BACKENDS or config.compute.device in ("auto", "cpu")
    nbytes = estimate.cpu_nbytes if on_cpu else estimate.host_nbytes
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < num_ranks] + [num_ranks]
    more = "" if _is_complete(estimate.memory) else ", and for each rank what the network needs"
    rows = [
        ("blocks per rank", each, remark),
        *(
            (f"{count(n, 'rank')} on a node", size(n * nbytes), "of memory at their peak" + more)
            for n in counts[-4:]
        ),
    ]
    return [f"With {count(num_ranks, 'rank')}", *value_rows(rows)]


def _is_complete(memory: Iterable[MemoryPart]) -> bool:
    """Return whether every part is measured."""
    return all(part.cpu_nbytes is not None for part in memory)
