"""What a torch.export file (.pt2) asks torch to do, looked at before torch reads it.

torch turns text of such a file into Python: names of functions, expressions of sizes, guards. Here
each must be plain arithmetic or a tensor operation. Imports no torch.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OPERATION = re.compile(r"torch\.ops\.(aten|prims|higher_order)\.(?!from_file)\w+(\.\w+)?")
_ARITHMETIC = re.compile(
    r"(_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|and_|or_|not_|eq|ne|lt|le|gt|ge"
    r"|getitem|index)"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.(sym_\w+|_sym_\w+))"
)
_MODEL = "models/model.json"
_MEMBER = re.compile(
    r"models/model\.json"
    r"|data/weights/(weight_[0-9]+|model_weights_config\.json|model\.pt)"
    r"|data/constants/((tensor|weight)_[0-9]+|model_constants_config\.json|model\.pt)"
    r"|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|version|byteorder|\.data/\w+|extra/[\w./-]+",
    re.ASCII,
)
"""What torch.export.save writes, of objects only tensors; torch runs much of what else it finds."""

_NAME = re.compile(r"[\w.]*")
_TEXT = re.compile(r"[\w\s\[\]{}\",:.\\>/+-]*")
"""Without parentheses and single quotes no call can be hidden in it."""

_ARITHMETIC_NODES = (
    ast.Expression,
    ast.BoolOp,
    ast.boolop,
    ast.UnaryOp,
    ast.unaryop,
    ast.BinOp,
    ast.operator,
    ast.Compare,
    ast.cmpop,
    ast.Call,
    ast.keyword,
    ast.Subscript,
    ast.Attribute,
    ast.Name,
    ast.Constant,
    ast.Load,
)
_METHODS = "size", "stride", "storage_offset"
_FUNCTIONS = re.compile(r"[A-Z]\w*|max|min|abs|int|float|bool|len")
"""Expressions of sizes call sympy's functions, which begin with a capital letter."""


def strange_parts(path: Path) -> list[str]:
    """Return what in a file could run more than a network; nothing for those that torch wrote.

    Raises:
        ValueError: the archive or the network's description in it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            strange = list(_strange_members(names))
            if strange:
                return strange
            network = json.loads(archive.read(_network_name(names)))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return list(_strange("", network))


def plain_copy(path: Path) -> io.BytesIO:
    """Return the members that `strange_parts` sees, in an archive of their own.

    Archives can be made that Python and torch read differently: torch gets what was looked at.

    Raises:
        ValueError: as `strange_parts`.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as plain:
            for name in archive.namelist():
                plain.writestr(name, archive.read(name))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    copy.seek(0)
    return copy


def schema_version(path: Path) -> tuple[str, str]:
    """Return the version of the description, and the torch that wrote it, as far as they are told.

    Raises:
        ValueError: as `strange_parts`.
    """
    with zipfile.ZipFile(path) as archive:
        network = json.loads(archive.read(_network_name(archive.namelist())))
    version = network.get("schema_version", {})
    numbers = ".".join(str(version.get(part, "?")) for part in ("major", "minor"))
    return numbers, str(network.get("torch_version") or "unknown")


def _network_name(names: list[str]) -> str:
    """Return the member that describes the network.

    Raises:
        ValueError: there is none.
    """
    for name in names:
        if name.partition("/")[2] == _MODEL:
            return name
    raise ValueError(f"it holds no {_MODEL}")


def _strange_members(names: list[str]) -> Iterator[str]:
    """Yield the members that torch.export.save does not write, or not twice.

    torch takes all below models/ for networks, and finds members whatever the case of their names.
    """
    root = names[0].partition("/")[0] if names else ""
    seen = set()
    for name in names:
        folder, _, member = name.partition("/")
        if folder != root or not _MEMBER.fullmatch(member) or name.casefold() in seen:
            yield name
        seen.add(name.casefold())


def _strange(key: str, value: Any) -> Iterator[str]:
    """Yield what is no plain arithmetic below a value; where it came from is not looked at."""
    if key == "metadata":
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _NAME.fullmatch(name):
                yield name
            yield from _strange(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strange(key, inner)
    elif isinstance(value, str) and not _is_plain(key, value):
        yield value


def _is_plain(key: str, text: str) -> bool:
    """Return whether the text at a key means a tensor operation, arithmetic or a name."""
    if key == "target":
        named = "." in text or text.startswith(("torch", "math", "#", "_operator"))
        known = _OPERATION.fullmatch(text) or _ARITHMETIC.fullmatch(text)
        return bool(known) or not named
    if key in ("expr_str", "guards_code"):
        return _is_arithmetic(text)
    return bool(_TEXT.fullmatch(text))


def _is_arithmetic(text: str) -> bool:
    """Return whether an expression only computes with numbers and sizes."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    """Return whether one node of an expression can do nothing but compute."""
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):
            return _FUNCTIONS.fullmatch(function.id) is not None
        return isinstance(function, ast.Attribute)
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _NAME.fullmatch(node.value) is not None
    return isinstance(node, _ARITHMETIC_NODES)
