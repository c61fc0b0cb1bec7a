"""The `pznet` backend: nets that pznet compiled for manycore CPUs, one per process.

Everything but the weights is compiled into such a net: patch, channels, batch, instruction set and
number of cores. What its engine does to a process is held off by `net`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.backends.devices.probing import cpu_kind
from mpichunk.backends.engine import EngineInfo, EngineRequest
from mpichunk.backends.numpy_arrays import NumpyArrays
from mpichunk.backends.pznet.net import PznetNet, find_files, load_net
from mpichunk.backends.shapes.fixed_shape import refuse_fixed_shape
from mpichunk.backends.shapes.network_output import find_cut
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError, UserError

_TRIAL_SECONDS = 300
_NUM_LINES_TOLD = 3


class PznetBackend:
    """Runs compiled nets on the CPU."""

    name = "pznet"
    cpu_only = True

    def model_files(self, model: Model) -> list[Path]:
        """Return all files of the net, without loading it."""
        files = find_files(_folder(model))
        return [files.library, *files.weights, *files.convolutions]

    def probe(self, requested: str) -> VisibleDevices:
        """Return the CPU."""
        return VisibleDevices(cpu_kind=cpu_kind())

    def prepare(self, model: Model, request: EngineRequest) -> bytes | None:
        """Try the net in a process of its own, which may end: return its shapes.

        Raises:
            ModelError: it does not run, or was compiled for other shapes.
        """
        folder = _folder(model)
        find_files(folder)
        shapes = try_net(folder)
        _refuse_shape(folder, shapes["input"], request)
        return json.dumps(shapes).encode()

    def load(
        self, model: Model, request: EngineRequest, prepared: bytes | None = None
    ) -> "PznetEngine":
        """Load the net into this process."""
        folder = _folder(model)
        find_files(folder)
        prepared = prepared or self.prepare(model, request)
        assert prepared is not None, "a trial always tells shapes"
        _refuse_shape(folder, json.loads(prepared)["input"], request)
        return PznetEngine(load_net(folder), request)


class PznetEngine:
    """Cuts batches into those that the net was compiled for."""

    def __init__(self, net: PznetNet, request: EngineRequest) -> None:
        self._net = net
        self._request = request
        self._arrays = NumpyArrays()
        self._compiled = np.zeros(net.input_shape, np.float32)

    @property
    def arrays(self) -> NumpyArrays:
        """Arrays of numpy."""
        return self._arrays

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return EngineInfo(
            backend="pznet",
            version="pznet (compiled, version unknown)",
            device="cpu",
            device_kind=cpu_kind(),
            precision="float32",
            threads=self._net.num_threads,
        )

    def infer(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the net as often as the batch needs it; see `Engine.infer`."""
        step = len(self._compiled)
        parts = []
        for start in range(0, len(batch_nczyx), step):
            part_nczyx = batch_nczyx[start : start + step]
            if len(part_nczyx) < step:
                self._compiled[: len(part_nczyx)] = part_nczyx
                self._compiled[len(part_nczyx) :] = 0
                part_nczyx = self._compiled
            parts.append(self._net.forward(part_nczyx))
        output_nczyx = parts[0] if len(parts) == 1 else np.concatenate(parts)
        output_nczyx = output_nczyx[: len(batch_nczyx)]
        return output_nczyx[
            find_cut(output_nczyx.shape, len(batch_nczyx), self._request, lambda shape: None)
        ]

    def is_out_of_memory(self, error: Exception) -> bool:
        """Return whether Python had no memory left; the net itself would end the process."""
        return isinstance(error, MemoryError)

    def explain(self, error: Exception) -> UserError:
        """Say what can be done about a forward that failed."""
        return ModelError(f"the net failed: {error}", key="model.path")


def try_net(folder: Path) -> dict[str, list[int]]:
    """Load and run a net in a process of its own; return the shapes that it was compiled for.

    Raises:
        ModelError: that process ended otherwise, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="mpichunk-pznet-") as scratch:
        report = Path(scratch) / "report.json"
        # What a trial that is killed cannot remove goes with this folder.
        environment = {**os.environ, "TMPDIR": scratch}
        command = [sys.executable, "-m", "mpichunk.backends.pznet.net", str(folder), str(report)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TRIAL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"the net in {folder} has not run once within {_TRIAL_SECONDS} s", key="model.path"
            ) from error
        if done.returncode == 0 and report.exists():
            found: dict[str, list[int]] = json.loads(report.read_text())
            if "error" not in found:
                return found
            raise ModelError(str(found["error"]), key="model.path")
    raise ModelError(_how_it_ended(folder, done), key="model.path")


def _how_it_ended(folder: Path, done: subprocess.CompletedProcess[str]) -> str:
    """Return why a trial came to no result."""
    lines = (done.stdout + done.stderr).strip().splitlines()[-_NUM_LINES_TOLD:]
    said = f"; it said: {' | '.join(line.strip() for line in lines)}" if lines else ""
    if done.returncode == -signal.SIGILL:
        return (
            f"the net in {folder} was compiled for instructions that this CPU ({cpu_kind()}) does "
            f"not have{said}"
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"the net in {folder} ends its process by {name}{said}"
    return f"the net in {folder} ends its process with exit code {done.returncode}{said}"


def _folder(model: Model) -> Path:
    """Return the folder of the net."""
    if not model.path:
        raise ModelError(
            "the pznet backend needs model.path, the folder of a compiled net", key="model.path"
        )
    return Path(model.path)


def _refuse_shape(folder: Path, shape: list[int], request: EngineRequest) -> None:
    """Refuse a net that was compiled for other patches; any batch can be cut or padded."""
    refuse_fixed_shape(
        folder, [None, *shape[1:]], request, verb="was compiled", cure="compile it for these"
    )
