"""What one rank computes with, put together from the job: engine, volumes, inference.

Every rank calls these for itself. Knows no other rank.
"""

import logging
from contextlib import ExitStack

from mpichunk.backends import get_backend
from mpichunk.binding import Binding
from mpichunk.engine import Engine, EngineRequest
from mpichunk.inference import BlockInference, scaling_for
from mpichunk.pipeline import Source
from mpichunk.startup import Job
from mpichunk.volume import Reader, Writer, open_output

log = logging.getLogger(__name__)


def engine_request(job: Job, binding: Binding) -> EngineRequest:
    """Return what this rank's engine must do."""
    config = job.config
    return EngineRequest(
        patch_shape=config.patch.shape,
        crop=config.patch.crop,
        batch_size=config.patch.batch_size,
        in_channels=job.volume.num_channels,
        out_channels=config.model.out_channels,
        threads=binding.threads,
        precision=config.compute.precision,
        device=binding.device,
        deterministic=config.compute.deterministic,
    )


def load_engine(job: Job, request: EngineRequest) -> Engine:
    """Load the network.

    Raises:
        UserError: it does not load.
    """
    engine = get_backend(job.config.model.backend).load(job.config.model, request)
    info = engine.info
    log.info(
        "network: %s backend, %s, %s (%s), %s, CPU threads: %d",
        info.backend,
        info.version,
        info.device,
        info.device_kind,
        info.precision,
        info.threads,
    )
    return engine


def open_volumes(stack: ExitStack, job: Job, request: EngineRequest) -> tuple[Source, Writer]:
    """Open the volumes as this rank sees them.

    Raises:
        UserError: this rank cannot open one.
    """
    num_threads = request.threads
    mask = None
    if job.mask_handle is not None:
        mask = stack.enter_context(Reader.reopen(job.mask_handle, num_threads=num_threads))
    source = Source(
        volume=stack.enter_context(Reader.reopen(job.volume_handle, num_threads=num_threads)),
        pad=job.config.input.pad,
        mask=mask,
        mask_grid=job.mask_grid,
    )
    return source, open_output(job.output, num_threads=num_threads)


def make_inference(job: Job, engine: Engine, request: EngineRequest) -> BlockInference:
    """Return what turns a block's raw voxels into its core."""
    config = job.config
    return BlockInference(
        engine,
        request,
        scaling=scaling_for(job.volume.dtype, config.input.normalize),
        window_name=config.patch.window,
        activation=config.model.activation,
        skip_blank=config.model.skip_blank,
    )
