"""Has every rank weigh what it will need against what it may take, before any block is leased.

Measures one forward and keeps what it tells. Knows no blocks, and decides nothing: `plan.fit` does.

    before the network is loaded    what is known without it     <= what the host has left
    after its first forward         that, and the forward's own  <= host, and accelerator
"""

import logging
from dataclasses import replace

from mpichunk.backends.binding import Bindings
from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.errors import UserError
from mpichunk.job.canary import FAILURES
from mpichunk.job.headroom import host_room, memory_groups
from mpichunk.job.probing import Held, Loading, probe_engine, settle, write_probe
from mpichunk.job.startup import Job
from mpichunk.plan.fit import Need, Room, find_refusal
from mpichunk.plan.memory import Memory
from mpichunk.plan.probe import Probe
from mpichunk.processmemory import trim
from mpichunk.ranks.agreement import on_every_rank, on_rank_0
from mpichunk.ranks.communicator import Communicator
from mpichunk.words import size

log = logging.getLogger(__name__)


def check_host(
    comm: Communicator, job: Job, request: EngineRequest, probe: Probe | None = None
) -> None:
    """Refuse, on all ranks, what does not fit into the memory of a rank's host.

    Args:
        comm: The ranks; all must call this.
        job: What is to be run.
        request: What this rank's engine must do.
        probe: What a forward told; None: it has not run yet.

    Raises:
        UserError: it does not fit; names what would.
    """
    groups = list(memory_groups())
    idents = comm.allgather((comm.host, {group.ident for group in groups}))
    shared = [
        (group, sum(host == comm.host and group.ident in found for host, found in idents))
        for group in groups
    ]
    room = host_room(comm.local_size, shared)
    _check(comm, job, room, "cpu" if request.device == "cpu" else "host", probe)


def check_device(
    comm: Communicator, job: Job, engine: Engine, bindings: Bindings, probe: Probe | None
) -> None:
    """Refuse, on all ranks, what does not fit into the memory of a rank's accelerator.

    Args:
        comm: The ranks; all must call this.
        job: What is to be run.
        engine: This rank's network; one that says nothing about its device is not weighed.
        bindings: Which ranks share a device.
        probe: What a forward told.

    Raises:
        UserError: it does not fit; names what would.
    """
    own = bindings.of(comm.rank)
    same = (own.host, own.device_id)
    num_sharing = sum((other.host, other.device_id) == same for other in bindings.ranks)
    room = device_room(engine, num_sharing)
    _check(comm, job, room, "device", probe)


def device_room(engine: Engine, num_sharing: int = 1) -> Room | None:
    """Return what a rank may take of its accelerator's memory, None if nobody says."""
    found = engine.arrays.device_nbytes()
    if found is None:
        return None
    free, held = found
    share = f", shared by {num_sharing} ranks" if num_sharing > 1 else ""
    words = f"{engine.info.device} has {size(free)} free{share}, and this rank holds {size(held)}"
    return Room(nbytes=free // num_sharing + held, words=words)


def probe_ranks(
    comm: Communicator,
    job: Job,
    engine: Engine,
    request: EngineRequest,
    sound: tuple[int, ...],
    loading: Loading,
) -> Probe | None:
    """Run one forward more on every rank that computes; return what it tells of this rank.

    The coordinator keeps what the first of them found, unless more is known of the same device.
    None without a network, and on a rank that does not compute.
    """
    if job.config.model.backend == "identity":
        return None
    held = Held.most(comm.allgather(settle(engine, loading)))
    mine: Probe | None = None
    if comm.rank in sound:
        try:
            mine = probe_engine(engine, request)
        except SystemExit as error:
            # A network that calls sys.exit would end the run as if all were well.
            raise RuntimeError(f"the network called sys.exit({error.code})") from error
        except FAILURES as error:
            # What fails now and then is for the blocks to find out: they are tried elsewhere.
            log.warning("one forward more has failed, so its memory is not known: %s", error)
    trim()
    if mine is not None:
        room = device_room(engine)
        mine = replace(
            mine,
            free_nbytes=None if room is None else room.nbytes,
            resident_nbytes=held.resident_nbytes,
            start_nbytes=held.start_nbytes,
        )
    first = next((probe for probe in comm.allgather(mine) if probe is not None), None)
    if first is not None:
        on_rank_0(comm, lambda: keep_probe(job, first))
    return mine


def keep_probe(job: Job, probe: Probe) -> None:
    """Keep what a forward told for `plan`; where that cannot be, say so and go on.

    What `bench` has measured of the same device is more, and stays.
    """
    earlier = job.probe()
    is_less = probe.pace is None and earlier is not None and earlier.pace is not None
    if is_less and earlier is not None and earlier.device == probe.device:
        return
    try:
        write_probe(job.run_dir, job.config, job.model_files(), probe)
    except OSError as error:
        log.warning("%s: cannot be written, so `plan` will not know: %s", job.run_dir, error)


def _check(
    comm: Communicator, job: Job, room: Room | None, memory: Memory, probe: Probe | None
) -> None:
    """Raise on all ranks what `find_refusal` finds on any."""
    need = Need(
        plan=job.plan,
        config=job.config,
        info=job.volume,
        num_ranks=comm.size,
        model_nbytes=on_rank_0(comm, job.model_nbytes),
        probe=probe,
    )

    def refuse() -> None:
        refusal: UserError | None = None
        if room is not None:
            refusal = find_refusal(need, room, memory=memory)
        if refusal is not None:
            raise refusal

    on_every_rank(comm, refuse)
