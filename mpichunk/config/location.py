"""How a config names volumes and networks: URLs, TensorStore specs, paths, `file.py:Name`.

Works on text, and asks the file system only where a symbolic link leads. Opens nothing and knows
no driver beyond its name.
"""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mpichunk.config.formats import format_by_suffix, format_by_word

Volume = str | dict[str, Any]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_READ_ONLY = ("synthetic://", "http://", "https://")
_CODE = re.compile(r"(.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_SAVED_NETWORK = re.compile(r".*\.(pt2?|pth|ts|onnx|xml)")


def volume_format(volume: Volume) -> str | None:
    """Return the format that the text alone tells, or None where only the files can tell.

    Returns:
        `precomputed`, `zarr2`, `zarr3`, `n5`, `hdf5`, `synthetic` or None. A path that ends in
        `.zarr` is `zarr3`, which is what a new one becomes.
    """
    if isinstance(volume, dict):
        return format_by_word(str(volume.get("driver")))
    if "|" in volume:
        return format_by_word(volume.rpartition("|")[2].partition(":")[0])
    if volume.startswith("synthetic://"):
        return "synthetic"
    scheme, separator, _ = volume.partition("://")
    return (separator and format_by_word(scheme)) or format_by_suffix(volume)


def is_read_only(volume: Volume) -> bool:
    """Return whether nothing can ever be written there."""
    return isinstance(volume, str) and _unwrap(volume)[1].startswith(_READ_ONLY)


def place(volume: Volume) -> str:
    """Return where the bytes of a volume lie; equal for two spellings of one place."""
    if isinstance(volume, dict):
        store = volume.get("kvstore")
        if isinstance(store, str):
            return place(store + "|auto:")
        if isinstance(store, dict) and store.get("driver") == "file":
            return place(os.path.join(str(store.get("path")), str(volume.get("path", ""))))
        return json.dumps(volume, sort_keys=True, default=str)
    head, pipe, rest = _unwrap(volume)[1].partition("|")
    path = head.removeprefix("file://")
    if pipe and path != head:
        path = unquote(path)
    return os.path.join(path, rest.rpartition("|")[2].partition(":")[2]).rstrip("/")


def resolve_volume(volume: Volume, base: str) -> Volume:
    """Return the volume with a relative path made absolute; other schemes stay as they are.

    Args:
        volume: URL, path or TensorStore spec.
        base: absolute directory that relative paths start from.

    Returns:
        The same notation. Only a path before `|driver:` gains `file://`, which TensorStore needs.
    """
    if isinstance(volume, dict):
        return {key: _resolve_spec_value(volume, key, base) for key in volume}
    if "|" in volume:
        return _resolve_pipeline(volume, base)
    wrapper, inner = _unwrap(volume)
    if inner.startswith("file://"):
        return f"{wrapper}file://{resolve_path(inner.removeprefix('file://'), base)}"
    return wrapper + (inner if _SCHEME.match(inner) else resolve_path(inner, base))


def resolve_path(path: str, base: str) -> str:
    """Return the absolute path; a leading `~` is the home directory."""
    path = os.path.expanduser(path)
    joined = os.path.join(base, path)
    normal = os.path.normpath(joined)
    # Text that goes up from a symbolic link does not lead where the file system would go.
    if ".." in Path(path).parts and os.path.realpath(normal) != os.path.realpath(joined):
        normal = joined
    return normal.rstrip("/") + "/" if path.endswith("/") else normal


def split_model_path(path: str) -> tuple[str, str] | None:
    """Return what holds the code and the name in it, or None for the file of a saved network.

    A file, an importable module, and a saved network:

    nets/unet.py:UNet    -> ("nets/unet.py", "UNet")
    package.module:UNet  -> ("package.module", "UNet")
    net.pt               -> None
    """
    match = _CODE.fullmatch(path)
    if match is None or _SAVED_NETWORK.fullmatch(match[1]):
        return None
    return match[1], match[2]


def resolve_model_path(path: str, base: str) -> str:
    """Return the path of a network made absolute; a module stays as it is."""
    code = split_model_path(path)
    if code is None:
        return resolve_path(path, base)
    where, name = code
    return f"{resolve_path(where, base)}:{name}" if where.endswith(".py") else path


def model_path_mistake(path: str) -> str | None:
    """Return what is wrong with the notation of a network's path, or None."""
    if split_model_path(path) is not None:
        return None
    where, colon, name = path.rpartition(":")
    if path.endswith(".py") or where.endswith(".py"):
        file = where if colon else path
        return f"{path!r} does not name the network in the file; write {file}:Name"
    if colon and name.isidentifier() and _SAVED_NETWORK.fullmatch(where):
        return f"{path!r} names something in a saved network; only Python code takes `:Name`"
    return None


def _unwrap(volume: str) -> tuple[str, str]:
    """Return a leading `precomputed://` or the like, or "", and the rest."""
    scheme, separator, rest = volume.partition("://")
    if separator and format_by_word(scheme):
        return scheme + separator, rest
    return "", volume


def _resolve_pipeline(url: str, base: str) -> str:
    """Resolve the first part of a TensorStore URL; there, `file://` is followed by %-escapes."""
    head, pipe, rest = url.partition("|")
    if head.startswith("file:///") or (_SCHEME.match(head) and not head.startswith("file://")):
        return url
    path = unquote(head.removeprefix("file://")) if head.startswith("file://") else head
    return f"file://{_escape(resolve_path(path, base))}{pipe}{rest}"


def _resolve_spec_value(spec: dict[str, Any], key: str, base: str) -> Any:
    """Return spec[key] with the relative paths of file stores made absolute."""
    value = spec[key]
    if key == "path" and spec.get("driver") == "file" and isinstance(value, str):
        return resolve_path(value, base)
    if key in ("kvstore", "base") and isinstance(value, str):
        return _resolve_pipeline(value, base)
    if isinstance(value, dict):
        return {name: _resolve_spec_value(value, name, base) for name in value}
    if isinstance(value, list):
        return [resolve_volume(v, base) if isinstance(v, dict) else v for v in value]
    return value


def _escape(path: str) -> str:
    """Escape what a TensorStore URL would not take as part of a path."""
    return "".join(f"%{ord(c):02X}" if c in "%#?|" else c for c in path)
