"""MONAI's transforms before and after a network, as values of a config.

Knows what each transform computes; imports none. Geometry is told, not done.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpichunk.config.described.findings import NOT_AFTERWARDS_CURE, NOT_FIXED_CURE, Obstacle
from mpichunk.config.described.monai_values import Code, code_in
from mpichunk.config.scaling import Scaling

_NO_VALUES = frozenset(
    (
        *("LoadImage", "EnsureChannelFirst", "AddChannel", "AsChannelFirst", "EnsureType"),
        *("ToTensor", "ToDevice", "CastToType", "SelectItems", "DeleteItems", "Identity"),
        *("Invert", "SaveImage"),
    )
)
"""What changes no value, unless to another type, or undoes what was not done."""

_CASTS = frozenset(("EnsureType", "ToTensor", "CastToType"))
"""What of it may change the type."""

_FLOAT = re.compile(r"(?:\$?(?:torch|np|numpy)\.)?(?:b?float\d*|double|half)")
"""Types, by name or as code, that values keep their fractions in."""

_PADDING = frozenset(("SpatialPad", "BorderPad", "DivisiblePad", "CropForeground"))
"""What a sliding window over all the volume has no need of."""

_GEOMETRY = _PADDING | frozenset(
    (
        *("Orientation", "Spacing", "SpatialResample", "Resize", "ResizeWithPadOrCrop"),
        *("SpatialCrop", "CenterSpatialCrop"),
    )
)
"""What changes where a voxel is."""

_COMPUTED = frozenset(("ScaleIntensityRange", "NormalizeIntensity", "Activations", "AsDiscrete"))
"""What is made a value of the config, with some of its arguments."""

_AFTER = "model.activation", "output.reduce", "output.threshold"
_LABELS = frozenset(_AFTER[1:])

Steps = list[Mapping[str, Any]]


def first_steps(preprocessing: Any) -> tuple[Scaling | Obstacle, tuple[str, ...]]:
    """Return `preprocessing` as one scale, and what of it is left to the user."""
    steps = _steps(preprocessing)
    if isinstance(steps, str):
        return _obstacle_before(f"the preprocessing {steps}"), ()
    scale, undone = Scaling(), []
    for step in steps:
        name = _name(step)
        if name in _GEOMETRY:
            if name not in _PADDING:
                undone.append(_shown(step))
        elif name in _NO_VALUES:
            # Before the first step this is the type of the volume.
            if scale != Scaling() and not _keeps_fractions(name, step):
                return _obstacle_before(_shown(step)), _remarks(undone)
        else:
            try:
                scale = _scaled(scale, name, step)
            except (ValueError, TypeError, KeyError):
                return _obstacle_before(_shown(step)), _remarks(undone)
    return scale, _remarks(undone)


def last_steps(postprocessing: Any) -> tuple[dict[str, Any], list[Obstacle]]:
    """Return `postprocessing` as an activation, a threshold or labels, and what is neither."""
    steps = _steps(postprocessing)
    settings: dict[str, Any] = {}
    if isinstance(steps, str):
        return settings, [_obstacle_after(f"the postprocessing {steps}")]
    for step in steps:
        name = _name(step)
        # The type of labels is the output's own affair.
        if name in _NO_VALUES and (_LABELS & settings.keys() or _keeps_fractions(name, step)):
            continue
        found = _activation(step) if name == "Activations" and not settings else None
        if name == "AsDiscrete" and not settings.keys() - {"model.activation"}:
            found = _labels(step)
        if found is None:
            return settings, [_obstacle_after(_shown(step))]
        settings |= found
    return settings, []


def _steps(value: Any) -> Steps | str:
    """Return the transforms of a Compose that are not switched off, or the code that makes them."""
    if value is None:
        return []
    if isinstance(value, Mapping) and "transforms" in value:
        value = value["transforms"]
    if not isinstance(value, list):
        value = [value]
    steps = [step for step in value if isinstance(step, Mapping) and "_target_" in step]
    if len(steps) < len(value):
        return f"`{code_in(value) or value}`"
    return [step for step in steps if step.get("_disabled_", False) is not True]


def _name(step: Mapping[str, Any]) -> str:
    """Return a transform's name as that of arrays: ScaleIntensityRanged -> ScaleIntensityRange."""
    name = str(step["_target_"]).rpartition(".")[2]
    for known in _NO_VALUES | _GEOMETRY | _COMPUTED:
        if name in (known, f"{known}d", f"{known}D", f"{known}Dict"):
            return known
    return name


def _keeps_fractions(name: str, step: Mapping[str, Any]) -> bool:
    """Return whether a step leaves values as they are: in a floating type, or the one they have."""
    dtypes = step.get("dtype") if name in _CASTS else None
    return all(
        dtype is None or (isinstance(dtype, str | Code) and bool(_FLOAT.fullmatch(str(dtype))))
        for dtype in (dtypes if isinstance(dtypes, list) else [dtypes])
    )


def _scaled(scale: Scaling, name: str, step: Mapping[str, Any]) -> Scaling:
    """Return the scale with one more transform.

    Raises:
        ValueError, TypeError, KeyError: it is none with fixed numbers.
    """
    if name == "NormalizeIntensity" and not step.get("nonzero", False):
        return scale.normalised(_number(step["subtrahend"]), _number(step["divisor"]))
    if name != "ScaleIntensityRange":
        raise ValueError(name)
    low, high = _number(step["a_min"]), _number(step["a_max"])
    scale = scale.normalised(low, high - low)
    if step.get("b_min") is None or step.get("b_max") is None:
        if step.get("clip", False) is not False:
            raise ValueError("clip without bounds")
        return scale
    bottom, top = _number(step["b_min"]), _number(step["b_max"])
    if (bottom, top) != (0.0, 1.0):
        scale = scale.mapped(top - bottom, bottom)
    clip = step.get("clip", False)
    if not isinstance(clip, bool):
        raise ValueError("clip")
    return scale.clipped(bottom, top) if clip else scale


def _number(value: Any) -> float:
    """Return a number, or the one that a list of equal ones, by channel, holds."""
    values = value if isinstance(value, list) else [value]
    if (
        len(set(values)) != 1
        or isinstance(values[0], bool)
        or not isinstance(values[0], int | float)
    ):
        raise ValueError("not one number")
    return float(values[0])


def _activation(step: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return model.activation, None for one that mpichunk does not have."""
    wanted = {key: step[key] for key in ("sigmoid", "softmax", "other") if step.get(key)}
    if not wanted:
        return {}
    name, value = wanted.popitem()
    return {"model.activation": name} if value is True and not wanted and name != "other" else None


def _labels(step: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return output.reduce or output.threshold, None for what is neither."""
    wanted = {
        key: step[key]
        for key in ("argmax", "threshold", "rounding", "to_onehot")
        # By identity: 0 is a threshold, though it equals False.
        if step.get(key) is not None and step[key] is not False
    }
    if not wanted:
        return {}
    key, value = wanted.popitem()
    if wanted:
        return None
    if key == "argmax" and value is True:
        return {"output.reduce": "argmax"}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "threshold" and is_number and value > 0:
        # MONAI counts what equals the threshold, mpichunk only what is above: so the float before.
        return {"output.threshold": float(np.nextafter(np.float32(value), np.float32(0)))}
    return None


def _obstacle_before(found: str) -> Obstacle:
    return Obstacle(
        keys=("input.normalize",),
        found=found,
        cure=NOT_FIXED_CURE,
    )


def _obstacle_after(found: str) -> Obstacle:
    return Obstacle(
        keys=_AFTER,
        found=found,
        cure=NOT_AFTERWARDS_CURE,
    )


def _remarks(undone: list[str]) -> tuple[str, ...]:
    if not undone:
        return ()
    return (
        f"asks for {', '.join(undone)}, which mpichunk does not do: store the volume so that its "
        "z, y and x axes are the network's, at that voxel size",
    )


def _shown(step: Mapping[str, Any]) -> str:
    """Return a transform in words, without what every one has."""
    dull = "keys", "allow_missing_keys"
    given = {k: v for k, v in step.items() if not k.startswith("_") and k not in dull}
    name = str(step["_target_"]).rpartition(".")[2]
    return f"{name} ({', '.join(f'{k}: {v}' for k, v in given.items())})" if given else name
