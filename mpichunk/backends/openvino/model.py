"""Where a network for OpenVINO comes from: its own files, ONNX, or torch, converted in memory.

The only place that imports openvino. Compiles nothing.
"""

import logging
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpichunk.backends.difference import relative_difference
from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.files.onnx import onnx_files
from mpichunk.backends.files.source import existing_file, torch_files
from mpichunk.backends.openvino.instructions import limit_of, limited
from mpichunk.backends.optional import not_importable
from mpichunk.backends.shapes.fixed_shape import refuse_fixed_shape
from mpichunk.backends.shapes.network_output import failed_forward
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from mpichunk.geometry.box import Triple, triple

_LENGTH_NBYTES = 8
_TELEMETRY = "openvino_telemetry"
_LARGEST_DIFFERENCE = 1e-3
"""Of a converted network from torch, as a share of the largest value: rounding is 1e-5 at most."""


def import_openvino() -> Any:
    """Return the package, kept from reporting its use over the network.

    Raises:
        ModelError: it is not installed.
    """
    if "openvino" not in sys.modules and _TELEMETRY not in sys.modules:
        # As if that package were not installed, which openvino is prepared for.
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise not_importable("openvino", error, extra="openvino") from error
    return openvino


@cache
def core_of(openvino: Any) -> Any:
    """Return the one `Core` of this process, which stays.

    Its CPU plug-in gives the thread that it is loaded in a stack for signals, and puts back what
    was there before when it goes. Of two that overlap the second would put back one that is gone:
    the next signal, a mere Ctrl-C, would be a segmentation fault.
    """
    return openvino.Core()


def model_kind(model: Model) -> Literal["ir", "onnx", "torch"]:
    """Return what `model.path` leads to, by its name."""
    suffix = Path(model.path or "").suffix
    return "ir" if suffix == ".xml" else "onnx" if suffix == ".onnx" else "torch"


def openvino_files(model: Model) -> list[Path]:
    """Return the files whose bytes are the network.

    Raises:
        ModelError: one does not exist, or is of another kind.
    """
    kind = model_kind(model)
    if kind == "torch":
        return torch_files(model)
    if kind == "onnx":
        return onnx_files(model)
    path = existing_file(Path(str(model.path)), "model.path")
    return [path, existing_file(path.with_suffix(".bin"), "model.path")]


def convert_network(model: Model, request: EngineRequest) -> bytes:
    """Return a network of torch, with its weights, as OpenVINO's.

    Raises:
        ModelError: torch cannot load or run it, or OpenVINO cannot convert it rightly.
    """
    openvino = import_openvino()
    import torch

    from mpichunk.backends.pytorch.chunkflow import refuse_conversion
    from mpichunk.backends.pytorch.engine import TorchEngine, prepare_torch
    from mpichunk.backends.pytorch.network import load_network

    # What is compared is the conversion; openvino's precision comes later.
    exact = replace(request, precision="float32")
    prepare_torch(exact)
    network = load_network(model, exact)
    refuse_conversion(network)
    # One forward by torch: it tells best what does not fit, and what the values must be.
    shape = request.batch_size, request.in_channels, *request.patch_shape
    chance = np.random.default_rng(0)
    batch_nczyx, other_nczyx = (chance.random(shape, dtype=np.float32) for _ in range(2))
    engine = TorchEngine(network, exact)
    try:
        expected = engine.infer(torch.from_numpy(batch_nczyx)).numpy()
    except ModelError:
        raise
    except Exception as error:
        raise engine.explain(error) from error
    # By another batch: what does not depend on its input would be right by chance.
    converted = _convert(openvino, network, torch.from_numpy(other_nczyx))
    with limited(limit_of(model)):
        _refuse_difference(openvino, converted, batch_nczyx, expected, request)
    return _serialize(openvino, converted)


def _serialize(openvino: Any, network: Any) -> bytes:
    """Return a network as bytes; openvino writes files only."""
    with tempfile.TemporaryDirectory(prefix="mpichunk-openvino-") as scratch:
        path = Path(scratch) / "network.xml"
        openvino.serialize(network, path)
        description, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return len(description).to_bytes(_LENGTH_NBYTES) + description + weights


def _convert(openvino: Any, network: Any, batch_nczyx: Any) -> Any:
    """Return the network as OpenVINO's, its shapes those of the batch."""
    import torch

    from mpichunk.backends.pytorch.exported import ExportedNetwork
    from mpichunk.backends.pytorch.flat import flatten

    source, example = network, {"example_input": batch_nczyx}
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Conversion traces the network by functions that torch calls deprecated.
            warnings.simplefilter("ignore")
            if isinstance(network, torch.jit.ScriptModule):
                source = flatten(network, batch_nczyx)
            elif isinstance(network, ExportedNetwork):
                source, example = network.exported_program, {}
            return openvino.convert_model(source, input=[list(batch_nczyx.shape)], **example)
    except Exception as error:
        raise ModelError(
            f"openvino {openvino.__version__} cannot convert the network: "
            f"{str(error).strip().splitlines()[-1]}; set model.backend: pytorch, or save it as "
            "ONNX",
            key="model.backend",
        ) from error
    finally:
        # Conversion takes over the log of the whole program.
        root.setLevel(level)
        root.handlers[:] = handlers


def _refuse_difference(
    openvino: Any, network: Any, batch_nczyx: Any, expected: Any, request: EngineRequest
) -> None:
    """Refuse a converted network whose values are not torch's."""
    from mpichunk.backends.shapes.network_output import find_cut

    compiled = core_of(openvino).compile_model(
        network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
    )
    found = compiled(batch_nczyx)[0]
    cut = find_cut(found.shape, len(batch_nczyx), request, lambda shape: None)
    difference = relative_difference(found[cut], expected)
    # NaN on both sides is for the first test batch to find.
    if difference > _LARGEST_DIFFERENCE:
        raise ModelError(
            f"the network as openvino {openvino.__version__} converts it differs from torch by "
            f"{difference:.2g} of its largest value: something in it cannot be converted; set "
            "model.backend: pytorch, or save it as ONNX",
            key="model.backend",
        )


def read_network(openvino: Any, model: Model, prepared: bytes | None) -> Any:
    """Return the network, converted by `convert_network` or from its file.

    Raises:
        ModelError: openvino cannot read it.
    """
    path = Path(str(model.path))
    core = core_of(openvino)
    try:
        if prepared is not None:
            start = _LENGTH_NBYTES + int.from_bytes(prepared[:_LENGTH_NBYTES])
            return core.read_model(prepared[_LENGTH_NBYTES:start], prepared[start:])
        network = core.read_model(path)
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read by openvino {openvino.__version__}: "
            f"{str(error).strip().splitlines()[-1]}; it may be damaged or cut short",
            key="model.path",
        ) from error
    for what, found in (("takes", network.inputs), ("returns", network.outputs)):
        if len(found) != 1:
            raise ModelError(f"{path} {what} {len(found)} tensors; expected one", key="model.path")
    if network.inputs[0].element_type != openvino.Type.f32:
        raise ModelError(
            f"{path} takes {network.inputs[0].element_type.to_string()}; expected f32: save it in "
            "float32",
            key="model.path",
        )
    return network


def reshape_network(network: Any, path: Path, request: EngineRequest, batch_size: int) -> Any:
    """Return a copy of the network for batches of one size and the run's patches only.

    Raises:
        ModelError: the network does not take them.
    """
    partial = network.inputs[0].partial_shape
    if partial.rank.is_static:
        # A first axis that is fixed can be changed, unlike in other frameworks.
        fixed = [n.get_length() if n.is_static else None for n in partial]
        refuse_fixed_shape(path, [None, *fixed[1:]], request)
    shape = [batch_size, request.in_channels, *request.patch_shape]
    copy = network.clone()
    try:
        copy.reshape(shape)
    except Exception as error:
        raise failed_forward(
            _gist(error), request, lambda patch: output_shape_of(network, request, patch)
        ) from error
    return copy


def output_shape_of(network: Any, request: EngineRequest, patch_shape: Triple) -> Triple | None:
    """Return the output shape for one patch of this shape; None if the network rejects it."""
    copy = network.clone()
    try:
        copy.reshape([1, request.in_channels, *patch_shape])
        return triple(list(copy.outputs[0].shape)[2:])
    except Exception:
        return None


def _gist(error: Exception) -> str:
    """Return the line of openvino's report that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if "While validating" in line or "incompatible" in line]
    return (marked or lines or ["no message"])[-1]
