"""YAML 1.2 text to plain values with the line of each key, and back.

Stricter and plainer than PyYAML's own reader: a key given twice is a mistake, `1e-3` is a number,
`no` and `2024-01-01` are text, and so is `file://out|zarr3:` without quotes. Knows no config keys
and no files.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mpichunk.errors import ConfigError, Problem

_TAG = "tag:yaml.org,2002:"
_MAX_DIGITS = 1000
_TENSORSTORE_URL = re.compile(
    r"""[^\s'"#,\[\]{}|](?:(?!:\s|\s\#)[^\n\r,\[\]{}])*\|[\w.-]+:(?=[^\S\n\r]*(?:[\n\r\0,\]}]|\s\#))"""
)
_CORE_SCHEMA = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    "str": re.compile(r""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a YAML text says."""

    values: Any
    """Mappings, lists, text, numbers, true, false and null; keys are always text."""

    lines: dict[str, int]
    """1-based line of each dotted key."""

    problems: list[Problem]
    """Keys given twice."""


def parse(text: str, source: str) -> Document:
    """Return the values and lines of a YAML text; None for a text without any.

    Args:
        text: the whole text.
        source: what a message calls it, e.g. "config.yaml".

    Raises:
        ConfigError: the text is not YAML; the message has its line and column.
    """
    keys: list[tuple[str, int]] = []
    try:
        node = _Loader(text).get_single_node()
        values = None if node is None else _value(node, "", keys)
    except yaml.MarkedYAMLError as error:
        raise _refusal(source, text, error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"is not a text file: it holds the character {chr(error.character)!r}"
        raise _error(f"{source}:{line}", message) from None
    except RecursionError:
        raise _error(source, "is nested too deeply, or refers to itself") from None
    return Document(values=values, lines=dict(keys), problems=list(_duplicates(keys)))


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, with their places in it; None for a text without any.

    The text is one that `parse` reads.
    """
    node: yaml.Node | None = _Loader(text).get_single_node()
    return node


def render(values: Mapping[str, Any]) -> str:
    """Return YAML that `parse` reads as equal values, lists on one line."""
    text: str = yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return text


class _Loader(yaml.SafeLoader):
    """Reads text into nodes, tagged by the core schema of YAML 1.2."""

    buffer: str
    pointer: int

    def fetch_plain(self) -> None:
        """Take a TensorStore URL whole: to YAML, the colon that ends it would make it a key."""
        url = _TENSORSTORE_URL.match(self.buffer, self.pointer)
        if url is None:
            super().fetch_plain()
            return
        self.save_possible_simple_key()
        self.allow_simple_key = False
        start = self.get_mark()
        self.forward(len(url[0]))
        self.tokens.append(yaml.ScalarToken(url[0], True, start, self.get_mark()))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else; writes lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list_node(dumper: _Dumper, data: list[Any] | tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence(f"{_TAG}seq", data, flow_style=True)


def _mapping_node(dumper: _Dumper, data: dict[str, Any]) -> yaml.Node:
    return dumper.represent_mapping(f"{_TAG}map", data, flow_style=not data)


def _text_node(dumper: _Dumper, data: str) -> yaml.Node:
    # Other styles would fold line breaks of all kinds, e.g. U+0085, into spaces.
    return dumper.represent_scalar(f"{_TAG}str", data, style=None if data.isprintable() else '"')


_Loader.yaml_implicit_resolvers = {}
for _name in ("null", "bool", "int", "float"):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _CORE_SCHEMA[_name], None)
_Dumper.add_representer(str, _text_node)
_Dumper.add_representer(list, _list_node)
_Dumper.add_representer(tuple, _list_node)
_Dumper.add_representer(dict, _mapping_node)


def _value(node: yaml.Node, prefix: str, keys: list[tuple[str, int]]) -> Any:
    """Return what a node means, and append its dotted keys and their lines to `keys`."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(item, f"{prefix}{i}.", keys) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
        raise _misfit(node, f"the tag {node.tag!r} is not known here")
    mapping = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _misfit(key, "a key must be text")
        keys.append((prefix + key.value, key.start_mark.line + 1))
        mapping[str(key.value)] = _value(value, f"{prefix}{key.value}.", keys)
    return mapping


def _scalar(node: yaml.ScalarNode) -> Any:
    """Return the text, number, truth value or None of a node."""
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind not in _CORE_SCHEMA:
        raise _misfit(node, f"the tag {node.tag!r} is not known here")
    if not _CORE_SCHEMA[kind].match(text) or (kind == "int" and len(text) > _MAX_DIGITS):
        raise _misfit(node, f"{text[:40]!r} is not of the type {kind!r}")
    return _CONVERSIONS[kind](text)


def _int(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    return int(text[2:], bases[text[:2]]) if text[:2] in bases else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": _int,
    "float": _float,
    "str": str,
}


def _misfit(node: yaml.Node, problem: str) -> "_MisfitError":
    return _MisfitError(problem=problem, problem_mark=node.start_mark)


class _MisfitError(yaml.MarkedYAMLError):
    """YAML, but not of the kind that a config may hold."""


def _duplicates(keys: list[tuple[str, int]]) -> Iterator[Problem]:
    """Yield a problem for each key that stands in the text more than once."""
    lines: dict[str, list[int]] = {}
    for key, line in keys:
        lines.setdefault(key, []).append(line)
    repeated = {key for key, found in lines.items() if len(found) > 1}
    for key, found in lines.items():
        # The keys below a section given twice are not twice in one section.
        if key in repeated and not any(parent in repeated for parent in _parents(key)):
            distinct = sorted(set(found))
            where = f", on lines {', '.join(map(str, distinct))}" if distinct[1:] else ""
            yield Problem(key=key, message=f"given {len(found)} times{where}; keep one")


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _refusal(source: str, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    """Return the error of a text that is not YAML."""
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    around = text.splitlines()[max(0, line - 2) : line]
    if any("\t" in one[: len(one) - len(one.lstrip())] for one in around):
        return _error(
            f"{source}:{line}:{column}", "is indented with a tab; YAML allows spaces only"
        )
    what = ", ".join(part.replace("\n", " ") for part in (error.context, error.problem) if part)
    if not isinstance(error, _MisfitError):
        what = f"is not YAML: {what}; look at indentation, quotes and brackets up to here"
    return _error(f"{source}:{line}:{column}", what)


def _error(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(key="", message=message)], [f"{where}: {message}"])
