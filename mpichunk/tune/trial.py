"""A network as one variant runs it, loaded in this process: what `measure` asks of it.

Knows no other variant, and compares nothing.
"""

from dataclasses import dataclass, replace
from itertools import cycle, islice
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends.engine import DeviceArray, Engine, EngineRequest
from mpichunk.errors import UserError
from mpichunk.job.assembly import bind_ranks, engine_request, load_engine, prepare_network
from mpichunk.job.forward_probe import forward_nbytes
from mpichunk.job.startup import Job
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.tune.figures import Outputs
from mpichunk.tune.variants import Variant, with_settings


def job_of(job: Job, variant: Variant) -> Job:
    """Return the job as a variant runs it.

    Raises:
        ConfigError: its values do not go together.
    """
    return replace(job, config=with_settings(job.config, variant.settings))


def reason(error: BaseException) -> str:
    """Return in one line why a variant does not run."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantTrial:
    """A network, loaded, and a batch on its device."""

    variant: Variant
    patches_nczyx: npt.NDArray[np.float32]
    """What variants are compared on, scaled."""

    job: Job
    engine: Engine
    request: EngineRequest
    batch_nczyx: DeviceArray

    @classmethod
    def load(
        cls, job: Job, variant: Variant, patches_nczyx: npt.NDArray[np.float32]
    ) -> "VariantTrial":
        """Load the network.

        Raises:
            UserError: it does not load; so do `DEVICE_FAILURES`.
        """
        job = job_of(job, variant)
        binding = bind_ranks(SerialCommunicator(), job).of(0)
        request = engine_request(job, binding)
        engine = load_engine(job, request, prepare_network(job, request))
        host = np.stack(list(islice(cycle(patches_nczyx), variant.batch_size)))
        return cls(
            variant=variant,
            patches_nczyx=patches_nczyx,
            job=job,
            engine=engine,
            request=request,
            batch_nczyx=engine.arrays.upload(host),
        )

    def forwards(self, count: int) -> float:
        """Return the seconds of so many forwards."""
        arrays = self.engine.arrays
        arrays.wait()
        started = perf_counter()
        for _ in range(count):
            self.engine.infer(self.batch_nczyx)
        arrays.wait()
        return perf_counter() - started

    def outputs(self) -> Outputs:
        """Return what would be blended for each of the patches, on the host: activated."""
        found: list[Any] = []
        arrays, step = self.engine.arrays, self.variant.batch_size
        for start in range(0, len(self.patches_nczyx), step):
            part = self.patches_nczyx[start : start + step]
            host = np.stack(list(islice(cycle(part), step)))
            output = self.engine.infer(arrays.upload(host))
            written = arrays.activate(output, self.job.config.model.activation)
            # A copy: the next forward may overwrite it.
            found += list(np.array(arrays.download(written))[: len(part)])
        return np.stack(found)

    def forward_nbytes(self) -> int | None:
        """Return the memory of a forward, beyond input, output and weights."""
        return forward_nbytes(self.engine, self.request)

    def release(self) -> None:
        """Give back all memory that is only kept for later forwards."""
        self.engine.arrays.release()

    def close(self) -> None:
        """End it: its memory is what counts in this process."""
        self.release()
