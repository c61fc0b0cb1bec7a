"""Networks that come with a description: bioimage.io packages and MONAI bundles as config values.

`follow` replaces a package in `model.path` by the file or code that it names, and adds what else
it says. Reads descriptions only: loads no network, executes nothing of a package, imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpichunk.config.described.bioimageio_package import find_package, read_package
from mpichunk.config.described.findings import Findings
from mpichunk.config.described.merging import Merged, merge
from mpichunk.config.described.monai_bundle import is_bundle, read_bundle
from mpichunk.config.described.unpacking import unpack
from mpichunk.config.location import model_path_mistake, resolve_path, split_model_path
from mpichunk.errors import ModelError, Problem

BACKENDS = "pytorch", "onnxruntime", "openvino"
"""Backends that run what a description names."""


def follow(values: Mapping[str, Any], base: str) -> Merged:
    """Return the values of a config with its package, if there is one, followed to the network.

    Args:
        values: nested, as the user wrote them, right or wrong; `run_dir` is there.
        base: absolute directory that relative paths start from.
    """
    model = values.get("model")
    if not isinstance(model, Mapping) or model.get("backend") not in BACKENDS:
        return Merged(values=dict(values))
    name = model.get("path")
    if not isinstance(name, str) or split_model_path(name) or model_path_mistake(name):
        return Merged(values=dict(values))
    run_dir = resolve_path(str(values.get("run_dir")), base)
    as_code = bool(model.get("weights") or model.get("arguments"))
    try:
        found = _read(Path(resolve_path(name, base)), str(model["backend"]), as_code, Path(run_dir))
    except ModelError as error:
        problem = Problem(key=error.key or "model.path", message=error.message)
        return Merged(values=dict(values), problems=(problem,))
    return Merged(values=dict(values)) if found is None else merge(values, found)


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
