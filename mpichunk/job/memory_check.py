"""Has every rank weigh what it will need against what it may take, before any block is leased.

Measures one forward and keeps what it tells. Knows no blocks, and decides nothing: `plan.fit` does.

    before the network is loaded    what is known without it     <= what the host has left
    after its first forward         that, and the forward's own  <= host, and accelerator
"""

import logging
from dataclasses import dataclass, replace

from mpichunk.backends.devices.binding import Bindings
from mpichunk.backends.engine import Engine, EngineRequest
from mpichunk.errors import DEVICE_FAILURES, UserError
from mpichunk.job.forward_probe import HeldMemory, MeasuredLoad, probe_engine, settle, write_probe
from mpichunk.job.host_memory import held_nbytes, host_room, memory_groups
from mpichunk.job.startup import Job
from mpichunk.plan.fit import Room, find_doubt, find_refusal
from mpichunk.plan.memory import Memory
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe, better_probe
from mpichunk.processmemory import trim
from mpichunk.ranks.agreement import on_every_rank, on_rank_0
from mpichunk.ranks.communicator import Communicator
from mpichunk.words import size

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who shares what is to be done; the same on every rank, but for the probe."""

    num_blocks: int
    """Blocks to do."""

    ranks: tuple[int, ...]
    """The ranks that compute."""

    probe: Probe | None = None
    """What a forward told on this rank."""

    has_probed: bool = False
    """Whether forwards have run: before, not all is known, and so nothing is doubted."""


def check_host(comm: Communicator, job: Job, request: EngineRequest, crew: Crew) -> None:
    """Refuse, on all ranks, what does not fit into the memory of the host of a rank that computes.

    Args:
        comm: The ranks; all must call this.
        job: What is to be run.
        request: What this rank's engine must do.
        crew: Who does it; the others hold what they hold.

    Raises:
        UserError: it does not fit; names what would.
    """
    groups = list(memory_groups())
    computes = comm.rank in crew.ranks
    mine = comm.host, {group.ident for group in groups}, computes, held_nbytes()
    here = [rank for rank in comm.allgather(mine) if rank[0] == comm.host]
    crowd = [idents for _, idents, is_busy, _ in here if is_busy]
    shared = [(group, sum(group.ident in idents for idents in crowd)) for group in groups]
    idle = sum(nbytes for _, _, is_busy, nbytes in here if not is_busy)
    room = host_room(len(crowd), shared, idle_nbytes=idle) if computes else None
    _check(comm, job, room, "cpu" if request.device == "cpu" else "host", crew)


def check_device(
    comm: Communicator, job: Job, engine: Engine, bindings: Bindings, crew: Crew
) -> None:
    """Refuse, on all ranks, what does not fit into the accelerator of a rank that computes.

    Args:
        comm: The ranks; all must call this.
        job: What is to be run.
        engine: This rank's network; one that says nothing about its device is not weighed.
        bindings: Which ranks share a device.
        crew: Who computes.

    Raises:
        UserError: it does not fit; names what would.
    """
    own = bindings.of(comm.rank)
    same = (own.host, own.device_id)
    busy = [bindings.of(rank) for rank in crew.ranks]
    num_sharing = sum((other.host, other.device_id) == same for other in busy)
    room = device_room(engine, num_sharing) if comm.rank in crew.ranks else None
    _check(comm, job, room, "device", crew)


def device_room(engine: Engine, num_sharing: int = 1) -> Room | None:
    """Return what a rank may take of its accelerator's memory, None if nobody says.

    With nothing off for gaps between arrays: where the allocator finds no place it gives back what
    it keeps and tries again, and a batch that has no place then is halved. To refuse a run for that
    would be a guess.
    """
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
    loading: MeasuredLoad,
) -> tuple[Probe | None, Probe | None]:
    """Run one forward more on every rank that computes.

    Returns what it tells of this rank, None if it does not compute; and what it tells of the first
    one that does. Both are None without a network.
    """
    if job.config.model.backend == "identity":
        return None, None
    held = HeldMemory.most(comm.allgather(settle(engine, loading)))
    mine: Probe | None = None
    if comm.rank in sound:
        try:
            mine = probe_engine(engine, request)
        except SystemExit as error:
            # A network that calls sys.exit would end the run as if all were well.
            raise RuntimeError(f"the network called sys.exit({error.code})") from error
        except DEVICE_FAILURES as error:
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
    return mine, next((probe for probe in comm.allgather(mine) if probe is not None), None)


def keep_probe(job: Job, probe: Probe) -> None:
    """Keep what a forward told for `plan`; where that cannot be, say so and go on.

    What `bench` has measured of the same device is more, and stays.
    """
    if better_probe(job.probe(), probe) is not probe:
        return
    try:
        write_probe(job.run_dir, job.config, job.model_files(), probe)
    except OSError as error:
        log.warning("%s: cannot be written, so `plan` will not know: %s", job.run_dir, error)


def _check(comm: Communicator, job: Job, room: Room | None, memory: Memory, crew: Crew) -> None:
    """Raise on all ranks what `find_refusal` finds on any; have the first doubt told."""
    premise = Premise(
        plan=job.plan,
        config=job.config,
        info=job.volume,
        num_ranks=len(crew.ranks),
        num_blocks=crew.num_blocks,
        model_nbytes=on_rank_0(comm, job.model_nbytes),
        probe=crew.probe,
    )

    def refuse() -> None:
        refusal: UserError | None = None
        if room is not None:
            refusal = find_refusal(premise, room, memory=memory)
        if refusal is not None:
            raise refusal

    on_every_rank(comm, refuse)
    if not crew.has_probed:
        return
    doubt = None if room is None else find_doubt(premise, room, memory=memory)
    doubts = [words for words in comm.allgather(doubt) if words is not None]
    if doubts and comm.is_coordinator:
        log.warning("%s", doubts[0])
