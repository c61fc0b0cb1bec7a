"""A torch network on one device as an engine: its settings, its output's shape, its complaints.

Every setting of torch that the result depends on is made here and nowhere else. Knows no blocks.
"""

import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpichunk.backends.devices import accelerator_name
from mpichunk.backends.size_advice import crop_advice, size_advice
from mpichunk.backends.torch_arrays import TorchArrays
from mpichunk.backends.torch_network import where_raised
from mpichunk.engine import EngineInfo, EngineRequest
from mpichunk.errors import DeviceError, ModelError, UserError
from mpichunk.geometry import Triple, add, subtract, triple

_OUT_OF_MEMORY = "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"
"""What torch, cuDNN and cuBLAS say where they raise no OutOfMemoryError."""


def prepare_torch(request: EngineRequest) -> None:
    """Set what is global in torch: threads, exact float32, deterministic algorithms.

    Raises:
        DeviceError: torch does not know or cannot use the device.
    """
    # cuBLAS reads this when it starts, before the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(request.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not request.deterministic
    torch.backends.cudnn.deterministic = request.deterministic
    try:
        device = torch.device(request.device)
        torch.empty(1, device=device)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
            torch.use_deterministic_algorithms(request.deterministic)
            # Filling empty memory, which that brings with it, costs time and proves nothing.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"torch {torch.__version__} cannot use the device {request.device!r}: "
            f"{str(error).strip().splitlines()[0]}",
            key="compute.device",
        ) from error


class TorchEngine:
    """Runs a network under `inference_mode`, and cuts what the network had not cut."""

    def __init__(self, network: nn.Module, request: EngineRequest) -> None:
        self._network = network
        self._request = request
        self._device = torch.device(request.device)
        self._arrays = TorchArrays(self._device)
        self._thread = 0
        inner = [slice(c, n - c) for n, c in zip(request.patch_shape, request.crop, strict=True)]
        self._inner = slice(None), slice(None), *inner

    @property
    def arrays(self) -> TorchArrays:
        """Tensors on the engine's device."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        device = "cpu"
        if self._device.type != "cpu":
            kind = accelerator_name(torch, self._device.type, self._device.index or 0)
            device = f"{self._device} {kind}"
        return EngineInfo(
            backend="pytorch",
            version=f"torch {torch.__version__}",
            device=device,
            device_kind=kind,
            precision=self._request.precision,
            threads=self._request.threads,
        )

    def infer(self, batch_nczyx: Tensor) -> Tensor:
        """Run the network; see `Engine.infer`."""
        output_nczyx = _only_tensor(self._forward(batch_nczyx))
        return self._cut(output_nczyx, len(batch_nczyx)).float()

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether the device had no memory left; TorchScript and cuDNN tell it in words."""
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        return known or any(words in str(error) for words in _OUT_OF_MEMORY)

    def explain(self, error: Exception) -> UserError:
        """Say what can be done about a forward that failed; see `Engine.explain`."""
        shape = tuple(self._batch_shape(self._request.patch_shape))
        text = _gist(error)
        if self.is_out_of_memory(error):
            return ModelError(
                f"a batch of shape {shape} does not fit into the memory of {self._device}: {text}; "
                "reduce patch.batch_size or patch.shape",
                key="patch.batch_size",
            )
        if "deterministic" in text:
            return ModelError(
                f"the network has no deterministic algorithm on {self._device}: {text}; "
                "compute.deterministic: false gives up reproducible bytes",
                key="compute.deterministic",
            )
        if match := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
            return ModelError(
                f"the network takes {match[1]} input channels, but the input has {match[2]}",
                key="model.path",
            )
        where = where_raised(error)
        message = f"the network failed on a batch of shape {shape}"
        message += f" at {where}: {text}" if where else f": {text}"
        advice = size_advice(
            lambda shape: self._output_shape(shape) is not None, self._request.patch_shape
        )
        if advice:
            return ModelError(f"{message}; {advice}", key="patch.shape")
        return ModelError(message, key="model.path")

    def _forward(self, batch_nczyx: Tensor) -> Any:
        """Run the network once on this thread."""
        if self._thread != threading.get_ident():
            # OpenMP keeps this number per thread.
            torch.set_num_threads(self._request.threads)
            self._thread = threading.get_ident()
        # TorchScript's optimiser first watches a run, then may fuse what rounds differently: the
        # first blocks of each rank would differ from the later ones.
        optimise = not self._request.deterministic
        optimiser = torch.jit.optimized_execution(optimise)  # type: ignore[attr-defined]
        with torch.inference_mode(), optimiser:
            return self._network(batch_nczyx)

    def _output_shape(self, patch_shape: Triple) -> Triple | None:
        """Return what shape the network makes of one patch of this shape, None if it fails."""
        batch_nczyx = torch.zeros(self._batch_shape(patch_shape, 1), device=self._device)
        try:
            return triple(tuple(_only_tensor(self._forward(batch_nczyx)).shape[2:]))
        except Exception:
            return None

    def _batch_shape(self, patch_shape: Sequence[int], batch_size: int = 0) -> tuple[int, ...]:
        """Return the shape of a batch, by default of the size that was asked for."""
        size = batch_size or self._request.batch_size
        return size, self._request.in_channels, *patch_shape

    def _cut(self, output_nczyx: Tensor, batch_size: int) -> Tensor:
        """Return (n, out_channels, *Q) of what the network returned, or refuse it."""
        request = self._request
        found = tuple(output_nczyx.shape)
        if len(found) != 5 or found[0] != batch_size:
            raise ModelError(
                f"the network returned shape {found} for a batch of shape "
                f"{self._batch_shape(request.patch_shape, batch_size)}; expected "
                f"({batch_size}, {request.out_channels}, z, y, x)",
                key="model.path",
            )
        if found[1] != request.out_channels:
            raise ModelError(
                f"the network returned {found[1]} channels, but model.out_channels is "
                f"{request.out_channels}; set it to {found[1]}",
                key="model.out_channels",
            )
        if found[2:] == request.patch_shape:
            return output_nczyx[self._inner]
        lost = subtract(request.patch_shape, triple(found[2:]))
        if lost == add(request.crop, request.crop):
            return output_nczyx
        cure = crop_advice(self._output_shape, request.patch_shape, triple(found[2:]))
        raise ModelError(
            f"the network returned {found[2:]} voxels for a patch of {request.patch_shape}, which "
            f"neither is that shape nor has lost patch.crop {list(request.crop)} on each side; "
            f"{cure}",
            key="patch.crop",
        )


def _only_tensor(output: Any) -> Tensor:
    """Return the one tensor that a network returned, also from within a tuple, list or dict."""
    if isinstance(output, Tensor):
        return output
    items = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(items, (tuple, list)):
        tensors = [item for item in items if isinstance(item, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
        found = f"a {type(output).__name__} with {len(tensors)} tensors"
    else:
        found = f"a {type(output).__name__}"
    raise ModelError(
        f"the network returned {found}; expected one tensor: wrap it in a module that returns the "
        "one that is wanted",
        key="model.path",
    )


def _gist(error: Exception) -> str:
    """Return the line that tells most: TorchScript puts its own traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"\w*Error: ", line)]
    line = (marked or lines or ["no message"])[-1 if marked else 0]
    return line if marked else f"{type(error).__name__}: {line}"
