"""Where a volume lies: cloud-volume URL, TensorStore URL, path or spec, brought to one form.

Works on the text alone; opens nothing, and asks no file what it is (that is `metadata`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mpichunk.config.formats import format_by_word
from mpichunk.errors import VolumeError

PRECOMPUTED = "neuroglancer_precomputed"
ZARR2 = "zarr"
ZARR3 = "zarr3"
N5 = "n5"
HDF5 = "hdf5"
SYNTHETIC = "synthetic"

FORMAT_NAMES: Mapping[str, str] = {
    PRECOMPUTED: "precomputed",
    ZARR2: "zarr2",
    ZARR3: "zarr3",
    N5: "n5",
    HDF5: "hdf5",
}
"""What the user calls each TensorStore driver, and HDF5."""

DRIVERS: Mapping[str, str] = {name: driver for driver, name in FORMAT_NAMES.items()}
"""The other way round."""

_STORES = ("file", "gs", "s3", "http", "https")
_KNOWN = (
    "known are precomputed, zarr2, zarr3, n5 and auto; an HDF5 file is given by its path alone, "
    "a computed volume as synthetic://membranes?shape=..."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A volume's place and, where the text tells it, its format."""

    driver: str | None
    """TensorStore driver, `hdf5`, `synthetic`; None where only the files can tell."""

    store: str | dict[str, Any]
    """TensorStore key-value store, as URL or spec; the whole URL of a computed volume."""

    options: dict[str, Any] = field(default_factory=dict)
    """Other members of a TensorStore spec, as the user gave them."""

    @property
    def path(self) -> Path | None:
        """The folder or file on a file system; None elsewhere."""
        if isinstance(self.store, dict) and self.store.get("driver") == "file":
            return Path(self.store["path"])
        return None

    @property
    def context(self) -> dict[str, Any] | None:
        """The TensorStore context that the spec brings, e.g. credentials: to be opened with."""
        return self.options.get("context")

    @property
    def place(self) -> str:
        """The place as an absolute URL, without the format."""
        if self.path is not None:
            return f"file://{self.path}"
        return self.store.rstrip("/") if isinstance(self.store, str) else str(self.store)

    def __str__(self) -> str:
        if self.driver in (None, SYNTHETIC):
            return self.place
        name = "neuroglancer-precomputed" if self.driver == PRECOMPUTED else self.driver
        return f"{self.place}|{'zarr2' if name == ZARR2 else name}"


def parse_address(volume: str | dict[str, Any]) -> Address:
    """Return where `volume` lies.

    Understands `precomputed://file:///a/b`, `zarr2://`, `zarr3://`, `n5://` (cloud-volume's way),
    `file:///a/b|zarr3:` (TensorStore's), `synthetic://...`, paths, and TensorStore specs. A
    relative path starts from the working directory. As in TensorStore, a `%20` after `file://` is a
    space where `|driver:` follows.

    Raises:
        VolumeError: the notation is not understood, or a driver or scheme is not known.
    """
    if isinstance(volume, dict):
        return _parse_spec(volume)
    if not volume.strip():
        raise VolumeError("the volume is an empty string; expected a path or a URL")
    scheme, separator, rest = volume.partition("://")
    if separator and scheme == SYNTHETIC:
        return Address(driver=SYNTHETIC, store=volume)
    if separator and scheme not in _STORES and "|" not in scheme:
        if "|" in rest:
            raise VolumeError(f"{volume}: give the format once, before :// or after |")
        return Address(driver=_driver(scheme, volume), store=_store(rest, volume))
    if "|" not in volume:
        return Address(driver=None, store=_store(volume, volume))
    base, _, last = volume.rpartition("|")
    name, _, inner = last.partition(":")
    if "|" not in base and base.startswith("file://"):
        base = unquote(base)
    if inner:
        base = base.rstrip("/") + "/" + inner
    return Address(driver=_driver(name, volume), store=_store(base, volume))


def _parse_spec(spec: dict[str, Any]) -> Address:
    """Return the address that a TensorStore spec gives."""
    if not isinstance(spec.get("driver"), str) or "kvstore" not in spec:
        raise VolumeError(
            f"{spec} is not a TensorStore spec; expected members `driver` and `kvstore`"
        )
    store, inner = spec["kvstore"], str(spec.get("path", "")).strip("/")
    if isinstance(store, str):
        store = _store(unquote(store) if store.startswith("file://") else store, store)
    if not isinstance(store, dict) and inner:
        store = f"{store}{inner}/"
    if isinstance(store, dict) and "path" in store:
        path = os.path.join(str(store["path"]), inner)
        local = store.get("driver") == "file"
        store = store | {"path": _folder(path) if local else path}
    options = {k: v for k, v in spec.items() if k not in ("driver", "kvstore", "path")}
    return Address(driver=_driver(spec["driver"], spec), store=store, options=options)


def _driver(name: str, volume: object) -> str | None:
    """Return the TensorStore driver of that name, None for `auto`."""
    if name.strip().lower() == "auto":
        return None
    found = format_by_word(name)
    if found is None:
        raise VolumeError(f"{volume}: unknown format {name!r}; {_KNOWN}")
    return DRIVERS[found]


def _store(base: str, volume: object) -> str | dict[str, Any]:
    """Return the key-value store of a path or URL that names no format."""
    if "|" in base:
        return base
    scheme, separator, rest = base.partition("://")
    if not separator or scheme == "file":
        path = rest if separator else base
        if not path:
            raise VolumeError(f"{volume} holds no path")
        return {"driver": "file", "path": _folder(path)}
    if scheme not in _STORES:
        raise VolumeError(
            f"{volume}: unknown scheme {scheme}://; known are {', '.join(_STORES)} and synthetic"
        )
    return base if base.endswith("/") or "?" in base else base + "/"


def _folder(path: str) -> str:
    """Return the absolute path with the slash at its end that a key prefix needs."""
    return os.path.abspath(os.path.expanduser(path)).rstrip("/") + "/"
