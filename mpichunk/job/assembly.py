"""What a rank computes with, put together from the job: device, engine, volumes, inference.

Every rank calls these. Knows no blocks, and no other rank but to share out the devices.
"""

import logging
import os
from contextlib import ExitStack
from glob import glob

from mpichunk.backends import get_backend
from mpichunk.backends.devices.binding import Binding, Bindings, RankFacts, bind
from mpichunk.backends.devices.visibility import gpu_hints, visible_devices
from mpichunk.backends.engine import Engine, EngineRequest, Kernels
from mpichunk.block.inference import BlockInference, scaling_for
from mpichunk.block.pipeline import InputSource
from mpichunk.config.predictionrules import channel_offsets
from mpichunk.config.reduction import Reduction
from mpichunk.config.schema import Config
from mpichunk.geometry.symmetry import Augmentation
from mpichunk.job.startup import Job
from mpichunk.ranks.communicator import Communicator
from mpichunk.volume import Reader, Writer, open_output

log = logging.getLogger(__name__)


def bind_ranks(comm: Communicator, job: Job, *, threads: int | None = None) -> Bindings:
    """Decide, alike on every rank, where each rank computes.

    Args:
        comm: The ranks; all must call this.
        job: What is computed.
        threads: CPU threads of each where the config leaves that open, as a run that is resumed
            began with; None: each rank's share of its cores.
    """
    config = job.config
    backend = get_backend(config.model.backend)
    facts = RankFacts(
        rank=comm.rank,
        host=comm.host,
        local_rank=comm.local_rank,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        num_host_cores=os.cpu_count() or 1,
        devices=backend.probe(config.compute.device),
        gpu_hints=gpu_hints(os.environ, glob("/dev/nvidia[0-9]*")),
        visible=visible_devices(os.environ),
    )
    return bind(
        comm.allgather(facts),
        device="cpu" if backend.cpu_only else config.compute.device,
        threads=config.compute.threads or threads,
        share_device=config.compute.share_device,
    )


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
        kernels=Kernels(**dict.fromkeys(config.compute.kernels, True)),
    )


def prepare_network(job: Job, request: EngineRequest) -> bytes | None:
    """Do for all ranks what only one need do to load the network.

    Raises:
        UserError: it does not load.
    """
    return get_backend(job.config.model.backend).prepare(job.config.model, request)


def load_engine(job: Job, request: EngineRequest, prepared: bytes | None = None) -> Engine:
    """Load the network, from what `prepare_network` returned if that was anything.

    Raises:
        UserError: it does not load.
    """
    engine = get_backend(job.config.model.backend).load(job.config.model, request, prepared)
    info = engine.info
    log.info(
        "network: %s backend, %s, %s (%s), %s, CPU threads: %d",
        info.backend,
        info.version,
        info.device,
        info.device_kind,
        info.how,
        info.threads,
    )
    return engine


def open_volumes(stack: ExitStack, job: Job, request: EngineRequest) -> tuple[InputSource, Writer]:
    """Open the volumes as this rank sees them.

    Raises:
        UserError: this rank cannot open one.
    """
    num_threads = request.threads
    mask = None
    if job.mask_handle is not None:
        mask = stack.enter_context(Reader.reopen(job.mask_handle, num_threads=num_threads))
    source = InputSource(
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
        augmentation=make_augmentation(config),
        reduction=Reduction.of(config),
    )


def make_augmentation(config: Config) -> Augmentation | None:
    """Return the turns that each patch is averaged over; None for none."""
    if not config.model.augment:
        return None
    return Augmentation.make(
        config.model.augment,
        num_channels=config.model.out_channels,
        offsets=channel_offsets(config.model.affinity_channels),
        shape=config.output_patch_shape,
    )
