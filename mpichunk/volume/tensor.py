"""The calls to TensorStore: limits, keys of a store, opening, virtual stores, axes turned to czyx.

Knows no format by name beyond what it passes on.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple, subtract, triple
from mpichunk.geometry.buffers import CACHE_NBYTES
from mpichunk.volume.future import cause
from mpichunk.volume.source import Fetch, VolumeFacts

METADATA_SECONDS = 60
"""How long a store may take to answer about metadata; its own retries go on for much longer."""


_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'")
_LOCAL_FILE = re.compile(r'local file "([^"]+)"')

Store = str | dict[str, Any]
"""A key-value store, as URL or spec."""

Context = Mapping[str, Any] | None
"""What a volume's spec brings of TensorStore context, e.g. credentials."""


def make_context(num_threads: int | None, *, cache_nbytes: int = 0, extra: Context = None) -> Any:
    """Return the limits under which one volume is read or written.

    Args:
        num_threads: threads that encode, decode and copy; None leaves it to TensorStore.
        cache_nbytes: memory of the chunk cache.
        extra: further TensorStore context, e.g. credentials.
    """
    limits: dict[str, Any] = {
        "cache_pool": {"total_bytes_limit": cache_nbytes},
        # A write unit has one writer, so that no lock is needed; some parallel file systems have
        # none. Without one, TensorStore writes to a name of its own and renames.
        "file_io_locking": {"mode": "none"},
    }
    if num_threads is not None:
        limits["data_copy_concurrency"] = {"limit": num_threads}
        limits["file_io_concurrency"] = {"limit": max(4, num_threads)}
    return ts.Context(limits | dict(extra or {}))


def read_key(store: Store, key: str, extra: Context) -> bytes | None:
    """Return the bytes of one key of a key-value store, or None if there is no such key.

    `extra` is the context of the volume's spec, as for `make_context`.

    Raises:
        VolumeError: the store cannot be read.
    """
    try:
        opened = ts.KvStore.open(store, context=make_context(None, extra=extra)).result()
        result = opened.read(key).result(timeout=METADATA_SECONDS)
    except Exception as error:
        raise VolumeError(f"{key} cannot be read: {_cause(error)}") from error
    return bytes(result.value) if result.state == "value" else None


def read_json(store: Store, key: str, extra: Context) -> dict[str, Any] | None:
    """Return the JSON object of one key, or None if there is no such key; see `read_key`.

    Raises:
        VolumeError: the store cannot be read, or the value is not a JSON object.
    """
    text = read_key(store, key, extra)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise VolumeError(f"its {key} is not JSON ({error}); rewrite it") from error
    if not isinstance(value, dict):
        raise VolumeError(f"its {key} holds {type(value).__name__}; expected a JSON object")
    return value


def write_key(store: Store, key: str, value: bytes, extra: Context) -> None:
    """Write one key durably; `extra` as for `read_key`.

    Raises:
        VolumeError: it cannot be written.
    """
    try:
        opened = ts.KvStore.open(store, context=make_context(None, extra=extra)).result()
        opened.write(key, value).result(timeout=METADATA_SECONDS)
    except Exception as error:
        raise VolumeError(f"{key} cannot be written: {_cause(error)}") from error


def open_store(spec: Mapping[str, Any], context: Any, **how: Any) -> Any:
    """Return the opened TensorStore.

    Raises:
        VolumeError: it cannot be opened or created; the message is only the cause.
    """
    try:
        return ts.open(dict(spec), context=context, **how).result(timeout=METADATA_SECONDS)
    except Exception as error:
        raise VolumeError(_cause(error)) from error


def to_czyx(store: Any, axes: str, start: Triple) -> Any:
    """Return a view with axes c, z, y, x (c added where there is none), first voxel at `start`."""
    store = store[ts.d[:].mark_bounds_implicit[False]][ts.d[:].label[("",) * len(axes)]]
    if "c" not in axes:
        store, axes = store[ts.newaxis], "c" + axes
    store = store.transpose([axes.index(axis) for axis in "czyx"])
    return store[ts.d[:].translate_to[(0, *start)]][ts.d[:].label[tuple("czyx")]]


def virtual_store(
    fetch: Fetch, facts: VolumeFacts, num_threads: int | None, chunk_shape: Triple
) -> Any:
    """Return a TensorStore (c, z, y, x) whose chunks a Python function computes or reads.

    `fetch` is asked for whole chunks, anchored at the first voxel, clipped to the volume.
    """

    def read_chunk(domain: Any, chunk_czyx: Any, _: Any) -> None:
        box = Box.from_shape(triple(domain.origin[1:]), triple(domain.shape[1:]))
        channels = slice(domain.origin[0], domain.origin[0] + domain.shape[0])
        chunk_czyx[...] = fetch(box.translate(subtract((0, 0, 0), start)))[channels]

    start, shape = facts.start, (facts.num_channels, *facts.shape)
    return ts.virtual_chunked(
        read_chunk,
        dtype=ts.dtype(facts.dtype),
        domain=ts.IndexDomain(inclusive_min=(0, *start), shape=shape, labels=tuple("czyx")),
        chunk_layout=ts.ChunkLayout(
            read_chunk_shape=(facts.num_channels, *chunk_shape), grid_origin=(0, *start)
        ),
        context=make_context(num_threads, cache_nbytes=CACHE_NBYTES),
    )


def is_refusal(error: BaseException | None) -> bool:
    """Return whether it was a file system that refused what TensorStore asked of it."""
    return _OS_ERROR.search(str(error)) is not None


def _cause(error: Exception) -> str:
    """Return the text of an error met while metadata were read or written."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer in {METADATA_SECONDS} seconds; is the network up, the name right?"
    # What a file system has refused is told in its own words, and of which file.
    number, file = _OS_ERROR.search(str(error)), _LOCAL_FILE.search(str(error))
    if number is None:
        return cause(error)
    return (f"{file[1]}: " if file else "") + os.strerror(int(number[1]))
