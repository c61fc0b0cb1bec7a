"""What config values must satisfy together, and which of them have no effect.

Pure functions of single values, each run when all values that it reads are valid. Knows no models,
no YAML and no files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpichunk.config.formats import dtype_mistake, shard_mistake
from mpichunk.config.location import (
    Volume,
    is_read_only,
    model_path_mistake,
    place,
    split_model_path,
    volume_format,
)
from mpichunk.errors import Problem
from mpichunk.geometry.box import Triple, subtract, triple

Check = Callable[..., str | None]

CPU_BACKENDS = ("identity", "openvino", "pznet")
"""Backends that have no use for accelerators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that can be wrong."""

    keys: tuple[str, ...]
    """Dotted keys of the values that `check` takes, in its order; the first is to blame."""

    check: Check
    """Returns what is wrong in words, or None."""


_RULES: list[Rule] = []
_HINTS: list[Rule] = []


def find_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return every rule that is broken.

    Args:
        values: valid values by dotted key; a rule that reads a value not in here is left out.
    """
    return _apply(_RULES, values)


def find_warnings(values: Mapping[str, Any]) -> list[Problem]:
    """Return every value that has no effect; arguments as for `find_problems`."""
    return _apply(_HINTS, values)


def output_patch_shape(shape: Triple, crop: Triple) -> Triple:
    """Return Q, what is left of a patch once its border is cut off each side."""
    return subtract(subtract(shape, crop), crop)


def default_chunk_shape(block_shape: Triple) -> Triple:
    """Return the largest divisor of the block's shape that is not above 64, per axis."""
    return triple([_largest_divisor(n, 64) for n in block_shape])


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _apply(rules: Sequence[Rule], values: Mapping[str, Any]) -> list[Problem]:
    found = []
    for item in rules:
        if all(key in values for key in item.keys):
            message = item.check(*(values[key] for key in item.keys))
            if message is not None:
                found.append(Problem(key=item.keys[0], message=message))
    return found


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check of values that must not go together."""
    return _register(_RULES, keys)


def hint(*keys: str) -> Callable[[Check], Check]:
    """Register a check of values that have no effect."""
    return _register(_HINTS, keys)


def _register(table: list[Rule], keys: tuple[str, ...]) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        table.append(Rule(keys=keys, check=check))
        return check

    return add


def _is_multiple(shape: Triple, unit: Triple) -> bool:
    return all(n % u == 0 for n, u in zip(shape, unit, strict=True))


def _nearest_multiple(shape: Triple, unit: Triple) -> Triple:
    return triple([max(1, (2 * n + u) // (2 * u)) * u for n, u in zip(shape, unit, strict=True)])


# Geometry


@rule("roi.stop", "roi.start")
def _roi_is_not_empty(stop: Triple, start: Triple) -> str | None:
    if all(a < b for a, b in zip(start, stop, strict=True)):
        return None
    return f"{stop} must be greater than roi.start {start} on every axis"


@rule("input.normalize.clip")
def _clip_is_ordered(clip: tuple[float, float] | None) -> str | None:
    if clip is None or clip[0] < clip[1]:
        return None
    return f"{clip} must be two numbers, the lower first"


@rule("patch.crop", "patch.shape")
def _crop_leaves_something(crop: Triple, shape: Triple) -> str | None:
    if min(output_patch_shape(shape, crop)) >= 1:
        return None
    return (
        f"{crop} cut off each side leaves nothing of the patch {shape}; "
        "it must be less than half of it on every axis"
    )


@rule("patch.overlap", "patch.shape", "patch.crop")
def _overlap_is_smaller(overlap: Triple | None, shape: Triple, crop: Triple) -> str | None:
    patch = output_patch_shape(shape, crop)
    if overlap is None or min(patch) < 1:
        return None
    if all(o < q for o, q in zip(overlap, patch, strict=True)):
        return None
    return f"{overlap} must be smaller than the output patch {patch}"


@rule("block.margin", "block.stitch", "patch.shape", "patch.crop")
def _margin_fits(margin: Triple | None, stitch: str, shape: Triple, crop: Triple) -> str | None:
    patch = output_patch_shape(shape, crop)
    if margin is None or stitch == "seamless" or min(patch) < 1:
        return None
    if all(m <= q for m, q in zip(margin, patch, strict=True)):
        return None
    return f"{margin} must not be larger than the output patch {patch}"


@rule("block.shape", "output.chunk_shape", "output.shard_shape")
def _block_is_whole_units(block: Triple, chunk: Triple | None, shard: Triple | None) -> str | None:
    unit = shard or chunk
    if unit is None or _is_multiple(block, unit):
        return None
    word = "shard" if shard else "chunk"
    return (
        f"{block} must be a multiple of the output's {word} {unit}, which two blocks must not "
        f"share; the nearest is {_nearest_multiple(block, unit)}"
    )


# Output


@rule("output.shard_shape", "output.chunk_shape", "block.shape")
def _shard_is_whole_chunks(shard: Triple | None, chunk: Triple | None, block: Triple) -> str | None:
    unit = chunk or default_chunk_shape(block)
    if shard is None or _is_multiple(shard, unit):
        return None
    remark = "" if chunk else ", which follows from block.shape: give output.chunk_shape too"
    return f"{shard} must be a multiple of the chunk {unit}{remark}"


@rule("output.shard_shape", "output.volume")
def _format_has_shards(shard: Triple | None, volume: Volume) -> str | None:
    name = volume_format(volume)
    return None if shard is None or name is None else shard_mistake(shard, name)


@rule("output.dtype", "output.volume")
def _format_has_dtype(dtype: str, volume: Volume) -> str | None:
    name = volume_format(volume)
    return None if name is None else dtype_mistake(dtype, name)


@rule("output.volume")
def _output_is_writable(volume: Volume) -> str | None:
    if not is_read_only(volume):
        return None
    return f"{volume!r} can only be read; name a path or a store that can be written"


@rule("output.volume", "input.volume")
def _output_is_not_input(output: Volume, source: Volume) -> str | None:
    if place(output) != place(source):
        return None
    return f"{place(output)!r} is the input too, which would be overwritten; write somewhere else"


@rule("output.volume", "mask.volume")
def _output_is_not_mask(output: Volume, mask: Volume) -> str | None:
    if place(output) != place(mask):
        return None
    return f"{place(output)!r} is the mask too, which would be overwritten; write somewhere else"


# Network


_NETWORKS = {
    "pytorch": "`path: net.pt2` (torch.export), `path: net.pt` (TorchScript) or "
    "`path: nets.py:UNet`",
    "onnxruntime": "`path: net.onnx`",
    "openvino": "`path: net.onnx`, `path: net.xml`, or one that torch can load",
    "pznet": "`path: net`, the folder with `znet.so`",
}
"""What `model.path` may be, by backend."""


@rule("model.path", "model.backend")
def _network_is_named(path: str | None, backend: str) -> str | None:
    if path is not None or backend not in _NETWORKS:
        return None
    return f"missing; the {backend} backend needs a network, e.g. {_NETWORKS[backend]}"


@rule("model.path")
def _network_is_well_named(path: str | None) -> str | None:
    return None if path is None else model_path_mistake(path)


@rule("model.path", "model.backend")
def _backend_takes_code(path: str | None, backend: str) -> str | None:
    if path is None or backend not in ("onnxruntime", "pznet") or split_model_path(path) is None:
        return None
    return (
        f"{path!r} is code, which the {backend} backend does not take; it takes "
        f"{_NETWORKS[backend]}, or set model.backend: pytorch"
    )


@rule("model.arguments", "model.path", "model.backend")
def _arguments_have_code(arguments: dict[str, Any], path: str | None, backend: str) -> str | None:
    if not arguments or not _is_saved_network(path, backend):
        return None
    names = ", ".join(arguments)
    return f"{names}: only a network given as code (file.py:Name) takes arguments, not {path!r}"


def _is_saved_network(path: str | None, backend: str) -> bool:
    if path is None or backend == "identity" or model_path_mistake(path):
        return False
    return split_model_path(path) is None


# Without effect


@hint("block.margin", "block.stitch")
def _margin_is_used(margin: Triple | None, stitch: str) -> str | None:
    if margin is None or stitch != "seamless":
        return None
    return f"{margin} has no effect with `stitch: seamless`, which has no margin"


@hint("output.domain", "roi")
def _domain_is_used(domain: str, roi: object) -> str | None:
    if domain == "input" or roi is not None:
        return None
    return f"{domain!r} has no effect without a `roi`: the output covers the whole input"


def _dataset_is_used(dataset: str | None, volume: Volume) -> str | None:
    name = volume_format(volume)
    if dataset is None or name in (None, "hdf5"):
        return None
    return f"{dataset!r} has no effect: the volume is {name}, and only HDF5 files hold datasets"


def _is_used_by_identity(value: object, backend: str) -> str | None:
    if not value or backend != "identity":
        return None
    return "has no effect with `backend: identity`"


hint("input.dataset", "input.volume")(_dataset_is_used)
hint("mask.dataset", "mask.volume")(_dataset_is_used)
hint("model.path", "model.backend")(_is_used_by_identity)
hint("model.weights", "model.backend")(_is_used_by_identity)
hint("model.arguments", "model.backend")(_is_used_by_identity)


@hint("model.options", "model.backend")
def _options_are_used(options: dict[str, Any], backend: str) -> str | None:
    if not options or backend not in ("identity", "pznet"):
        return None
    return f"has no effect with `backend: {backend}`"


@hint("model.weights", "model.path", "model.backend")
def _weights_are_used(weights: str | None, path: str | None, backend: str) -> str | None:
    if weights is None or path is None or backend not in _NETWORKS:
        return None
    if backend not in ("onnxruntime", "pznet") and not path.endswith((".onnx", ".xml")):
        return None
    return f"has no effect: {path!r} brings its own weights"


@hint("model.activation", "model.out_channels")
def _softmax_has_channels(activation: str, num_channels: int) -> str | None:
    if activation != "softmax" or num_channels > 1:
        return None
    return "'softmax' over one channel is 1 everywhere; did you mean 'sigmoid', or more channels?"


@hint("compute.device", "model.backend")
def _device_is_used(device: str, backend: str) -> str | None:
    if backend not in CPU_BACKENDS or device in ("auto", "cpu"):
        return None
    return f"{device!r} has no effect with `backend: {backend}`, which runs on the CPU"


@hint("compute.share_device", "compute.device")
def _sharing_is_used(share: bool, device: str) -> str | None:
    if not share or device != "cpu":
        return None
    return "has no effect with `device: cpu`"
