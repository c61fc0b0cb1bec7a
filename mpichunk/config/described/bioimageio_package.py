"""What a bioimage.io package says, read by bioimageio.spec: network, axes, first and last steps.

Knows the format's words and what each means in a config. Loads no network, downloads nothing.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpichunk.config.described.bioimageio_steps import first_steps, last_steps
from mpichunk.config.described.files import named_file
from mpichunk.config.described.findings import AxisSize, Findings, Obstacle
from mpichunk.config.scaling import Scaling
from mpichunk.config.text import parse
from mpichunk.errors import ConfigError, ModelError

_NAMES = "bioimageio.yaml", "rdf.yaml"
_AXES = ["batch", "channel", "z", "y", "x"]
_FORMATS = {
    "pytorch": ("torchscript", "pytorch_state_dict"),
    "onnxruntime": ("onnx",),
    "openvino": ("onnx", "torchscript", "pytorch_state_dict"),
}
"""What each backend takes, what runs no code of the package first."""


def is_description(path: Path) -> bool:
    """Return whether a path has the name of a package's description."""
    return path.name.endswith(_NAMES)


def find_package(path: Path) -> Path | None:
    """Return the description of a package: the file itself, or that in the folder; else None."""
    if path.is_file():
        return path if is_description(path) else None
    if not path.is_dir():
        return None
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(
        p for p in path.glob("*.yaml") if p.name.endswith(tuple(f".{n}" for n in _NAMES))
    )
    return others[0] if others else None


def read_package(file: Path, backend: str, *, as_code: bool) -> Findings:
    """Return what a package says.

    Args:
        file: its description.
        backend: what will run the network.
        as_code: whether a class with weights is preferred to a saved network.

    Raises:
        ModelError: there is nothing in it that this backend could run.
    """
    origin = f"the bioimage.io package {file}"
    model = _load(file)
    given, returned = _only(model.inputs, "input", origin), _only(model.outputs, "output", origin)
    for tensor in (given, returned):
        _refuse_axes(tensor, origin)
    settings, form = _network(model.weights, file.parent, backend, as_code=as_code)
    settings["model.out_channels"] = len(_axis(returned, "channel").channel_names)
    obstacles: list[Obstacle] = []
    scale = first_steps(given)
    if isinstance(scale, Scaling):
        settings["input.normalize"] = scale.settings()
    else:
        obstacles.append(scale)
    last, undone = last_steps(returned)
    settings |= last
    obstacles += undone
    crop = _crop(given, returned)
    if isinstance(crop, Obstacle):
        obstacles.append(crop)
    elif any(crop):
        settings["patch.crop"] = crop
    sizes = tuple(_size(_axis(given, name)) for name in "zyx")
    if all(size is not None and size.step == 0 for size in sizes):
        settings["patch.shape"] = [size.min for size in sizes if size is not None]
    return Findings(
        origin=origin,
        settings=settings,
        obstacles=tuple(obstacles),
        remarks=tuple(_remarks(given, returned)),
        sizes=sizes,
        notes=(form, *_notes(given)),
    )


def _load(file: Path) -> Any:
    """Return the description in the newest version of the format.

    Raises:
        ModelError: bioimageio.spec is not there, or the description is none of a model.
    """
    # It lies in a package that others may lie in, too.
    names = "bioimageio", "bioimageio.spec"
    if any(importlib.util.find_spec(name) is None for name in names):
        raise ModelError(
            f"reading {file} needs the package bioimageio.spec, which is not installed: "
            "pip install 'mpichunk[bioimageio]'",
            key="model.path",
        )
    try:
        document = parse(file.read_text(encoding="utf-8"), str(file))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ModelError(str(error), key="model.path") from None
    from bioimageio.spec import InvalidDescr, ValidationContext, build_description
    from loguru import logger

    logger.disable("bioimageio")
    context = ValidationContext(
        root=file.parent, file_name=file.name, perform_io_checks=False, log_warnings=False
    )
    content = document.values if isinstance(document.values, dict) else {}
    if (kind := content.get("type")) != "model":
        raise ModelError(f"{file} describes a {kind}; expected a model", key="model.path")
    found = build_description(content, context=context, format_version="latest")
    if isinstance(found, InvalidDescr):
        errors = [e for detail in found.validation_summary.details for e in detail.errors]
        where = ".".join(str(part) for part in errors[0].loc) if errors else "it"
        reason = errors[0].msg if errors else "no reason given"
        raise ModelError(
            f"{file} is not a valid bioimage.io description: {where}: {reason}", key="model.path"
        )
    return found


# Network


def _network(
    weights: Any, folder: Path, backend: str, *, as_code: bool
) -> tuple[dict[str, Any], str]:
    """Return where the network is, and in which form."""
    formats = _FORMATS[backend]
    if as_code:
        formats = tuple(sorted(formats, key=lambda name: name != "pytorch_state_dict"))
    there = [name for name in type(weights).model_fields if getattr(weights, name) is not None]
    name = next((name for name in formats if name in there), None)
    if name is None:
        others = [b for b, takes in _FORMATS.items() if set(takes) & set(there)]
        cure = (
            f"set model.backend: {' or '.join(others)}" if others else "mpichunk reads none of them"
        )
        raise ModelError(
            f"{folder} has weights as {', '.join(there)}, but the {backend} backend takes "
            f"{', '.join(_FORMATS[backend])}; {cure}",
            key="model.backend",
        )
    entry = getattr(weights, name)
    path = named_file(folder, str(entry.source), entry.sha256 and str(entry.sha256))
    if name != "pytorch_state_dict":
        return {"model.path": str(path)}, f"weights as {name}"
    code = entry.architecture
    where = getattr(code, "import_from", None)
    if where is None:
        where = str(named_file(folder, str(code.source), code.sha256 and str(code.sha256)))
    settings: dict[str, Any] = {
        "model.path": f"{where}:{code.callable}",
        "model.weights": str(path),
    }
    if code.kwargs:
        settings["model.arguments"] = dict(code.kwargs)
    return settings, f"weights as {name}"


# Axes


def _only(tensors: Sequence[Any], what: str, origin: str) -> Any:
    """Return the one tensor that the network takes or returns."""
    if len(tensors) == 1:
        return tensors[0]
    names = ", ".join(str(tensor.id) for tensor in tensors)
    raise ModelError(
        f"{origin} describes {len(tensors)} {what}s ({names}); mpichunk runs networks with one; "
        "wrap it in a module of your own: `path: net.py:Name`",
        key="model.path",
    )


def _refuse_axes(tensor: Any, origin: str) -> None:
    """Refuse what is not (batch, channel, z, y, x)."""
    found = [str(axis.id) for axis in tensor.axes]
    if found == _AXES:
        return
    is_flat = "z" not in found and not any(axis.type == "time" for axis in tensor.axes)
    why = "is for two-dimensional images and " if is_flat else ""
    raise ModelError(
        f"{origin} {why}has {tensor.id} with the axes {', '.join(found)}; mpichunk runs networks "
        f"with {', '.join(_AXES)}; wrap it in a module of your own: `path: net.py:Name`",
        key="model.path",
    )


def _axis(tensor: Any, name: str) -> Any:
    return next(axis for axis in tensor.axes if axis.id == name)


def _size(axis: Any) -> AxisSize | None:
    """Return the sizes along an axis of the input, None where they follow from another axis."""
    if isinstance(axis.size, int):
        return AxisSize(min=axis.size, step=0)
    if hasattr(axis.size, "step"):
        return AxisSize(min=axis.size.min, step=axis.size.step)
    return None


def _crop(given: Any, returned: Any) -> list[int] | Obstacle:
    """Return what is cut off each side: by the network itself, or as the halo of its output."""
    lost: list[int] = []
    halos: list[int] = []
    for name in "zyx":
        source, target = _axis(given, name), _axis(returned, name)
        offset = _offset(source, target, given.id)
        if offset is None or offset > 0 or offset % 2:
            return Obstacle(
                keys=("patch.crop",),
                found=f"an output whose {name} axis is not the input's less the same border on "
                "each side",
                cure="mpichunk runs networks whose output lies on the grid of their input",
            )
        lost.append(-offset // 2)
        halos.append(int(getattr(target, "halo", 0)))
    if any(lost) and any(halos):
        return Obstacle(
            keys=("patch.crop",),
            found=f"a halo of {halos} in addition to the {lost} voxels that the network cuts off "
            "each side",
            cure=f"mpichunk supports one of the two; `patch.crop: {lost}` runs it without the halo",
        )
    return lost if any(lost) else halos


def _offset(source: Any, target: Any, tensor_id: str) -> int | None:
    """Return output size - input size, None where it is not one number."""
    if isinstance(target.size, int):
        return target.size - source.size if isinstance(source.size, int) else None
    is_own = target.size.tensor_id == tensor_id and target.size.axis_id == source.id
    return int(target.size.offset) if is_own and target.scale == source.scale else None


# What is told


def _remarks(given: Any, returned: Any) -> Iterator[str]:
    """Yield what the user must see to."""
    tied = [name for name in "zyx" if _size(_axis(given, name)) is None]
    if tied:
        yield f"derives the size of {' and '.join(tied)} from another axis, which is not checked"
    names = [str(step.id) for step in returned.postprocessing]
    stored = returned.postprocessing[-1].kwargs.dtype if names[-1] == "ensure_dtype" else "float32"
    if "binarize" not in names and not stored.startswith("float"):
        yield f"stores its result as {stored} without scaling; here output.dtype decides"


def _notes(given: Any) -> Iterator[str]:
    """Yield what the volume should be like."""
    data = given.data if not isinstance(given.data, list | tuple) else given.data[0]
    axes = [_axis(given, name) for name in "zyx"]
    size = " x ".join(f"{axis.scale:g}" for axis in axes)
    of_size = f" of {size} {axes[0].unit} (zyx)" if all(axis.unit for axis in axes) else ""
    yield f"it expects {data.type} voxels{of_size}"
