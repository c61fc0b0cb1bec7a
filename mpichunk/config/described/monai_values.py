"""The values of a MONAI bundle's config, with references followed and nothing executed.

`@a::b` is the value at b within a. `$...` is Python and `%...` a text macro: those stay what they
are, marked. Knows no key of a bundle.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REFERENCE = re.compile(r"\$?@([\w:#.-]+)\s*")
_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class Code:
    """A value that only code could tell."""

    text: str
    """As it stands in the bundle."""

    def __str__(self) -> str:
        return self.text


def value_of(config: Mapping[str, Any], value: Any, depth: int = 0) -> Any:
    """Return a value with all that it refers to in its place."""
    if isinstance(value, Mapping):
        return {str(key): value_of(config, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [value_of(config, item, depth + 1) for item in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$", "%"):
        return value
    reference = _REFERENCE.fullmatch(value)
    if reference is None or depth > _DEEPEST:
        return Code(value)
    found: Any = config
    for name in re.split(r"::|#", reference[1]):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return Code(value)
    return value_of(config, found, depth + 1)


def code_in(value: Any) -> str | None:
    """Return the first thing in a value that is no plain value: code, or an object to be made."""
    if isinstance(value, Code):
        return value.text
    if isinstance(value, Mapping):
        if "_target_" in value:
            return f"{{_target_: {value['_target_']}}}"
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := code_in(item)) is not None), None)
    return None
