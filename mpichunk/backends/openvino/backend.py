"""The `openvino` backend: ONNX files, OpenVINO's own, and all that torch loads, on CPUs.

Imports openvino only when it loads. Networks of torch are converted once, by one rank
(`model`). Input and output are numpy arrays.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.devices.probing import cpu_kind
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.files.source import WEIGHTS_KEY
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.openvino.instructions import OPTION, check_limit, limit_of, limited
from mpichunk.backends.openvino.model import (
    convert_network,
    core_of,
    import_openvino,
    model_kind,
    openvino_files,
    output_shape_of,
    read_network,
    reshape_network,
)
from mpichunk.backends.shapes.network_output import find_cut
from mpichunk.config.computerules import HINTS, PRECISION_HINT
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError, UserError
from mpichunk.geometry.box import Triple
from mpichunk.words import count

_OUT_OF_MEMORY = "bad_alloc", "could not allocate", "out of memory", "Can't allocate"
_PRECISIONS = {hint: name for name, hint in HINTS.items()} | {"float": "float32"}
_CAPABILITIES = {"bfloat16": "BF16", "float16": "FP16"}
"""What OpenVINO calls it that a CPU has a precision."""


class OpenvinoBackend:
    """Runs networks by OpenVINO on the CPU."""

    name = "openvino"
    cpu_only = True

    def model_files(self, model: Model) -> list[Path]:
        """Return the files of the network, without importing openvino or torch."""
        return openvino_files(model)

    def probe(self, requested: str) -> VisibleDevices:
        """Return the CPU, without importing any framework."""
        return VisibleDevices(cpu_kind=cpu_kind())

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Return a network of torch as OpenVINO's, so that the other ranks need no torch."""
        if model_kind(model) != "torch":
            return None
        return convert_network(model, request)

    def load(
        self, model: Model, request: EngineRequest, prepared: bytes | None = None
    ) -> "OpenvinoEngine":
        """Compile the network for this CPU."""
        openvino = import_openvino()
        if prepared is None:
            prepared = self.prepare(model, request)
        network = read_network(openvino, model, prepared)
        return OpenvinoEngine(openvino, network, model, request)


class OpenvinoEngine:
    """Runs one compiled network per batch size, and cuts what the network had not cut."""

    def __init__(self, openvino: Any, network: Any, model: Model, request: EngineRequest) -> None:
        self._openvino = openvino
        self._core = core_of(openvino)
        self._network = network
        self._path = Path(str(model.path))
        self._request = request
        self._arrays = NumpyArrays()
        self._own_settings = tuple(model.options)
        self._limit = limit_of(model)
        # To be asked what this CPU supports is enough for oneDNN to look.
        with limited(self._limit):
            self._settings = _settings(self._core, model, request)
        self._requests: dict[int, Any] = {}
        with limited(self._limit):
            self._compiled = self._compile(request.batch_size)

    @property
    def arrays(self) -> NumpyArrays:
        """Arrays of numpy."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        precision = str(self._compiled.get_property(PRECISION_HINT).to_string())
        return EngineInfo(
            backend="openvino",
            version=f"openvino {self._openvino.__version__.partition('-')[0]}",
            device="cpu",
            device_kind=cpu_kind(),
            precision=_PRECISIONS.get(precision, precision),
            threads=int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            kernels=() if self._limit is None else (f"{self._limit} at most",),
        )

    def infer(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network; what is returned is overwritten by the next call."""
        if len(batch_nczyx) not in self._requests:
            self._compile(len(batch_nczyx))
        infer_request = self._requests[len(batch_nczyx)]
        result = infer_request.infer([batch_nczyx], share_inputs=True, share_outputs=True)
        output_nczyx = result[0]
        cut = find_cut(output_nczyx.shape, len(batch_nczyx), self._request, self._output_shape)
        output: npt.NDArray[np.float32] = output_nczyx[cut].astype(np.float32, copy=False)
        return output

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether there was no memory left; openvino tells it in words."""
        known = isinstance(error, MemoryError)
        return known or any(words in str(error) for words in _OUT_OF_MEMORY)

    def explain(self, error: Exception) -> UserError:
        """Say what can be done about a forward that failed; see `Engine.explain`."""
        text = str(error).strip().splitlines()[-1]
        if self.is_out_of_memory(error):
            return ModelError(
                f"a batch of {count(self._request.batch_size, 'patch', 'patches')} does not fit "
                f"into memory: {text}; reduce patch.batch_size or patch.shape",
                key="patch.batch_size",
            )
        return ModelError(f"the network failed: {text}", key="model.path")

    def _compile(self, batch_size: int) -> Any:
        """Return the network compiled for batches of this size: fixed shapes run faster."""
        network = reshape_network(self._network, self._path, self._request, batch_size)
        try:
            compiled = self._core.compile_model(network, "CPU", self._settings)
        except Exception as error:
            text = str(error).strip()
            is_setting = any(name in text for name in self._own_settings)
            raise ModelError(
                f"{self._path} cannot be compiled by openvino: {text.splitlines()[-1]}",
                key="model.options" if is_setting else "model.path",
            ) from error
        check_limit(compiled, self._limit)
        self._requests[batch_size] = compiled.create_infer_request()
        return compiled

    def _output_shape(self, patch_shape: Triple) -> Triple | None:
        """Return what shape the network makes of one patch of this shape, None if it fails."""
        return output_shape_of(self._network, self._request, patch_shape)


def _settings(core: Any, model: Model, request: EngineRequest) -> dict[str, Any]:
    """Return the settings of the CPU; the user's come last, but for the precision.

    That one is `compute.precision`, which a hint among the user's settings does not contradict.

    Raises:
        DeviceError: this CPU cannot compute in the precision asked for.
    """
    settings: dict[str, Any] = {
        # Every process would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": request.threads,
        "NUM_STREAMS": 1,
    }
    settings |= {k: v for k, v in model.options.items() if k not in (WEIGHTS_KEY, OPTION)}
    # By itself it takes what the node is best at, and so the result depends on the node.
    settings[PRECISION_HINT] = HINTS[request.precision]
    able = [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    if request.precision != "float32" and _CAPABILITIES[request.precision] not in able:
        raise DeviceError(
            f"openvino does not support {request.precision} on this CPU; it supports "
            f"{', '.join(able)}: remove compute.precision",
            key="compute.precision",
        )
    return settings
