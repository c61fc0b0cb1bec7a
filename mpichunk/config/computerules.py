"""Which precisions and kernels go together with which backend and device, as far as names tell.

Pure functions of single values, as in `config.rules`. What only a machine or a network can tell is
refused where it is loaded.
"""

from collections.abc import Mapping
from typing import Any

from mpichunk.config.rules import rule
from mpichunk.config.types import Precision
from mpichunk.words import either

KERNELS = ("compile", "channels_last", "fold_batch_norm", "cuda_graphs")
"""Keys of `compute` that say how the pytorch backend runs a network."""

PRECISIONS: Mapping[str, tuple[Precision, ...]] = {
    "identity": ("float32",),
    "pytorch": ("float32", "tf32", "bfloat16", "float16"),
    "onnxruntime": ("float32",),
    "openvino": ("float32", "bfloat16", "float16"),
    "pznet": ("float32",),
}
"""What each backend can be asked for."""

PRECISION_HINT = "INFERENCE_PRECISION_HINT"
"""OpenVINO's own word for the precision."""

HINTS: Mapping[str, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Its values."""

EXPORTED_NOT_FOLDED = (
    "an exported network (.pt2) is a list of operations without modules to fold; fold it before "
    "torch.export, or name the class itself, file.py:Name"
)
"""Why `fold_batch_norm` is refused of a file of torch.export."""

_HINT_NAMES = {
    **{hint: name for name, hint in HINTS.items()},
    **{name: name for name in HINTS},
    "float": "float32",
}


@rule("compute.precision", "model.backend")
def _backend_has_precision(precision: str, backend: str) -> str | None:
    able = PRECISIONS[backend]
    if precision in able:
        return None
    if backend == "onnxruntime":
        why = "it computes as the ONNX file says, so convert the file itself"
    elif backend == "openvino":
        why = "which runs on the CPU"
    else:
        why = "it computes in float32 only"
    return f"the {backend} backend does not support {precision!r}: {why}; expected {either(able)}"


@rule("compute.precision", "compute.device", "model.backend")
def _device_has_tf32(precision: str, device: str, backend: str) -> str | None:
    if precision != "tf32" or "tf32" not in PRECISIONS[backend] or _may_be_cuda(device):
        return None
    return f"'tf32' requires an NVIDIA device, but compute.device is {device!r}; use 'float32'"


@rule("compute.cuda_graphs", "compute.device", "model.backend")
def _device_has_graphs(wanted: bool, device: str, backend: str) -> str | None:
    if not wanted or backend != "pytorch" or _may_be_cuda(device):
        return None
    return f"CUDA graphs require an NVIDIA device, but compute.device is {device!r}; remove it"


def _may_be_cuda(device: str) -> bool:
    return device == "auto" or device.partition(":")[0] == "cuda"


def _is_of_pytorch(wanted: bool, backend: str) -> str | None:
    if not wanted or backend == "pytorch":
        return None
    return f"is supported by the pytorch backend only and has no effect with {backend!r}; remove it"


for _name in KERNELS:
    rule(f"compute.{_name}", "model.backend")(_is_of_pytorch)


@rule("compute.fold_batch_norm", "model.path", "model.backend")
def _folding_has_modules(wanted: bool, path: str | None, backend: str) -> str | None:
    if not wanted or backend != "pytorch" or path is None or not path.endswith(".pt2"):
        return None
    return EXPORTED_NOT_FOLDED


@rule("model.options", "compute.precision", "model.backend")
def _hint_agrees(options: dict[str, Any], precision: str, backend: str) -> str | None:
    if backend != "openvino" or PRECISION_HINT not in options:
        return None
    found = str(options[PRECISION_HINT])
    meant = _HINT_NAMES.get(found.lower())
    if meant == precision:
        return None
    cure = "take it out" if meant is None else f"set compute.precision: {meant} instead"
    return f"{PRECISION_HINT} {found!r} contradicts compute.precision {precision!r}; {cure}"
