"""What the user wrote, joined with what a description says: what is written wins, and is told.

Pure: values in, values out. Knows no files and no kind of description.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpichunk.config.described.findings import AxisSize, Findings, Obstacle
from mpichunk.errors import Problem

_SHAPE = "patch.shape"
_CHANNELS = "model.out_channels"
_LABELS = "output.reduce", "output.threshold"
"""Of these the user's choice of one is a choice against the other."""

_PLAIN_NORMALIZE = {"subtract": 0.0, "divide": 1.0, "clip": None}
ABSENT = object()
"""Stands for a key that is not there; None is a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Values of a config in which no package is named any more."""

    values: dict[str, Any]
    """Nested, as in a file."""

    problems: tuple[Problem, ...] = ()
    """Why that config must not run."""

    warnings: tuple[Problem, ...] = ()
    """What the user should know of single keys."""

    notes: tuple[str, ...] = ()
    """What was taken from where."""


def merge(values: Mapping[str, Any], findings: Findings) -> Merged:
    """Return the user's values, completed by those of a description.

    Args:
        values: nested, as the user wrote them.
        findings: what the description says.
    """
    merged = dict(values)
    problems = list(_size_problems(values, findings))
    warnings: list[Problem] = []
    taken = []
    for key, value in findings.settings.items():
        written = value_at(values, key)
        if key == "model.arguments" and isinstance(written, Mapping):
            # One by one: what the description cannot tell is often a single one of them.
            _put(merged, key, {**value, **written})
        elif key == "model.path" or not _is_written(values, key):
            _put(merged, key, value)
            taken.append(f"{key}: {_shown(value)}")
        elif key == _CHANNELS and written != value:
            problems.append(_contradiction(key, written, value, findings.origin))
        elif key != _SHAPE and not _is_same(key, written, value):
            warnings.append(_overruled(key, written, value, findings.origin))
    for obstacle in findings.obstacles:
        told = [key for key in obstacle.keys if value_at(values, key) is not ABSENT]
        (warnings if told else problems).append(_of_obstacle(obstacle, told, findings.origin))
    for remark in findings.remarks:
        warnings.append(Problem(key="model.path", message=f"{findings.origin} {remark}"))
    notes = (f"{findings.origin}: {'; '.join([*taken, *findings.notes])}",)
    return Merged(values=merged, problems=tuple(problems), warnings=tuple(warnings), notes=notes)


def value_at(values: Any, key: str) -> Any:
    """Return the value of a dotted key, `ABSENT` where there is none."""
    found: Any = values
    for name in key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return ABSENT
        found = found[name]
    return found


def _is_written(values: Mapping[str, Any], key: str) -> bool:
    """Return whether the user has decided about a key."""
    keys = _LABELS if key in _LABELS else (key,)
    return any(value_at(values, key) is not ABSENT for key in keys)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of one section; a section that is none stays for the checks to refuse."""
    section, name = key.split(".")
    inner = values.get(section)
    if isinstance(inner, Mapping | None):
        values[section] = {**(inner or {}), name: value}


def _is_same(key: str, written: Any, value: Any) -> bool:
    """Return whether the user says what the description says."""
    if key == "input.normalize" and isinstance(written, Mapping):
        return bool(_PLAIN_NORMALIZE | dict(written) == _PLAIN_NORMALIZE | value)
    return bool(written == value)


def _contradiction(key: str, written: Any, value: Any, origin: str) -> Problem:
    return Problem(
        key=key,
        message=f"{_shown(written)} contradicts {origin}, which says {_shown(value)}; remove it",
    )


def _overruled(key: str, written: Any, value: Any, origin: str) -> Problem:
    if written is ABSENT:
        message = f"is left out, since output.reduce or output.threshold is set; {origin} says"
        return Problem(key=key, message=f"{message} {_shown(value)}")
    return Problem(
        key=key,
        message=f"{_shown(written)} is used; {origin} says {_shown(value)}",
    )


def _of_obstacle(obstacle: Obstacle, told: Sequence[str], origin: str) -> Problem:
    """Return the refusal, or, where the user has `told` what to do, what is done instead."""
    if told:
        message = f"is used; {origin} asks for {obstacle.found}, which is left out"
        return Problem(key=told[0], message=message)
    message = f"{origin} asks for {obstacle.found}; {obstacle.cure}"
    return Problem(key=obstacle.keys[0], message=message)


def _size_problems(values: Mapping[str, Any], findings: Findings) -> Sequence[Problem]:
    """Return what is wrong with the patch's shape, with the nearest that fits."""
    shape = value_at(values, _SHAPE)
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int for n in shape):
        return ()
    nearest = [
        n if size is None else size.nearest(n)
        for n, size in zip(shape, findings.sizes, strict=True)
    ]
    if nearest == shape:
        return ()
    rules = ", ".join(
        f"{axis} = {size}"
        for axis, size in zip("zyx", findings.sizes, strict=True)
        if isinstance(size, AxisSize)
    )
    message = f"{_shown(shape)} does not fit {findings.origin}: {rules}; the nearest is"
    return (Problem(key=_SHAPE, message=f"{message} {_shown(nearest)}"),)


def _shown(value: Any) -> str:
    """Return a value as YAML on one line would have it, near enough."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.9g}" if isinstance(value, float) else str(value)
