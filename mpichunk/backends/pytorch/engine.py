"""A torch network on one device as an engine: its settings, its output's shape, its complaints.

Every setting of torch that the result depends on is made here and nowhere else. Knows no blocks.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpichunk.backends.devices.probing import accelerator_name
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.backends.pytorch.capture import CapturedForward
from mpichunk.backends.pytorch.exported import ExportedNetwork
from mpichunk.backends.pytorch.folding import fold_batch_norm
from mpichunk.backends.pytorch.kernels import (
    HALVES,
    CompiledNetwork,
    computing,
    is_out_of_memory,
    lay_out,
    layout_of,
    refuse_device,
    refuse_without_halves,
)
from mpichunk.backends.pytorch.network import where_raised
from mpichunk.backends.shapes.network_output import failed_forward, find_cut
from mpichunk.errors import DeviceError, ModelError, UserError
from mpichunk.geometry.box import Triple, triple
from mpichunk.words import count

SWITCH_SECONDS = 5e-4
"""How long other threads may hold up the one that feeds an accelerator; Python's 5 ms are long."""


def prepare_torch(request: EngineRequest) -> None:
    """Set what is global: threads and how they take turns, deterministic algorithms.

    What engines of one process may want differently is set for each forward (`computing`).

    Raises:
        DeviceError: torch does not know the device, cannot use it, or not in this way.
    """
    # cuBLAS reads this when it starts, before the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(request.threads)
    torch.backends.cudnn.benchmark = not request.deterministic
    torch.backends.cudnn.deterministic = request.deterministic
    try:
        device = torch.device(request.device)
        torch.empty(1, device=device)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
            sys.setswitchinterval(SWITCH_SECONDS)
            torch.use_deterministic_algorithms(request.deterministic)
            # Filling empty memory, which that brings with it, costs time and proves nothing.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"torch {torch.__version__} cannot use the device {request.device!r}: "
            f"{str(error).strip().splitlines()[0]}",
            key="compute.device",
        ) from error
    refuse_device(request)


class TorchEngine:
    """Runs a network under `inference_mode`, and cuts what the network had not cut.

    infer:  batch -> captured, if wanted ( network, compiled if wanted -> cut -> float32 )
    """

    def __init__(self, network: nn.Module, request: EngineRequest) -> None:
        """Take a network that is on its device, and change it as the request's kernels say.

        Args:
            network: in `eval` mode.
            request: what it must do.

        Raises:
            UserError: it cannot be changed so, or runs not even once.
        """
        self._request = request
        self._layout = layout_of(request)
        self._device = torch.device(request.device)
        self._arrays = TorchArrays(self._device)
        self._thread = self._threads = 0
        self._network: Callable[[Tensor], Any] = network
        try:
            self._network = self._adapted(network)
        except UserError:
            raise
        except Exception as error:
            raise self.explain(error) from error
        self._infer: Callable[[Tensor], Tensor] = self._predict
        if request.kernels.cuda_graphs:
            captured = CapturedForward(self._predict, self._layout)
            self._infer = captured
            self._arrays.kept_nbytes = lambda: captured.nbytes

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
            threads=self._threads or self._request.threads,
            kernels=self._request.kernels.names,
        )

    def infer(self, batch_nczyx: Tensor) -> Tensor:
        """Run the network; see `Engine.infer`."""
        self._use_threads()
        return self._infer(batch_nczyx)

    def _adapted(self, network: nn.Module) -> Callable[[Tensor], Any]:
        """Return the network with the layout, precision and kernels of the request.

        What needs a forward to be sure of has one, of a single patch where the network lets us.
        """
        request, kernels = self._request, self._request.kernels
        self._use_threads()
        size = 0 if isinstance(network, ExportedNetwork) else 1
        if kernels.channels_last:
            network = lay_out(network)
        if kernels.fold_batch_norm:
            network = fold_batch_norm(network, self._texture(size), request)
        if request.precision in HALVES:
            refuse_without_halves(network, self._texture(size), request)
        return CompiledNetwork(network) if kernels.compile else network

    def _predict(self, batch_nczyx: Tensor) -> Tensor:
        """Run the network, cut its output, and convert it to float32."""
        output_nczyx = _only_tensor(self._forward(batch_nczyx))
        cut = find_cut(output_nczyx.shape, len(batch_nczyx), self._request, self._output_shape)
        # Detached, since it may be a parameter itself.
        return output_nczyx.detach()[cut].float()

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether the device had no memory left; TorchScript and cuDNN tell it in words."""
        return is_out_of_memory(error)

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
                f"the network has no deterministic algorithm on {self._device}: {text}; set "
                "compute.deterministic: false to give up reproducible bytes",
                key="compute.deterministic",
            )
        if match := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
            return ModelError(
                f"the network takes {count(int(match[1]), 'input channel')}, but the input has "
                f"{match[2]}",
                key="model.path",
            )
        return failed_forward(text, self._request, self._output_shape, where=where_raised(error))

    def _forward(self, batch_nczyx: Tensor) -> Any:
        """Run the network once."""
        with computing(self._request):
            return self._network(batch_nczyx.contiguous(memory_format=self._layout))

    def _use_threads(self) -> None:
        """Give this thread its cores and its device: OpenMP and CUDA keep them per thread."""
        if self._thread == threading.get_ident():
            return
        torch.set_num_threads(self._request.threads)
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device.index or 0)
        self._threads = torch.get_num_threads()
        self._thread = threading.get_ident()

    def _texture(self, batch_size: int) -> Tensor:
        """Return a batch of chance in [0, 1], the same on every rank."""
        shape = self._batch_shape(self._request.patch_shape, batch_size)
        chance = torch.Generator().manual_seed(0)
        batch_nczyx = torch.rand(shape, generator=chance).to(self._device)
        return batch_nczyx.contiguous(memory_format=self._layout)

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
        f"the network returned {found}; expected one tensor: wrap it in a module that returns only "
        "the wanted one",
        key="model.path",
    )


def _gist(error: Exception) -> str:
    """Return the line that tells most: TorchScript puts its own traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"\w*Error: ", line)]
    line = (marked or lines or ["no message"])[-1 if marked else 0]
    return line if marked else f"{type(error).__name__}: {line}"
