"""Where a PyTorch network comes from: which file, which name in it, without loading it.

Reads `model.path` and asks the file system; imports neither torch nor the user's code.
"""

import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpichunk.backends.files.local_imports import imported_files
from mpichunk.config.location import split_model_path
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError

_FORMS = (
    "expected a torch.export file (.pt2), a TorchScript file, `file.py:Name` or "
    "`package.module:Name` (the last two with model.weights)"
)


WEIGHTS_KEY = "weights_key"
"""The option that names the weights in a checkpoint that holds several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One way to a network."""

    kind: Literal["exported", "script", "file", "module"]
    """File of torch.export, TorchScript file, Python file, or importable module."""

    path: Path
    """The file; of a module, the file that it would be imported from."""

    module: str = ""
    """Dotted name of the module."""

    name: str = ""
    """What makes the network in the Python file or module."""


def find_source(model: Model) -> ModelSource:
    """Return where `model.path` leads.

    Raises:
        ModelError: it leads nowhere, or to a file of another kind.
    """
    if not model.path:
        raise ModelError(f"the pytorch backend needs model.path: {_FORMS}", key="model.path")
    code = split_model_path(model.path)
    if code is not None:
        where, name = code
        if where.endswith(".py"):
            path = existing_file(Path(where), "model.path", _FORMS)
            return ModelSource(kind="file", path=path, name=name)
        return ModelSource(kind="module", path=_module_file(where), module=where, name=name)
    path = existing_file(Path(model.path), "model.path", _FORMS)
    return ModelSource(kind=_kind_of_archive(path), path=path)


def torch_files(model: Model) -> list[Path]:
    """Return the files whose bytes are a network that torch loads; its own is the first.

    To a Python file belong those beside it that it imports.

    Raises:
        ModelError: one does not exist, or is of another kind.
    """
    source, weights = find_source(model), weights_file(model)
    helpers = imported_files(source.path) if source.kind == "file" else []
    return [source.path, *([weights] if weights else []), *helpers]


def weights_file(model: Model) -> Path | None:
    """Return `model.weights` as a file that exists, or None where none is set.

    Raises:
        ModelError: it does not exist.
    """
    return existing_file(Path(model.weights), "model.weights") if model.weights else None


def existing_file(path: Path, key: str, forms: str = "") -> Path:
    """Return the path, or refuse it.

    Args:
        path: what the user named.
        key: where.
        forms: what could be there instead, in words.

    Raises:
        ModelError: it is no file.
    """
    try:
        if path.is_file():
            return path
        what = "is a directory" if path.is_dir() else "does not exist"
    except OSError as error:
        what = f"cannot be reached ({error.strerror})"
    if forms:
        what += f"; {forms}"
    raise ModelError(f"{path} {what}", key=key)


def _module_file(dotted: str) -> Path:
    """Return the file of a module; unlike `find_spec`, do not import its parent packages."""
    top, *inner = dotted.split(".")
    # Of a top-level name `find_spec` imports nothing; it knows editable installs as well.
    spec = importlib.util.find_spec(top)
    if spec is not None and not inner and spec.origin is not None:
        return Path(spec.origin)
    folders = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    for part in inner[:-1]:
        folders = [folder / part for folder in folders]
    for folder in folders if inner else ():
        for file in (folder / inner[-1] / "__init__.py", folder / f"{inner[-1]}.py"):
            if file.is_file():
                return file
    raise ModelError(
        f"there is no module {dotted!r} on Python's path; install its package or set PYTHONPATH, "
        "or give the file itself: file.py:Name",
        key="model.path",
    )


def _kind_of_archive(path: Path) -> Literal["exported", "script"]:
    """Tell torch's saved networks apart, and refuse what people mistake for one of them."""
    if path.suffix == ".py":
        raise ModelError(
            f"{path} lacks the network's name; write {path.name}:Name", key="model.path"
        )
    if path.suffix in (".onnx", ".xml"):
        takes = "onnxruntime or openvino" if path.suffix == ".onnx" else "openvino"
        raise ModelError(
            f"{path} is not a network of torch; set model.backend: {takes}", key="model.path"
        )
    use_as_weights = "give the network as file.py:Name in model.path and this file in model.weights"
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights only; {use_as_weights}", key="model.path")
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path} is not a TorchScript file: it is not a zip archive, so it is of another kind "
            f"or cut short; {_FORMS}",
            key="model.path",
        )
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "script"
    compiled = any(name.casefold().startswith("data/aotinductor/") for name in names)
    if any(name.startswith("models/") for name in names) and not compiled:
        return "exported"
    if compiled:
        what = (
            "holds a library compiled for one machine (AOTInductor); save it by torch.export.save"
        )
    elif "serialized_exported_program.json" in archive.namelist():
        what = "was exported by an old torch; export it again with torch 2.8 or later"
    elif "data.pkl" in names:
        what = f"is a checkpoint, not a network; {use_as_weights}"
    else:
        what = f"is a zip archive but not a saved network of torch; {_FORMS}"
    raise ModelError(f"{path} {what}", key="model.path")
