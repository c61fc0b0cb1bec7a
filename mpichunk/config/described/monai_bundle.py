"""What a MONAI bundle says in configs/metadata.json and configs/inference.json (or .yaml).

Knows MONAI's words and what each means in a config; MONAI itself is not imported, and no code of
the bundle is executed.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpichunk.config.described.findings import AxisSize, Findings, Obstacle
from mpichunk.config.described.monai_steps import first_steps, last_steps
from mpichunk.config.described.monai_values import code_in, value_of
from mpichunk.config.scaling import Scaling
from mpichunk.config.text import parse
from mpichunk.errors import ConfigError, ModelError

_CONFIGS = "configs/inference.json", "configs/inference.yaml", "configs/inference.yml"
_METADATA = "configs/metadata.json"
_NETWORKS = "network_def", "network", "net"
_SCRIPT, _WEIGHTS, _ONNX = "models/model.ts", "models/model.pt", "models/model.onnx"
_MULTIPLE = re.compile(r"(?:(\d+)\s*\*\s*n|n\s*\*\s*(\d+))")

Values = dict[str, Any]


def is_bundle(path: Path) -> bool:
    """Return whether a folder is a bundle."""
    return any((path / name).is_file() for name in (_METADATA, *_CONFIGS))


def read_bundle(folder: Path, backend: str, *, as_code: bool) -> Findings:
    """Return what a bundle says.

    Args:
        folder: the bundle.
        backend: what will run the network.
        as_code: whether a class with weights is preferred to a saved network.

    Raises:
        ModelError: there is nothing in it that this backend could run.
    """
    origin = f"the MONAI bundle {folder}"
    config = _read_config(folder)
    metadata = _read(folder / _METADATA) if (folder / _METADATA).is_file() else {}
    data = metadata.get("network_data_format", {})
    image, result = _only(data, "inputs", origin), _only(data, "outputs", origin)
    definition = _definition(config)
    _refuse_flat(image, definition, origin)
    settings, obstacles, form = _network(folder, definition, backend, as_code=as_code)
    channels = definition.get("out_channels", result.get("num_channels"))
    if type(channels) is int:
        settings["model.out_channels"] = channels
    else:
        obstacles.append(_no_channels())
    scale, undone = first_steps(value_of(config, config.get("preprocessing")))
    if isinstance(scale, Scaling):
        settings["input.normalize"] = scale.settings()
    else:
        obstacles.append(scale)
    last, unmapped = last_steps(value_of(config, config.get("postprocessing")))
    settings |= last
    obstacles += unmapped
    roi, advice = _inferer(value_of(config, config.get("inferer")))
    if roi is not None:
        settings["patch.shape"] = roi
    return Findings(
        origin=origin,
        settings=settings,
        obstacles=tuple(obstacles),
        remarks=(*undone, *_remarks(roi)),
        sizes=_sizes(image),
        notes=(form, *advice),
    )


# Reading


def _read_config(folder: Path) -> Values:
    """Return the config of inference.

    Raises:
        ModelError: there is none.
    """
    for name in _CONFIGS:
        if (folder / name).is_file():
            return _read(folder / name)
    raise ModelError(
        f"{folder} has no {_CONFIGS[0]} (or .yaml), which says how its network is fed; name its "
        "network in model.path and write the other keys yourself",
        key="model.path",
    )


def _read(path: Path) -> Values:
    """Return the mapping in a JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else parse(text, str(path)).values
    except (ValueError, ConfigError) as error:
        raise ModelError(f"{path} cannot be read: {error}", key="model.path") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold a mapping of names to values", key="model.path")
    return found


def _only(data: Any, kind: str, origin: str) -> Values:
    """Return the description of the one input or output, {} where nothing is said."""
    tensors = data.get(kind) if isinstance(data, Mapping) else None
    if not isinstance(tensors, Mapping) or not tensors:
        return {}
    if len(tensors) > 1:
        raise ModelError(
            f"{origin} describes {len(tensors)} {kind} ({', '.join(tensors)}); mpichunk runs "
            "networks with one; wrap it in a module of your own: `path: net.py:Name`",
            key="model.path",
        )
    found = next(iter(tensors.values()))
    return dict(found) if isinstance(found, Mapping) else {}


def _definition(config: Values) -> Values:
    """Return the network's class and arguments, {} where there is no such thing."""
    for name in _NETWORKS:
        found = value_of(config, config.get(name))
        if isinstance(found, dict) and "_target_" in found:
            return found
    return {}


# Network


def _network(
    folder: Path, definition: Values, backend: str, *, as_code: bool
) -> tuple[Values, list[Obstacle], str]:
    """Return where the network is, what of its arguments is no plain value, and its form."""
    saved = {"pytorch": (_SCRIPT,), "onnxruntime": (_ONNX,), "openvino": (_ONNX, _SCRIPT)}[backend]
    name = next((name for name in saved if (folder / name).is_file()), None)
    weights = folder / _WEIGHTS
    # Weights may be elsewhere, if the user says where.
    has_code = bool(definition) and (weights.is_file() or as_code) and backend != "onnxruntime"
    if has_code and (as_code or name is None):
        settings, obstacles = _code(folder, definition)
        if weights.is_file():
            settings["model.weights"] = str(weights)
        return settings, obstacles, f"network {definition['_target_']}"
    if name is not None:
        return {"model.path": str(folder / name)}, [], f"network {name}"
    takes = [*saved, *([f"network_def with {_WEIGHTS}"] if backend != "onnxruntime" else [])]
    raise ModelError(
        f"{folder} has no {' and no '.join(takes)}, which the {backend} backend requires of a "
        "bundle",
        key="model.path",
    )


def _code(folder: Path, definition: Values) -> tuple[Values, list[Obstacle]]:
    """Return the class and its arguments, and those of them that are no plain values."""
    arguments, obstacles = {}, []
    for key, value in definition.items():
        if key.startswith("_"):
            continue
        code = code_in(value)
        if code is None:
            arguments[key] = value
        else:
            obstacles.append(_code_argument(key, code))
    path = _target(folder, str(definition["_target_"]))
    return {"model.path": path, "model.arguments": arguments}, obstacles


def _target(folder: Path, target: str) -> str:
    """Return a class of MONAI, of the bundle's own files, or of an installed package, as a path.

    Raises:
        ModelError: it is of MONAI, which is not installed.
    """
    module, _, name = target.rpartition(".")
    own = folder / f"{module.replace('.', '/')}.py"
    if module and own.is_file():
        return f"{own}:{name}"
    module = module or "monai.networks.nets"
    if module.partition(".")[0] == "monai" and importlib.util.find_spec("monai") is None:
        raise ModelError(
            f"the network {target} of {folder} needs the package monai, which is not installed: "
            "pip install 'mpichunk[monai]'",
            key="model.path",
        )
    return f"{module}:{name}"


def _code_argument(key: str, code: str) -> Obstacle:
    return Obstacle(
        keys=(f"model.arguments.{key}", "model.arguments"),
        found=f"the network's argument `{key}` as {code}",
        cure="mpichunk does not execute code of a bundle's config; write its value here",
    )


def _no_channels() -> Obstacle:
    return Obstacle(
        keys=("model.out_channels",),
        found="a number of output channels that it does not state",
        cure="write how many the network returns",
    )


# Geometry


def _refuse_flat(image: Values, definition: Values, origin: str) -> None:
    """Refuse a network for images of two dimensions."""
    shape = image.get("spatial_shape")
    dims = definition.get("spatial_dims", definition.get("dimensions"))
    if dims == 2 or (dims is None and isinstance(shape, list) and len(shape) == 2):
        raise ModelError(
            f"{origin} is for two-dimensional images; mpichunk runs networks over volumes",
            key="model.path",
        )


def _sizes(image: Values) -> tuple[AxisSize | None, ...]:
    """Return the multiples that the patch must be; a fixed shape in metadata is an example only."""
    shape = image.get("spatial_shape")
    if not isinstance(shape, list) or len(shape) != 3:
        return None, None, None
    found = [_MULTIPLE.fullmatch(str(size).strip()) for size in shape]
    units = [int(match[1] or match[2]) if match else 0 for match in found]
    return tuple(AxisSize(min=unit, step=unit) if unit else None for unit in units)


def _inferer(inferer: Any) -> tuple[list[int] | None, list[str]]:
    """Return the patch of a sliding window, and what else it says."""
    if not isinstance(inferer, dict) or "roi_size" not in inferer:
        return None, []
    roi = inferer["roi_size"]
    advice = [
        f"its inferer has {key}: {inferer[key]}"
        for key in ("roi_size", "overlap", "mode")
        if key in inferer
    ]
    is_shape = (
        isinstance(roi, list) and len(roi) == 3 and all(type(n) is int and n > 0 for n in roi)
    )
    return roi if is_shape else None, advice


def _remarks(roi: list[int] | None) -> tuple[str, ...]:
    """Return what to see to where the axes of the patch are not all alike.

    A bundle does not say which of its axes is which; its readers give those of the file.
    """
    if roi is None or len(set(roi)) == 1:
        return ()
    return (
        f"has the roi_size {roi} along its own axes, which are x, y, z where it reads NIfTI; it is "
        "taken as z, y, x: store the volume so that its z, y and x axes are the network's first, "
        "second and third",
    )
