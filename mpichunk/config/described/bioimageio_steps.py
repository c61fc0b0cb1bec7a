"""The steps before and after a network of bioimage.io, as values of a config.

Knows what each step computes; imports nothing of the format.
"""

from collections.abc import Mapping
from typing import Any

from mpichunk.config.described.findings import NOT_AFTERWARDS_CURE, NOT_FIXED_CURE, Obstacle
from mpichunk.config.scaling import Scaling


def first_steps(tensor: Any) -> Scaling | Obstacle:
    """Return preprocessing as one scale."""
    scale = Scaling()
    for step in tensor.preprocessing:
        try:
            scale = _scaled(scale, str(step.id), _numbers(step))
        except ValueError as error:
            return Obstacle(keys=("input.normalize",), found=str(error), cure=NOT_FIXED_CURE)
    return scale


def _scaled(scale: Scaling, name: str, kwargs: Mapping[str, Any]) -> Scaling:
    """Return the scale with one more step.

    Raises:
        ValueError: says which step cannot be part of it.
    """
    if name == "ensure_dtype":
        # Before the first step this is the type of the volume.
        if kwargs["dtype"].startswith("float") or scale == Scaling():
            return scale
        raise ValueError(f"{kwargs['dtype']} as the type of scaled values")
    try:
        if name == "scale_linear":
            return scale.mapped(float(kwargs["gain"]), float(kwargs["offset"]))
        if name == "fixed_zero_mean_unit_variance":
            return scale.normalised(float(kwargs["mean"]), float(kwargs["std"]))
        if name == "clip" and not any(key.endswith("percentile") for key in kwargs):
            return scale.clipped(kwargs.get("min"), kwargs.get("max"))
    except (TypeError, ValueError) as error:
        why = "by channel" if isinstance(error, TypeError) else f"with {error}"
        raise ValueError(f"{_shown(name, kwargs)} {why}") from error
    once = name in ("zero_mean_unit_variance", "scale_range", "clip")
    why = " with statistics of each sample, which differ from patch to patch" if once else ""
    raise ValueError(f"{_shown(name, kwargs)}{why}")


def last_steps(tensor: Any) -> tuple[dict[str, Any], list[Obstacle]]:
    """Return postprocessing as an activation and a threshold, and what is neither."""
    settings: dict[str, Any] = {}
    for step in tensor.postprocessing:
        name, kwargs = str(step.id), _numbers(step)
        if not _is_done(name, kwargs, settings):
            keys = "model.activation", "output.reduce", "output.threshold"
            return settings, [
                Obstacle(keys=keys, found=_shown(name, kwargs), cure=NOT_AFTERWARDS_CURE)
            ]
    return settings, []


def _is_done(name: str, kwargs: Mapping[str, Any], settings: dict[str, Any]) -> bool:
    """Add a step to the settings; return whether it is among what mpichunk does."""
    if name == "ensure_dtype":
        return True
    if "output.threshold" in settings:
        return False
    is_first = not settings
    if name == "sigmoid" and is_first:
        settings["model.activation"] = "sigmoid"
    elif name == "softmax" and is_first and kwargs["axis"] == "channel":
        settings["model.activation"] = "softmax"
    elif name == "binarize" and isinstance(kwargs["threshold"], float) and kwargs["threshold"] >= 0:
        settings["output.threshold"] = kwargs["threshold"]
    elif name == "scale_linear":
        return kwargs.get("gain") == 1 and kwargs.get("offset") == 0
    elif name == "clip" and not is_first:
        # Probabilities are within these bounds already.
        return (
            set(kwargs) <= {"min", "max"}
            and kwargs.get("min", 0) <= 0
            and kwargs.get("max", 1) >= 1
        )
    else:
        return False
    return True


def _numbers(step: Any) -> dict[str, Any]:
    """Return the arguments of a step that are set; a list of equal numbers as that number."""
    kwargs = getattr(step, "kwargs", None)
    if kwargs is None:
        return {}
    found = dict(kwargs) if isinstance(kwargs, dict) else kwargs.model_dump(mode="json")
    return {
        key: value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value
        for key, value in found.items()
        if value is not None
    }


def _shown(name: str, kwargs: Mapping[str, Any]) -> str:
    """Return a step in words."""
    return (
        f"{name} ({', '.join(f'{key}: {value}' for key, value in kwargs.items())})"
        if kwargs
        else name
    )
