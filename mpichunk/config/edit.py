"""Changes single values in the text of a config, and leaves everything else as the user wrote it.

Works on the places that the YAML parser gives. Knows no keys and no files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mpichunk.config.text import compose, parse, render

_INDENT = 2


def edit(text: str, changes: Mapping[str, Any]) -> str:
    """Return a YAML text with other values for some keys.

    Comments, order and layout stay; where that cannot be done (a value that goes over several
    lines, say), everything is written anew, without comments.

    Args:
        text: a config that `parse` reads, whose top is a mapping or nothing.
        changes: values by dotted key.
    """
    wanted = dict(parse(text, "config").values or {})
    for dotted, value in changes.items():
        path = dotted.split(".")
        wanted = _merged(wanted, path, value)
        text = _with_value(text, path, value)
        if _values(text) != wanted:
            text = render(wanted)
    return text


def render_value(value: Any) -> str:
    """Return a value on one line of YAML."""
    if isinstance(value, Mapping):
        pairs = (f"{render_value(str(key))}: {render_value(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    text: str = render({"x": value})
    return text.partition(": ")[2].strip()


def _merged(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return values with another one at a path."""
    name, *rest = path
    if rest:
        inner = values.get(name)
        value = _merged(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**values, name: value}


def _values(text: str) -> Any:
    """Return what a text says, None if it says nothing sound."""
    try:
        document = parse(text, "config")
    except Exception:
        return None
    return None if document.problems else document.values


def _with_value(text: str, path: Sequence[str], value: Any) -> str:
    """Return the text with one value set, where its place is plain; otherwise anything."""
    top = compose(text)
    if isinstance(top, yaml.MappingNode):
        return _set(text, top, path, value)
    return _appended(text, path[0], _nested(path[1:], value))


def _set(text: str, mapping: yaml.MappingNode, path: Sequence[str], value: Any) -> str:
    """Return the text with a value set below one of its mappings."""
    name, *rest = path
    key, old = _find(mapping, name)
    if key is None or old is None:
        return _added(text, mapping, name, _nested(rest, value))
    if not rest:
        return text[: old.start_mark.index] + render_value(value) + text[old.end_mark.index :]
    if isinstance(old, yaml.MappingNode):
        return _set(text, old, rest, value)
    # A header with nothing below it.
    column = key.start_mark.column + _INDENT
    return _inserted(text, key.end_mark.line, column, rest[0], _nested(rest[1:], value))


def _added(text: str, mapping: yaml.MappingNode, name: str, value: str) -> str:
    """Return the text with a key more in one of its mappings."""
    if mapping.flow_style:
        end = mapping.end_mark.index - 1
        comma = ", " if mapping.value else ""
        return f"{text[:end].rstrip()}{comma}{name}: {value}{text[end:]}"
    first = mapping.value[0][0].start_mark
    if first.column == 0:
        return _appended(text, name, value)
    return _inserted(text, first.line - 1, first.column, name, value)


def _nested(path: Sequence[str], value: Any) -> str:
    """Return a value below further keys, on one line."""
    for name in reversed(path):
        value = {name: value}
    return render_value(value)


def _find(mapping: yaml.MappingNode, name: str) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Return key and value of a name in a mapping."""
    for key, value in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value == name:
            return key, value
    return None, None


def _inserted(text: str, line: int, indent: int, key: str, value: str) -> str:
    """Return the text with a line after one of its lines, counted from 0."""
    lines = text.splitlines(keepends=True)
    if not lines[line].endswith("\n"):
        lines[line] += "\n"
    lines.insert(line + 1, f"{' ' * indent}{key}: {value}\n")
    return "".join(lines)


def _appended(text: str, key: str, value: str) -> str:
    """Return the text with a section more."""
    gap = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{gap}{key}: {value}\n"
