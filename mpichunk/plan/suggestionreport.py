"""Suggested block shapes as text for people and as JSON for programs.

Only turns numbers into words; computes no geometry.
"""

from textwrap import wrap
from typing import Any

from mpichunk.config.schema import Config
from mpichunk.geometry.box import Triple
from mpichunk.plan.fit import Room
from mpichunk.plan.memory import Memory
from mpichunk.plan.plan import Plan
from mpichunk.plan.probe import Probe
from mpichunk.plan.suggestion import FEW_BLOCKS, SAME_TIME, Suggestion, Suggestions, reading
from mpichunk.plan.table import WIDTH
from mpichunk.words import agree, count, duration, size

_MEMORIES = {"cpu": "memory", "host": "host memory", "device": "accelerator memory"}
_NOTABLE = 0.01
"""Changes of less than this share are not reasons."""


def render_suggestions(
    plan: Plan,
    config: Config,
    found: Suggestions,
    *,
    room: Room,
    memory: Memory,
    probe: Probe | None,
    host_room: Room | None = None,
) -> str:
    """Return the suggestions for people, the best first, each with its reasons and what to copy.

    Args:
        plan: the plan of `config`.
        config: the effective config.
        found: what was suggested for it.
        room: memory that a rank may take.
        memory: which one that is.
        probe: what was measured.
        host_room: with an accelerator's memory, what a rank may take of the host's.
    """
    num_ranks = found.now.forecast.num_ranks
    unit = "shard" if config.output.shard_shape else "chunk"
    lines = [
        f"Block shapes for {count(num_ranks, 'rank')} with {size(room.nbytes)} of "
        f"{_MEMORIES[memory]} each",
        *_wrapped(f"{_MEMORIES[memory]}: {room.words}"),
        *_host_lines(found, host_room),
        *_wrapped(f"time: {_basis_words(found, probe)}"),
        *_wrapped(
            f"multiples of the stride {plan.stride}, and of the {unit} of the output"
            + ("" if _changes_chunk(found) else f" {config.write_unit}")
            + f"; {count(found.num_tried, 'shape')} {agree(found.num_tried, 'fits', 'fit')}. "
            f"Times within {SAME_TIME:.0%} count as equal: then {FEW_BLOCKS} blocks per rank "
            "or more are first, then what reads less, then what takes less memory"
        ),
        *(_wrapped("a mask leaves out blocks, which is not counted here") if config.mask else []),
        "",
        f"{'block z, y, x':<24}{'blocks':>12}{'patches':>9}{'idle':>7}{'read':>7}"
        f"{'memory':>11}{'time':>13}",
        _row("now", found.now, found),
    ]
    for number, item in enumerate(found.rows, start=1):
        reasons = "; ".join(reasons_for(item, found.now, room, host_room))
        command = f"      {' '.join(options_for(item))}"
        lines += ["", _row(f"{number}", item, found), *_wrapped(reasons, indent="      "), command]
    # That nothing fits is an error, which says it.
    if found.rows and not any(
        item.forecast.seconds < found.now.forecast.seconds for item in found.rows
    ):
        lines += ["", *_wrapped("nothing here is faster than the block as it is")]
    return "\n".join([*lines, "", *_legend(), ""])


def suggestions_json(
    found: Suggestions, *, room: Room, memory: Memory, host_room: Room | None = None
) -> dict[str, Any]:
    """Return what `render_suggestions` tells, as JSON values."""
    is_known = found.now.forecast.basis != "batches"
    best = min((item.forecast.seconds for item in found.rows), default=0.0)

    def values(item: Suggestion) -> dict[str, Any]:
        seconds = item.forecast.seconds
        return {
            "block_shape": item.block_shape,
            "chunk_shape": item.chunk_shape,
            "num_blocks": item.work.num_blocks,
            "num_patches": item.work.num_patches,
            "redundancy": item.work.redundancy,
            "idle_share": item.forecast.idle_share,
            "read_amplification": reading(item.work),
            "nbytes": item.nbytes,
            "host_nbytes": None if host_room is None else item.host_nbytes,
            "fits": item.nbytes <= room.nbytes and _fits_host(item, host_room),
            "seconds": seconds if is_known else None,
            "relative": seconds / best if best else None,
        }

    return {
        "num_ranks": found.now.forecast.num_ranks,
        "memory": memory,
        "limit_nbytes": room.nbytes,
        "limit": room.words,
        "host_limit_nbytes": None if host_room is None else host_room.nbytes,
        "host_limit": None if host_room is None else host_room.words,
        "basis": found.now.forecast.basis,
        "now": values(found.now),
        "smallest_nbytes": found.smallest_nbytes,
        "suggestions": [
            {
                **values(item),
                "reasons": reasons_for(item, found.now, room, host_room),
                "options": options_for(item, quote=""),
            }
            for item in found.rows
        ],
    }


def options_for(item: Suggestion, *, quote: str = "'") -> list[str]:
    """Return the options of the command line that choose a suggestion."""
    found = [f"--set {quote}block.shape={_brackets(item.block_shape)}{quote}"]
    if item.names_chunk:
        found.append(f"--set {quote}output.chunk_shape={_brackets(item.chunk_shape)}{quote}")
    return found if quote else [option.removeprefix("--set ") for option in found]


def reasons_for(
    item: Suggestion, now: Suggestion, room: Room, host_room: Room | None = None
) -> list[str]:
    """Return in words what a suggestion changes, as against the config as it is."""
    reasons = []
    if item.block_shape == now.block_shape:
        reasons.append("the block as it is")
    if now.nbytes > room.nbytes:
        reasons.append(f"fits the memory; now it takes {size(now.nbytes)}")
    if not _fits_host(now, host_room):
        reasons.append(f"fits the host's memory; now it takes {size(now.host_nbytes)}")
    patches = item.work.num_patches / now.work.num_patches - 1
    if abs(patches) >= _NOTABLE:
        reasons.append(f"{abs(patches):.0%} {'fewer' if patches < 0 else 'more'} patches")
    idle, idle_now = item.forecast.idle_share, now.forecast.idle_share
    if abs(idle - idle_now) >= _NOTABLE:
        verb = "end together" if idle < idle_now else "end apart"
        reasons.append(f"ranks {verb}: {idle:.0%} idle, now {idle_now:.0%}")
    read = reading(item.work) / reading(now.work) - 1
    if abs(read) >= 5 * _NOTABLE:
        word = "less" if read < 0 else "more"
        reasons.append(f"{abs(read):.0%} {word} to read")
    if not reasons:
        reasons.append("about as now")
    return reasons


def _row(name: str, item: Suggestion, found: Suggestions) -> str:
    """Return the numbers of one shape."""
    shape = ", ".join(f"{n}" for n in item.block_shape)
    return (
        f"{name:>3}  {shape:<19}{item.work.num_blocks:>12,}{item.work.redundancy:>9.2f}"
        f"{item.forecast.idle_share:>7.1%}{reading(item.work):>7.2f}{size(item.nbytes):>11}"
        f"{_time(item, found):>13}"
    )


def _time(item: Suggestion, found: Suggestions) -> str:
    """Return the predicted time, or how it is to the best one's."""
    if item.forecast.basis != "batches":
        return duration(item.forecast.seconds)
    seconds = [row.forecast.seconds for row in found.rows] or [found.now.forecast.seconds]
    return f"{item.forecast.seconds / min(seconds):.2f} x best"


def _basis_words(found: Suggestions, probe: Probe | None) -> str:
    """Return what the times follow from."""
    if found.now.forecast.basis == "batches" or probe is None:
        return (
            "only compared, by batches of patches; `bench` measures what they take, and then "
            "reading and writing count too"
        )
    if probe.pace is None:
        return (
            f"of the network alone, by one forward on {probe.device}; after `bench` reading and "
            "writing count too"
        )
    ranks = count(probe.pace.num_ranks, "rank")
    return f"predicted by `bench` with {ranks} on {probe.device}, as if each stayed as fast"


def _fits_host(item: Suggestion, host_room: Room | None) -> bool:
    """Return whether a host's memory suffices, where it is limited besides."""
    return host_room is None or item.host_nbytes <= host_room.nbytes


def _host_lines(found: Suggestions, host_room: Room | None) -> list[str]:
    """Return what a rank may take of its host, where its network runs on an accelerator."""
    if host_room is None:
        return []
    now = f"{size(host_room.nbytes)} each, now {size(found.now.host_nbytes)} are needed"
    return _wrapped(f"{_MEMORIES['host']}: {now}; {host_room.words}")


def nothing_words(found: Suggestions, room: Room, host_room: Room | None) -> str:
    """Return what to do if nothing fits, with the smallest need."""
    limit, least, option = room.nbytes, found.smallest_nbytes, "--memory"
    if host_room is not None and least <= limit:
        limit, least, option = host_room.nbytes, found.smallest_host_nbytes, "--host-memory"
    where = " of the host's memory" if option == "--host-memory" else ""
    return (
        f"no shape fits {size(limit)}{where}: the smallest takes {size(least)}; set {option} if a "
        "rank may use more, start fewer ranks per node, or reduce patch.batch_size or patch.shape"
    )


def _changes_chunk(found: Suggestions) -> bool:
    return any(item.chunk_shape != found.now.chunk_shape for item in found.rows)


def _legend() -> list[str]:
    """Return what the columns mean."""
    return _wrapped(
        "patches: run, over those of one lattice; idle: of the ranks' time, until the last one "
        "ends; read: how often a voxel is read, in whole storage chunks if they are known; memory: "
        "of one rank, as far as it is known. Nothing was changed: append the options of a shape to "
        "the command, or copy its values into the config"
    )


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _brackets(shape: Triple) -> str:
    return f"[{','.join(map(str, shape))}]"
