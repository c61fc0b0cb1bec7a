"""The output volume: created once by one rank, then written by all, whole write units at a time.

Knows no blocks. Creating and writing are apart: who writes never creates.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mpichunk.errors import VolumeError
from mpichunk.geometry.box import Box, Triple
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.geometry.write_parts import write_parts
from mpichunk.volume.address import PRECOMPUTED, ZARR2, Address, parse_address
from mpichunk.volume.cloud import has_suffixed_files
from mpichunk.volume.future import BlockFuture
from mpichunk.volume.layout import (
    AXES,
    WRITABLE,
    Layout,
    OutputSpec,
    attributes_json,
    check_spec,
    creation_json,
    differences,
    found_layout,
    wanted_layout,
)
from mpichunk.volume.metadata import array_metadata, attributes_of, detect, format_by_name
from mpichunk.volume.reader import read_box
from mpichunk.volume.source import keyed
from mpichunk.volume.tensor import is_refusal, make_context, open_store, to_czyx, write_key
from mpichunk.volume.writing import Writing

METADATA = ("zarr.json", "attributes.json", "info", "provenance")
"""Files of a volume that are no chunks; those of zarr 2 are hidden."""

EXPECTED = "expected a place that this job can write to: choose another one, or fix this"
"""Ends what is said of a place that cannot be written."""


class Writer:
    """An existing output volume, opened for writing."""

    def __init__(self, info: VolumeInfo, store: Any, write_unit: Triple) -> None:
        self.info = info
        self._store = store
        self._write_unit = write_unit

    def write(self, core: Box, core_czyx: npt.NDArray[Any]) -> Writing:
        """Begin to write the voxels of `core`, (c, z, y, x) in the output's dtype.

        The array must not change before `result` has returned. A write unit that only zero is
        written to is not stored, or removed.

        Raises:
            ValueError: the array or the box does not fit the output.
        """
        expected = (self.info.num_channels, *core.shape)
        if core_czyx.shape != expected or core_czyx.dtype != self.info.dtype:
            raise ValueError(
                f"{core_czyx.dtype} {core_czyx.shape}; expected {self.info.dtype} {expected}"
            )
        if not self.info.domain.contains(core):
            raise ValueError(f"{core} reaches past {self.info.domain} of {self.info.location}")
        location = self.info.location
        disk = (location.rpartition("|")[0] or location).removeprefix("file://")
        task = f"write {core} of {location}"

        def begin(part: Box) -> BlockFuture[None]:
            part_czyx = core_czyx[(slice(None), *part.slices(core.start))]
            futures = self._store[(slice(None), *part.slices())].write(part_czyx)
            return BlockFuture(futures.commit, task=task, finish=lambda _: None, disk=disk)

        voxel_nbytes = self.info.num_channels * self.info.dtype.itemsize
        origin = self.info.domain.start
        return Writing(
            write_parts(core, origin, self._write_unit, voxel_nbytes), begin, voxel_nbytes
        )

    def read(self, core: Box) -> npt.NDArray[Any]:
        """Return (c, z, y, x) as it is stored.

        Raises:
            BlockError: it cannot be read.
        """
        return read_box(self._store, core, self.info.location).result()


def check_output(spec: OutputSpec, *, sources: Sequence[VolumeInfo] = ()) -> bool:
    """Return whether the output exists already; touch nothing.

    Raises:
        VolumeError: what exists differs, its place is taken or not writable, it is one of the
            `sources`, or the format cannot hold it.
    """
    with keyed("output"):
        return _check(_address(spec), spec, sources)


def holds_chunks(spec: OutputSpec) -> bool:
    """Return whether anything has been written to an existing output.

    Looked for in files only; of other stores nobody says no without listing all of their keys.

    Raises:
        VolumeError: its notation is not understood.
    """
    with keyed("output"):
        path = _address(spec).path
    if path is None:
        return False
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return any(file.name not in METADATA and not _is_passing(file.name) for file in files)


def create_output(spec: OutputSpec, *, sources: Sequence[VolumeInfo] = ()) -> bool:
    """Create the output, or accept one that exists and agrees; return whether it was created.

    Called by one rank, before any rank calls `open_output`. Deletes nothing, ever.

    Args:
        spec: the output.
        sources: volumes that are read, which the output must not replace.

    Raises:
        VolumeError: as `check_output`, or it cannot be created.
    """
    with keyed("output"):
        address = _address(spec)
        if _check(address, spec, sources):
            return False
        if address.path is not None:
            _make_folder(address.path)
        try:
            _create(address, spec)
        except VolumeError as error:
            told = f"{address} cannot be created: {error.message}{_expected(error)}"
            raise VolumeError(told) from error
        return True


def open_output(spec: OutputSpec, *, num_threads: int | None = None) -> Writer:
    """Open the output for writing on any rank; never create it.

    Raises:
        VolumeError: this host does not see it, sees another, or must not write there.
    """
    with keyed("output"):
        address = _address(spec)
        if not _check(address, spec, ()):
            raise VolumeError(
                f"{address} is not visible on {os.uname().nodename}, though it was created where "
                "the run was started: put it on a file system that all hosts share"
            )
        context = make_context(num_threads, extra=address.context)
        try:
            store = open_store(_spec_json(address), context, open=True, read=True, write=True)
        except VolumeError as error:
            told = f"{address} cannot be opened: {error.message}{_expected(error)}"
            raise VolumeError(told) from error
        info = VolumeInfo(
            location=str(address),
            driver=str(address.driver),
            domain=spec.domain,
            num_channels=spec.num_channels,
            dtype=spec.dtype,
            voxel_size=spec.voxel_size,
            chunk_shape=spec.chunk_shape,
        )
        axes = "xyzc" if address.driver == PRECOMPUTED else AXES
        return Writer(info, to_czyx(store, axes, spec.domain.start), spec.write_unit)


def local_folder(spec: OutputSpec) -> Path | None:
    """Return where the output lies on a file system; None elsewhere.

    Raises:
        VolumeError: its notation is not understood.
    """
    with keyed("output"):
        return _address(spec).path


def moved_to(spec: OutputSpec, folder: Path) -> OutputSpec:
    """Return the same output, in another folder on a file system.

    Raises:
        VolumeError: its notation is not understood.
    """
    with keyed("output"):
        address = _address(spec)
    volume: dict[str, Any] = {
        "driver": address.driver,
        "kvstore": {"driver": "file", "path": f"{folder}/"},
    }
    if address.path is not None:
        volume |= address.options
    return replace(spec, volume=volume)


def _address(spec: OutputSpec) -> Address:
    """Return where the output lies, format included."""
    address = parse_address(spec.volume)
    if unknown := set(address.options) - {"context"}:
        raise VolumeError(
            f"{address}: an output's spec holds driver, kvstore and context; remove "
            f"{', '.join(sorted(unknown))}: the config's other settings say it"
        )
    if address.driver is None:
        is_there = address.path is None or address.path.is_dir()
        driver = (detect(address) if is_there else None) or format_by_name(address.place)
        if driver is None:
            raise VolumeError(
                f"{address} does not name a format; write {spec.volume}|zarr3: (or zarr2, or "
                "neuroglancer-precomputed)"
            )
        address = replace(address, driver=driver)
    check_spec(spec, str(address.driver))
    return address


def _check(address: Address, spec: OutputSpec, sources: Sequence[VolumeInfo]) -> bool:
    """Do what `check_output` does."""
    place = address.place
    for source in sources:
        read, written = _real(source.location.rpartition("|")[0] or source.location), _real(place)
        if written == read:
            raise VolumeError(f"{address} is also read; choose another place for the output")
        if written.startswith(f"{read}/"):
            raise VolumeError(
                f"{address} lies inside the volume that is read, {read}; choose another place for "
                "the output"
            )
    if address.path is not None:
        _check_folder(address.path)
    found = _existing(address)
    if found is not None:
        differing = differences(found, wanted_layout(spec, str(address.driver)))
        if differing:
            raise VolumeError(
                f"{address} exists and differs in {'; '.join(differing)}. Choose another place for "
                "the output, or move that volume away"
            )
        return True
    if address.path is not None:
        _refuse_clutter(address.path)
    return False


def _existing(address: Address) -> Layout | None:
    """Return the layout of the volume that lies at the address, of whatever format."""
    driver = detect(address)
    if driver is None:
        return None
    if driver not in WRITABLE:
        return {"format": driver}
    there = replace(address, driver=driver)
    metadata = array_metadata(there)
    try:
        if driver == PRECOMPUTED:
            found = found_layout(driver, metadata, {})
            if has_suffixed_files(there, metadata["scales"][0]["key"]):
                # New chunks would lie beside the old ones, and readers disagree on which count.
                found = {**found, "encoding": "compressed files, as cloud-volume writes them"}
            return found
        return found_layout(driver, metadata, attributes_of(there, metadata))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise VolumeError(
            f"{there} exists, but its metadata are damaged ({type(error).__name__} {error}); "
            "choose another place for the output, or move it away"
        ) from error


def _check_folder(path: Path) -> None:
    """Refuse a folder that can neither be written to nor made."""
    nearest = _nearest(path)
    if not nearest.is_dir():
        raise VolumeError(f"{path} cannot be a folder: {nearest} is a file; {EXPECTED}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = "the file system is read-only" if is_read_only else "no permission to write"
        raise VolumeError(f"{path} cannot be written: {why} at {nearest}; {EXPECTED}")


def _nearest(path: Path) -> Path:
    """Return the path itself or what is the nearest above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _expected(error: VolumeError) -> str:
    """Return what to do about a file system's refusal; of other causes that would be wrong."""
    return f"; {EXPECTED}" if is_refusal(error.__cause__) else ""


def _make_folder(path: Path) -> None:
    """Make a folder; that tells in fewer words than TensorStore why there can be none.

    Raises:
        VolumeError: it cannot be made, though nothing has told so before: as below /proc.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{path} cannot be created: no folder can be made in {_nearest(path)} "
            f"({error.strerror}); {EXPECTED}"
        ) from error


def _refuse_clutter(path: Path) -> None:
    """Refuse a folder of other files; an interrupted creation leaves .zattrs or a .__lock."""
    names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    others = [name for name in names if not _is_passing(name)]
    if others:
        raise VolumeError(
            f"{path} is not a volume and holds {', '.join(others[:5])}"
            f"{' and more' if len(others) > 5 else ''}; choose a new or an empty folder"
        )


def _is_passing(name: str) -> bool:
    """Return whether a file is hidden, or one that TensorStore had not finished."""
    return name.startswith(".") or name.endswith(".__lock")


def _create(address: Address, spec: OutputSpec) -> None:
    """Create the output; what makes it a volume is written last."""
    if address.driver == ZARR2:
        attributes = attributes_json(spec) | {"_ARRAY_DIMENSIONS": list(AXES)}
        text = json.dumps(attributes, indent=1).encode()
        write_key(address.store, ".zattrs", text, address.context)
    creation = _spec_json(address) | creation_json(spec, str(address.driver))
    open_store(creation, make_context(None, extra=address.context), create=True)


def _spec_json(address: Address) -> dict[str, Any]:
    return {"driver": address.driver, "kvstore": address.store}


def _real(place: str) -> str:
    """Return a place with symbolic links followed."""
    path = place.removeprefix("file://")
    return os.path.realpath(path) if path != place else place.rstrip("/")
