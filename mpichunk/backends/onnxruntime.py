"""The `onnxruntime` backend: ONNX files on CPUs, or on NVIDIA devices by the GPU build.

Imports onnxruntime only when it probes or loads. Input and output are numpy arrays on the host.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.devices.probing import accelerator_name, cpu_kind, probe_devices
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.files.onnx import onnx_files
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.optional import not_importable
from mpichunk.backends.shapes.fixed_shape import refuse_fixed_shape
from mpichunk.backends.shapes.network_output import failed_forward, find_cut
from mpichunk.config.schema import Model
from mpichunk.errors import DeviceError, ModelError, UserError
from mpichunk.geometry.box import Triple, triple
from mpichunk.words import count

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_OUT_OF_MEMORY = "Failed to allocate memory", "bad_alloc", "out of memory", "AllocateRawInternal"


class OnnxruntimeBackend:
    """Runs networks by ONNX Runtime."""

    name = "onnxruntime"
    cpu_only = False

    def model_files(self, model: Model) -> list[Path]:
        """Return the ONNX file and the files of its weights, without importing onnxruntime."""
        return onnx_files(model)

    def probe(self, requested: str) -> VisibleDevices:
        """Return the CPU, and NVIDIA devices where this onnxruntime is built for them."""
        runtime = _import()
        note = f"onnxruntime {runtime.__version__}"
        if requested == "cpu" or _CUDA not in runtime.get_available_providers():
            note += ", built without CUDA: `pip install onnxruntime-gpu` instead of onnxruntime"
            return VisibleDevices(cpu_kind=cpu_kind(), framework="onnxruntime", note=note)
        seen = probe_devices(requested)
        devices = tuple(device for device in seen.accelerators if device.kind == "cuda")
        return VisibleDevices(
            accelerators=devices,
            cpu_kind=cpu_kind(),
            framework="onnxruntime",
            note=f"{note}; {seen.note}",
        )

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Return nothing: every rank reads the file."""
        return None

    def load(
        self, model: Model, request: EngineRequest, prepared: bytes | None = None
    ) -> "OnnxruntimeEngine":
        """Load the network onto `request.device`."""
        runtime = _import()
        path = onnx_files(model)[0]
        return OnnxruntimeEngine(runtime, _open(runtime, path, model, request), path, request)


class OnnxruntimeEngine:
    """Runs one session, and cuts what the network had not cut."""

    def __init__(self, runtime: Any, session: Any, path: Path, request: EngineRequest) -> None:
        self._version = str(runtime.__version__)
        self._session = session
        self._request = request
        self._arrays = NumpyArrays()
        self._input = _only_input(session, path, request)
        self._output = _only_output(session, path)

    @property
    def arrays(self) -> NumpyArrays:
        """Arrays of numpy, on the host."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        device, kind = "cpu", cpu_kind()
        if self._request.device != "cpu":
            import torch

            kind = accelerator_name(torch, "cuda", _device_index(self._request))
            device = f"{self._request.device} {kind}"
        return EngineInfo(
            backend="onnxruntime",
            version=f"onnxruntime {self._version}, {self._session.get_providers()[0]}",
            device=device,
            device_kind=kind,
            precision=self._request.precision,
            threads=int(self._session.get_session_options().intra_op_num_threads),
        )

    def infer(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network; see `Engine.infer`."""
        output_nczyx = self._forward(batch_nczyx)
        cut = find_cut(output_nczyx.shape, len(batch_nczyx), self._request, self._output_shape)
        output: npt.NDArray[np.float32] = output_nczyx[cut].astype(np.float32, copy=False)
        return output

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether there was no memory left; onnxruntime tells it in words."""
        known = isinstance(error, MemoryError)
        return known or any(words in str(error) for words in _OUT_OF_MEMORY)

    def explain(self, error: Exception) -> UserError:
        """Say what can be done about a forward that failed; see `Engine.explain`."""
        request = self._request
        text = str(error).strip().replace("\n", " ")
        if self.is_out_of_memory(error):
            return ModelError(
                f"a batch of {count(request.batch_size, 'patch', 'patches')} does not fit into the "
                f"memory of {request.device}: {text}; reduce patch.batch_size or patch.shape",
                key="patch.batch_size",
            )
        return failed_forward(text, request, self._output_shape)

    def _forward(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Run the session once."""
        output: npt.NDArray[Any] = self._session.run([self._output], {self._input: batch_nczyx})[0]
        return output

    def _output_shape(self, patch_shape: Triple) -> Triple | None:
        """Return what shape the network makes of one patch of this shape, None if it fails."""
        batch_nczyx = np.zeros((1, self._request.in_channels, *patch_shape), np.float32)
        try:
            return triple(self._forward(batch_nczyx).shape[2:])
        except Exception:
            return None


def _import() -> Any:
    """Return the package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise not_importable("onnxruntime", error, extra="onnxruntime") from error
    return onnxruntime


def _open(runtime: Any, path: Path, model: Model, request: EngineRequest) -> Any:
    """Return the session of a file.

    Raises:
        ModelError: onnxruntime cannot load it, or an option is none of its own.
        DeviceError: onnxruntime cannot use the device.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = request.threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = request.deterministic
    options.log_severity_level = 4
    # Threads that wait by spinning would take the cores from reading and writing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in _entries(model):
        options.add_session_config_entry(key, value)
    try:
        session = runtime.InferenceSession(path, options, providers=_providers(request))
    except Exception as error:
        # Its exceptions have no common class.
        raise ModelError(
            f"{path} cannot be loaded by onnxruntime {runtime.__version__}: "
            f"{str(error).strip().splitlines()[0]}",
            key="model.path",
        ) from error
    if request.device != "cpu" and session.get_providers()[0] != _CUDA:
        raise DeviceError(
            f"onnxruntime {runtime.__version__} cannot use the device {request.device!r} and would "
            "compute on the CPU; its GPU build needs CUDA and cuDNN of the version it was made for",
            key="compute.device",
        )
    return session


def _entries(model: Model) -> Iterator[tuple[str, str]]:
    """Yield the user's entries of the session.

    Raises:
        ModelError: it is none; onnxruntime would take it and do nothing.
    """
    for key, value in model.options.items():
        if not str(key).startswith(("session.", "ep.")):
            raise ModelError(
                f"onnxruntime has no session entry {key!r}; their names begin with session. or ep.",
                key="model.options",
            )
        yield str(key), str(int(value) if isinstance(value, bool) else value)


def _providers(request: EngineRequest) -> list[Any]:
    """Return what may run the network; a second one takes what the first does not know."""
    if request.device == "cpu":
        return [_CPU]
    cuda = {
        "device_id": _device_index(request),
        "use_tf32": 0,
        "cudnn_conv_algo_search": "DEFAULT" if request.deterministic else "EXHAUSTIVE",
    }
    return [(_CUDA, cuda), _CPU]


def _device_index(request: EngineRequest) -> int:
    return int(request.device.partition(":")[2] or 0)


def _only_input(session: Any, path: Path, request: EngineRequest) -> str:
    """Return the name of the one input, once it takes the run's batches."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ModelError(
            f"{path} takes {len(inputs)} inputs ({_names(inputs)}); expected one, the batch",
            key="model.path",
        )
    if inputs[0].type != "tensor(float)":
        raise ModelError(
            f"{path} takes {inputs[0].type}; expected tensor(float): save it in float32",
            key="model.path",
        )
    refuse_fixed_shape(path, [n if isinstance(n, int) else None for n in inputs[0].shape], request)
    return str(inputs[0].name)


def _only_output(session: Any, path: Path) -> str:
    """Return the name of the one output."""
    outputs = session.get_outputs()
    if len(outputs) != 1:
        raise ModelError(
            f"{path} returns {len(outputs)} outputs ({_names(outputs)}); expected one: save the "
            "network with the wanted output only",
            key="model.path",
        )
    return str(outputs[0].name)


def _names(values: Sequence[Any]) -> str:
    return ", ".join(value.name for value in values)
