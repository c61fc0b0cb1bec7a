"""Rows of numbers and remarks, the same in everything that `plan` prints.

Knows widths; not what the numbers mean.
"""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from mpichunk.plan.advice import Advice

WIDTH = 100
LABEL = 20

Row = tuple[str, Sequence[int], str] | None


def table(title: str, rows: Iterable[Row]) -> list[str]:
    """Return rows of three numbers under z, y, x, each with a remark."""
    shown = [row for row in rows if row is not None]
    width = 2 + max(len(f"{n:,}") for _, values, _ in shown for n in values)
    width = max(width, 8)
    lines = [f"{title:<{LABEL + 2}}" + "".join(f"{axis:>{width}}" for axis in "zyx")]
    for name, values, remark in shown:
        numbers = "".join(f"{n:>{width},}" for n in values)
        lines.append(f"  {name:<{LABEL}}{numbers}   {remark}")
    return lines


def value_rows(rows: Iterable[tuple[str, str, str] | None]) -> list[str]:
    """Return rows of one value, each with a remark."""
    shown = [row for row in rows if row is not None]
    width = max(len(value) for _, value, _ in shown)
    return [f"  {name:<{LABEL}}{value:>{width}}   {remark}" for name, value, remark in shown]


def bullets(title: str, advice: Iterable[Advice]) -> list[str]:
    """Return a title and what to change, wrapped; nothing where nothing is to be changed."""
    lines: list[str] = []
    for item in advice:
        text = f"{item.key}: {item.message}"
        lines += wrap(text, WIDTH, initial_indent="  * ", subsequent_indent="    ")
    return [title, *lines] if lines else []
