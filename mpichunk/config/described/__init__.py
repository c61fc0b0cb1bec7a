"""Networks that come with a description: bioimage.io packages and MONAI bundles as config values.

`follow` replaces a package in `model.path` by the file or code that it names, and adds what else
it says; `recall` takes that from the config that a run has kept. Reads descriptions only: loads no
network, executes nothing of a package, imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpichunk.config.described.bioimageio_package import (
    find_package,
    is_description,
    read_package,
)
from mpichunk.config.described.findings import Findings
from mpichunk.config.described.merging import ABSENT, Merged, merge, value_at
from mpichunk.config.described.monai_bundle import is_bundle, read_bundle
from mpichunk.config.described.unpacking import path_in_archive, unpack
from mpichunk.config.location import model_path_mistake, resolve_path, split_model_path
from mpichunk.config.text import parse
from mpichunk.errors import JournalError, ModelError, NotStartedError, Problem

BACKENDS = "pytorch", "onnxruntime", "openvino"
"""Backends that run what a description names."""

_NETWORK = "model.path", "model.weights", "model.arguments"
"""Keys that say which network it is."""

_SAID = (
    *_NETWORK,
    *("model.out_channels", "model.activation"),
    *("input.normalize", "patch.shape", "patch.crop", "output.reduce", "output.threshold"),
)
"""Keys that a description may speak of."""


def follow(values: Mapping[str, Any], base: str) -> Merged:
    """Return the values of a config with its package, if there is one, followed to the network.

    Args:
        values: nested, as the user wrote them, right or wrong; `run_dir` is there.
        base: absolute directory that relative paths start from.
    """
    path = _named_path(values, base)
    if path is None:
        return Merged(values=dict(values))
    model = values["model"]
    run_dir = resolve_path(str(values.get("run_dir")), base)
    as_code = bool(model.get("weights") or model.get("arguments"))
    try:
        found = _read(path, str(model["backend"]), as_code, Path(run_dir))
    except ModelError as error:
        problem = Problem(key=error.key or "model.path", message=error.message)
        return Merged(values=dict(values), problems=(problem,))
    return Merged(values=dict(values)) if found is None else merge(values, found)


def recall(values: Mapping[str, Any], base: str) -> Merged:
    """Return the values of a config with what its package said when its run was started.

    The run's own config tells: the package may be gone by now, or what reads it not be here. What
    the user writes wins here, too, so that the two configs can be compared.

    Args:
        values: nested, as the user wrote them, right or wrong; `run_dir` is there.
        base: absolute directory that relative paths start from.

    Raises:
        NotStartedError: a package is named, but the run has kept nothing yet.
        UserError: the run's own config is damaged.
    """
    path = _named_path(values, base)
    run_dir = values.get("run_dir")
    if path is None or not isinstance(run_dir, str) or not _may_be_package(path):
        return Merged(values=dict(values))
    kept = _kept_values(Path(resolve_path(run_dir, base)))
    found = {key: value_at(kept, key) for key in _SAID}
    settings = {key: value for key, value in found.items() if value not in (ABSENT, None)}
    if not _is_part(str(settings.get("model.path")), path):
        # The run is of another network: this package stays, and is what differs.
        for key in _NETWORK:
            settings.pop(key, None)
    told = merge(values, Findings(origin=f"the run {run_dir}", settings=settings))
    return Merged(values=told.values)


def _kept_values(run_dir: Path) -> Any:
    """Return what stands in the config that a run has kept."""
    path = run_dir / "config.yaml"
    try:
        return parse(path.read_text(encoding="utf-8"), str(path)).values
    except FileNotFoundError:
        raise NotStartedError(
            f"{path} does not exist: this config has not been run yet", run_dir=run_dir
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JournalError(f"{path} cannot be read: {error}", key="run_dir") from error


def _named_path(values: Mapping[str, Any], base: str) -> Path | None:
    """Return what `model.path` names, None where it cannot be a package."""
    model = values.get("model")
    if not isinstance(model, Mapping) or model.get("backend") not in BACKENDS:
        return None
    name = model.get("path")
    if not isinstance(name, str) or split_model_path(name) or model_path_mistake(name):
        return None
    return Path(resolve_path(name, base))


def _may_be_package(path: Path) -> bool:
    """Return whether a path is a package, or was one if it is gone, by its name and its files."""
    if path.suffix.lower() == ".zip" or is_description(path):
        return True
    try:
        is_gone = path.suffix == "" and not path.exists()
        return is_gone or find_package(path) is not None or is_bundle(path)
    except OSError:
        # Not for this user, or not from this host: the run knows more.
        return True


def _is_part(network: str, package: Path) -> bool:
    """Return whether the network that a run was started with can be that of a package."""
    code = split_model_path(network)
    if code is not None and not code[0].endswith(".py"):
        return True
    if package.suffix.lower() == ".zip":
        return path_in_archive(network) is not None
    folder = package.parent if is_description(package) else package
    return Path(network).is_relative_to(folder)


def _read(path: Path, backend: str, as_code: bool, run_dir: Path) -> Findings | None:
    """Return what a package says; None where the path is none."""
    try:
        if path.suffix.lower() == ".zip" and path.is_file():
            path = _inner_folder(unpack(path, run_dir))
        if (file := find_package(path)) is not None:
            return read_package(file, backend, as_code=as_code)
        if is_bundle(path):
            return read_bundle(path, backend, as_code=as_code)
    except OSError as error:
        raise ModelError(
            f"{error.filename or path} cannot be read: {error.strerror}", key="model.path"
        ) from error
    return None


def _inner_folder(folder: Path) -> Path:
    """Return the one folder that an archive may have around everything."""
    members = list(folder.iterdir())
    return members[0] if len(members) == 1 and members[0].is_dir() else folder
