"""How torch runs a network: precision, memory layout, compiled kernels; what cannot be is refused.

Knows no patches and no blocks. Folding stands in `folding`, CUDA graphs in `capture`.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.pytorch.weights import first_line
from mpichunk.errors import DeviceError, ModelError, UserError

HALVES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that autocast is for."""

_TF32_CAPABILITY = 8
_OUT_OF_MEMORY = "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"
"""What torch, cuDNN and cuBLAS say where they raise no OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device had no memory left; TorchScript and cuDNN tell it in words."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in _OUT_OF_MEMORY)


def refuse_device(request: EngineRequest) -> None:
    """Refuse what the device of a request cannot do.

    Raises:
        DeviceError: with the key that asks for it.
    """
    kind = torch.device(request.device).type
    if request.precision == "tf32" and not _has_tf32(request.device):
        raise DeviceError(
            f"{request.device} does not support TF32, which requires an NVIDIA device of compute "
            "capability 8.0 or higher; use 'float32'",
            key="compute.precision",
        )
    if request.precision in HALVES and not torch.amp.is_autocast_available(kind):
        raise DeviceError(
            f"torch {torch.__version__} does not support {request.precision} on {request.device}; "
            "use 'float32'",
            key="compute.precision",
        )
    if request.kernels.cuda_graphs and kind != "cuda":
        raise DeviceError(
            f"CUDA graphs require an NVIDIA device, but this rank computes on {request.device}; "
            "remove compute.cuda_graphs",
            key="compute.cuda_graphs",
        )


def _has_tf32(device: str) -> bool:
    if torch.device(device).type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= _TF32_CAPABILITY


@contextmanager
def computing(request: EngineRequest) -> Iterator[None]:
    """Set all that a forward depends on, whatever other engines of this process have set.

    Autocast casts what goes into convolutions and products, and leaves weights and the statistics
    of norms in float32; it acts on TorchScript and exported programs as on modules.
    """
    is_tf32 = request.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    half = HALVES.get(request.precision)
    cast = nullcontext() if half is None else torch.autocast(_kind(request), dtype=half)
    # TorchScript's optimiser first watches a run, then may fuse what rounds differently: the
    # first blocks of each rank would differ from the later ones.
    optimise = not request.deterministic
    optimiser = torch.jit.optimized_execution(optimise)  # type: ignore[attr-defined]
    with torch.inference_mode(), optimiser, cast:
        yield


def _kind(request: EngineRequest) -> str:
    return torch.device(request.device).type


def layout_of(request: EngineRequest) -> torch.memory_format:
    """Return the memory layout of batches."""
    if request.kernels.channels_last:
        return torch.channels_last_3d
    return torch.contiguous_format


def lay_out(network: nn.Module) -> nn.Module:
    """Keep the channels of each weight side by side.

    Raises:
        ModelError: there is no weight of a 3D convolution.
    """
    if not any(tensor.ndim == 5 for tensor in chain(network.parameters(), network.buffers())):
        raise ModelError(
            "the network has no 3D convolution whose memory layout could be changed; remove "
            "compute.channels_last",
            key="compute.channels_last",
        )
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def refuse_without_halves(network: nn.Module, batch_nczyx: Tensor, request: EngineRequest) -> None:
    """Run a network once, and refuse it if nothing in it computes in the half precision asked for.

    Raises:
        ModelError: it would be as in float32.
    """
    half = HALVES[request.precision]
    with computing(request), _DtypeWatch() as seen:
        network(batch_nczyx)
    if half not in seen.dtypes:
        why = (
            "it has no convolution or product that torch can cast, or it casts by itself; use "
            "another network"
        )
        if isinstance(network, torch.jit.ScriptModule):
            why = "torch does not cast traced TorchScript; use the class or a .pt2 file"
        raise ModelError(
            f"nothing in the network computes in {request.precision} on {request.device}: {why}, "
            "or remove compute.precision",
            key="compute.precision",
        )


class _DtypeWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the dtypes that operations, casts aside, have computed in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and "_to_copy" not in str(func):
            self.dtypes.add(output.dtype)
        return output


class CompiledNetwork:
    """A network whose kernels are made when it first sees a batch of some shape."""

    def __init__(self, network: nn.Module) -> None:
        """Prepare to compile; nothing is made yet.

        Raises:
            ModelError: it is of a kind that torch.compile leaves as it is.
        """
        refuse_compilation(network)
        self._eager = network
        with _quiet():
            import torch._inductor.config

            # In this process: a pool of others would outlive a rank that is killed.
            torch._inductor.config.compile_threads = 1
            self._compiled = torch.compile(network, dynamic=False)
        self._shapes: set[torch.Size] = set()

    def __call__(self, batch_nczyx: Tensor) -> Any:
        """Run the network.

        Raises:
            ModelError: it runs, but cannot be compiled.
        """
        if batch_nczyx.shape in self._shapes:
            return self._compiled(batch_nczyx)
        try:
            with _quiet():
                output = self._compiled(batch_nczyx)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, UserError):
                raise
            # What fails without compiling too has another cause, and raises it here.
            self._eager(batch_nczyx)
            why = _why_not_compiled(error, batch_nczyx)
            raise ModelError(why, key="compute.compile") from error
        self._shapes.add(batch_nczyx.shape)
        return output


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torch's compiler says of its own parts, and of TF32, which is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refuse_compilation(network: nn.Module) -> None:
    """Refuse what torch.compile would leave as it is.

    Raises:
        ModelError: it is TorchScript, or leaves torch.
    """
    what = ""
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        what = "TorchScript, which torch.compile does not change; use the class or a .pt2 file"
    elif getattr(network, "leaves_torch", False):
        what = "a chunkflow model file that computes outside torch; use a plain network"
    if what:
        raise ModelError(f"the network is {what}, or remove compute.compile", key="compute.compile")


def _why_not_compiled(error: Exception, batch_nczyx: Tensor) -> str:
    """Return what torch.compile lacks, as far as it tells."""
    needs = "a C++ compiler and the headers of this Python"
    if batch_nczyx.device.type != "cpu":
        needs = "triton and a C compiler"
    return (
        f"torch {torch.__version__} cannot compile the network, which runs without: "
        f"{type(error).__name__}: {first_line(error)}; on {batch_nczyx.device.type} it requires "
        f"{needs}. Set compute.compile: false"
    )
