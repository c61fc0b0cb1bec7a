"""Plain values to a Config, or every mistake in them at once, in words.

Turns what pydantic finds into sentences about keys, so that none of its own words reaches the user.
Knows no YAML, no lines and no files.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mpichunk.config.rules import find_problems
from mpichunk.config.schema import Config, flatten
from mpichunk.config.types import Expected, Section
from mpichunk.errors import Problem
from mpichunk.words import either

_ABSENT = object()
_LONGEST_VALUE = 80


def check(values: Mapping[str, Any]) -> Config | list[Problem]:
    """Return the config that the values mean, or everything that is wrong with them.

    A rule that joins several values is applied when those are valid, whatever else is wrong.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        places = [item["loc"] for item in error.errors() if item["loc"]]
    # Several findings in one value, e.g. in two of three numbers, are one mistake.
    mistakes = {problem.key: problem for problem in (_mistake(place, values) for place in places)}
    return [*mistakes.values(), *find_problems(dict(_valid_values(Config, values, "")))]


def _valid_values(section: type[Section], values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield, by dotted key, each value that is valid on its own, defaults too."""
    for name, field in section.model_fields.items():
        if name not in values and field.is_required():
            continue
        value = values.get(name, field.get_default(call_default_factory=True))
        try:
            valid = _adapter(field).validate_python(value)
        except ValidationError:
            inner = _section_class(field)
            if inner is not None and isinstance(value, Mapping):
                yield from _valid_values(inner, value, f"{prefix}{name}.")
            continue
        yield prefix + name, valid
        if isinstance(valid, Section):
            yield from flatten(valid, f"{prefix}{name}.").items()


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotation)


def _mistake(place: Sequence[int | str], values: Any) -> Problem:
    """Return the mistake in the value at a place that pydantic names."""
    section: type[Section] = Config
    path: list[str] = []
    message = ""
    for name in map(str, place):
        path.append(name)
        values = values.get(name, _ABSENT) if isinstance(values, Mapping) else _ABSENT
        field = section.model_fields.get(name)
        if field is None:
            message = _unknown(path, section)
            break
        inner = _section_class(field)
        message = _missing(name, field) if values is _ABSENT else _wrong(values, field)
        if inner is None:
            break
        section = inner
    return Problem(key=".".join(path), message=message)


def _section_class(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, or None when it holds a value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


# Unknown keys


def _unknown(path: list[str], section: type[Section]) -> str:
    """Return what to do about a key that its section does not have."""
    name, here = path[-1], ".".join(path[:-1])
    homes = _homes()
    if name in homes:
        return f"unknown key here; `{name}` belongs {either(homes[name])}"
    near = difflib.get_close_matches(name, section.model_fields, 1)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    # A key written as `patch.window` is one of these too.
    near = difflib.get_close_matches(name.rpartition(".")[2], homes, 1)
    if near:
        return f"unknown key; did you mean `{near[0]}` {either(homes[near[0]])}?"
    where = f"`{here}`" if here else "a config"
    return f"unknown key; {where} has {', '.join(f'`{known}`' for known in section.model_fields)}"


def _homes() -> dict[str, list[str]]:
    """Return, for every key that there is, the places where it may stand."""
    homes: dict[str, list[str]] = {}
    for parent, section in _sections(Config, ""):
        for name in section.model_fields:
            homes.setdefault(name, []).append(f"under `{parent}`" if parent else "at the top level")
    return homes


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    """Yield each section by its dotted key, the whole config as ""."""
    yield prefix.removesuffix("."), section
    for name, field in section.model_fields.items():
        inner = _section_class(field)
        if inner is not None:
            yield from _sections(inner, f"{prefix}{name}.")


# Missing and wrong values


def _missing(name: str, field: FieldInfo) -> str:
    """Return what a missing key is for, with an example."""
    purpose = (field.description or "").removesuffix(".")
    return f"missing. {purpose}, e.g. `{name}: {_example(field)}`"


def _example(field: FieldInfo) -> str:
    """Return an example in YAML; for a section, one with the keys it cannot do without."""
    inner = _section_class(field)
    if inner is None:
        return str((field.examples or ["..."])[0])
    required = {name: known for name, known in inner.model_fields.items() if known.is_required()}
    return "{" + ", ".join(f"{name}: {_example(known)}" for name, known in required.items()) + "}"


def _wrong(found: Any, field: FieldInfo) -> str:
    """Return what was found instead of what."""
    inner = _section_class(field)
    if inner is not None:
        keys = ", ".join(f"`{name}`" for name in inner.model_fields)
        return f"{_shown(found)} must be a section with keys of its own: {keys}"
    expected = _expected(field.annotation, field.metadata)
    if found in (None, "", {}):
        default = "" if field.is_required() else "; leave the key out for the default"
        return f"is empty and must be {expected}{default}"
    return f"{_shown(found)} must be {expected}{_advice(found, expected, _choices(field))}"


def _expected(annotation: Any, metadata: Sequence[Any]) -> str:
    """Return the words that complete "must be" for a type."""
    for item in metadata:
        if isinstance(item, Expected):
            return item.words
    if get_origin(annotation) is Literal:
        return either([f"`{choice}`" for choice in get_args(annotation)])
    for inner in get_args(annotation):
        if get_origin(inner) is Literal:
            return _expected(inner, ())
        if get_origin(inner) is Annotated:
            return _expected(inner.__origin__, inner.__metadata__)
    raise AssertionError(f"{annotation} has no words")


def _choices(field: FieldInfo) -> Sequence[str]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _advice(found: Any, expected: str, choices: Sequence[str]) -> str:
    """Return what to write, where what was meant is plain."""
    near = difflib.get_close_matches(str(found).lower(), choices, 1)
    if near and len(choices) > 1:
        return f"; did you mean `{near[0]}`?"
    numbers = found if isinstance(found, list | tuple) else [found]
    if "number" in expected and any(isinstance(n, str) and _is_number(n) for n in numbers):
        return "; leave out the quotes"
    whole = [n for n in numbers if isinstance(n, float) and n.is_integer()]
    if "whole number" in expected and whole:
        return f"; write {int(whole[0])} instead of {whole[0]}"
    if "three" in expected and isinstance(found, int) and not isinstance(found, bool):
        return f"; write [{found}, {found}, {found}] for the same on every axis"
    if expected == "text":
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    """Return a value as a message shows it: lists as (4, 64, 64), text in quotes."""
    text = _plain(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return repr(value)
