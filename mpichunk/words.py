"""Durations, sizes, numbers and choices in the words that people use, the same in every report.

Knows nothing of what is measured.
"""

import re
from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def duration(seconds: float) -> str:
    """Return seconds in the units that a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes} min"


def size(nbytes: int | None) -> str:
    """Return bytes in the unit in which they read best; None is unmeasured."""
    if nbytes is None:
        return "unmeasured"
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.{1 if value < 100 else 0}f} {_UNITS[unit]}"


def count(number: int, word: str, plural: str | None = None) -> str:
    """Return a number and its word, in the plural if it must be; default: with an `s`."""
    return f"{number:,} {agree(number, word, plural or f'{word}s')}"


def agree(number: int, singular: str, plural: str) -> str:
    """Return the form of a word that goes with a number."""
    return singular if number == 1 else plural


def either(words: Sequence[str]) -> str:
    """Return "a", "a or b", "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `16GB`, `1.5 TiB` or `500M` means.

    GB are powers of 1000, GiB of 1024; so is a bare G, as Slurm has it. A number without a unit is
    refused: 16 would be bytes, and is meant as GB.

    Raises:
        ValueError: it is no such text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?B)?|B)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(
            f"{text!r} is not a size; expected a number above zero and its unit, e.g. 16GB"
        )
    number, letter, suffix = match.groups()
    power = 0 if letter is None else "KMGTP".index(letter.upper()) + 1
    base = 1000 if (suffix or "").upper() == "B" else 1024
    return int(float(number) * base**power)
