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
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.network_output import failed_forward, find_cut
from mpichunk.backends.torch_arrays import TorchArrays
from mpichunk.backends.torch_network import where_raised
from mpichunk.errors import DeviceError, ModelError, UserError
from mpichunk.geometry.box import Triple, triple

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

    def __init__(
        self, network: nn.Module, request: EngineRequest, *, channels_last: bool = False
    ) -> None:
        """Take a network that is on its device.

        Args:
            network: in `eval` mode.
            request: what it must do.
            channels_last: keep the channels of a voxel side by side, which some networks run
                faster with, and others slower.
        """
        self._layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        if channels_last:
            network = network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._network = network
        self._request = request
        self._device = torch.device(request.device)
        self._arrays = TorchArrays(self._device)
        self._thread = 0

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
        cut = find_cut(output_nczyx.shape, len(batch_nczyx), self._request, self._output_shape)
        return output_nczyx[cut].float()

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
        return failed_forward(text, self._request, self._output_shape, where=where_raised(error))

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
            return self._network(batch_nczyx.contiguous(memory_format=self._layout))

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
