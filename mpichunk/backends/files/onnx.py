"""Which other files an ONNX file keeps its weights in, without any package of ONNX.

Walks protobuf's wire format down to the few fields that name files. Knows nothing else of ONNX.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from mpichunk.backends.files.source import existing_file
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from mpichunk.words import count

_FORMS = "expected an .onnx file"
_INNER = {
    # Fields that hold messages, as in onnx.proto: their numbers and what they are.
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def onnx_files(model: Model) -> list[Path]:
    """Return the ONNX file of `model.path`, and those that hold its weights.

    Raises:
        ModelError: a file is missing, or is no ONNX file.
    """
    if not model.path:
        raise ModelError(f"model.path is missing; {_FORMS}", key="model.path")
    path = existing_file(Path(model.path), "model.path", _FORMS)
    try:
        names = sorted(set(_external_files(path)))
    except ValueError as error:
        raise ModelError(
            f"{path} is not an ONNX file, or is cut short: {error}", key="model.path"
        ) from error
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(
                f"{path} keeps weights in {name!r}, outside its own folder", key="model.path"
            )
    return [path, *(existing_file(path.parent / name, "model.path") for name in names)]


def _external_files(path: Path) -> Iterator[str]:
    """Yield the names of the files that tensors are in."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _files_below(data, "model", 0, len(data))


def _files_below(data: mmap.mmap, kind: str, start: int, stop: int) -> Iterator[str]:
    """Yield the names of files within one message."""
    if kind == "entry":
        key, value = _entry(data, start, stop)
        if key == "location":
            yield value
        return
    for field, first, last in _fields(data, start, stop):
        inner = _INNER[kind].get(field)
        if inner is not None:
            yield from _files_below(data, inner, first, last)


def _entry(data: mmap.mmap, start: int, stop: int) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    found = {
        field: data[a:b].decode(errors="replace") for field, a, b in _fields(data, start, stop)
    }
    return found.get(_KEY, ""), found.get(_VALUE, "")


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first and last byte of the fields of a message that have a length."""
    while start < stop:
        tag, start = _varint(data, start, stop)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, start = _varint(data, start, stop)
        elif wire == _BYTES:
            length, first = _varint(data, start, stop)
            start = first + length
            if start > stop:
                raise ValueError(f"a field ends {count(start - stop, 'byte')} past the end")
            yield field, first, start
        elif wire in (_FIXED64, _FIXED32):
            start += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"no field of protobuf begins at byte {start}")
    if start != stop:
        raise ValueError("its last field is incomplete")


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """Return a number of variable length, and where the next begins."""
    value = shift = 0
    while start < stop and shift < 70:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
    raise ValueError("a number is incomplete")
