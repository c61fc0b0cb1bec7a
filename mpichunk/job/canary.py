"""Has every rank run the same golden batch, and finds the ranks whose result is off.

A bad accelerator, driver or library makes an error on its rank alone, or none but wrong numbers.
Knows no blocks.

    rank 0's CPU, float32   --reference-->  every rank: largest |difference| / largest |reference|
    no such thing           the element-wise median over the ranks is the reference

Where all compute so, rank 0's is as likely to be wrong as any: it stands unless most ranks differ.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from mpichunk.backends import get_backend
from mpichunk.backends.absent import AbsentEngine
from mpichunk.backends.difference import relative_difference
from mpichunk.backends.engine import Engine, EngineRequest, Kernels
from mpichunk.block.inference import check_engine
from mpichunk.config.schema import Model
from mpichunk.errors import DEVICE_FAILURES, DeviceError, UserError
from mpichunk.job.forward_probe import forward_nbytes
from mpichunk.job.host_memory import held_nbytes, host_room, memory_groups
from mpichunk.plan.memory import FLOAT32_NBYTES
from mpichunk.ranks.communicator import Communicator
from mpichunk.rundir.checksum import digest_of
from mpichunk.words import size

Output = npt.NDArray[np.float32]
"""What the network makes of one patch."""

TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest |difference| allowed, as a share of the largest |reference|, by precision.

Sound devices differ in the order of sums: about 1e-6 of that in float32, through a deep network
1e-5; with 8 bits of mantissa 1e-2. A fault changes an exponent, or everything.
"""

_COARSEST = max(TOLERANCES.values())
"""For precisions that only an engine has a name for."""

MOST_VALUES = 1 << 16
"""Of each rank's output so many values, evenly spread, go into a median."""

HOST_FACTOR = 2
"""A forward on a CPU is taken to need so many times the memory of one on a device (a guess)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """What one rank made of the golden batch."""

    rank: int
    host: str
    device: str
    """Where it computed, in words."""

    precision: str = "float32"
    """In which it computed."""

    deviation: float = 0.0
    """From the reference; inf for other shapes, NaN or inf."""

    error: UserError | None = None
    """Why there is no output."""

    held_nbytes: int = 0
    """What its process holds of its host's memory."""


def deviation(found: Output, reference: Output) -> float:
    """Return by how much an output is off; infinitely, if its shape is another or it holds NaN."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        return float("inf")
    return relative_difference(found, reference)


def median_of(outputs: Sequence[Output]) -> Output:
    """Return the element-wise median: with three ranks and more, no single one can move it far."""
    middle: Output = np.median(np.stack(outputs), axis=0).astype(np.float32)
    return middle


def judge(findings: Sequence[GoldenResult]) -> dict[int, str]:
    """Return a sentence for each rank that must not compute."""
    off: dict[int, str] = {}
    for item in findings:
        tolerance = TOLERANCES.get(item.precision, _COARSEST)
        where = f"rank {item.rank} on {item.host} ({item.device})"
        if item.error is not None:
            off[item.rank] = f"{where} cannot run the network: {item.error}"
        elif not item.deviation <= tolerance:
            off[item.rank] = (
                f"{where} computes wrongly: a test patch is off by {item.deviation:.2g} of its "
                f"largest value, at most {tolerance:g} is allowed; look at that device, its "
                "driver and libraries"
            )
    return off


def find_sound_ranks(
    comm: Communicator, model: Model, request: EngineRequest, load: Callable[[], Engine]
) -> tuple[Engine, tuple[int, ...]]:
    """Load the network and run one batch on every rank, to see which compute right.

    Args:
        comm: The ranks; all must call this.
        model: The network.
        request: What this rank's engine must do.
        load: Loads it.

    Returns:
        This rank's engine, one that refuses to run where the rank is not sound; and the ranks that
        compute as the coordinator's CPU does.

    Raises:
        UserError: the network does not load, run or fit, or no rank is sound; on every rank.
    """
    cpu = replace(request, device="cpu", precision="float32", batch_size=1, kernels=Kernels())
    engine: Engine = AbsentEngine(request)
    refusal: UserError | None = None
    try:
        engine = load()
    except DEVICE_FAILURES as error:
        refusal = _as_refusal(error, request.device)

    def golden() -> Output:
        if refusal is not None:
            raise refusal
        return check_engine(engine, request)

    def on_cpu(others_nbytes: int) -> Output:
        _require_room(model, request, engine, others_nbytes)
        return check_engine(get_backend(model.backend).load(model, cpu), cpu)

    is_cpu = (request.device, request.precision) == (cpu.device, cpu.precision)
    off = find_off_ranks(
        comm,
        golden,
        reference=None if is_cpu else on_cpu,
        device=engine.info.device,
        precision=engine.info.precision,
    )
    sound = tuple(rank for rank in comm.alive if rank not in off)
    # What is broken is touched no more.
    return engine if comm.rank in sound else AbsentEngine(request), sound


def find_off_ranks(
    comm: Communicator,
    golden: Callable[[], Output],
    *,
    reference: Callable[[int], Output] | None,
    device: str,
    precision: str,
) -> dict[int, str]:
    """Return, on every rank alike, why each rank that is off must not compute.

    Args:
        comm: The ranks; all must call this.
        golden: Runs the golden batch on this rank.
        reference: Makes the float32 result of this rank's CPU, where that is not what `golden`
            does; called on the coordinator only, with what the other ranks of its host hold.
        device: Where this rank computes, in words.
        precision: That of `golden` on this rank.

    Raises:
        UserError: no rank can run the network, or none is right; on every rank.
    """
    output: Output | None = None
    error: UserError | None = None
    try:
        output = golden()
    except DEVICE_FAILURES as refused:
        error = _as_refusal(refused, device)
    mine = GoldenResult(
        rank=comm.rank,
        host=comm.host,
        device=device,
        precision=precision,
        error=error,
        held_nbytes=held_nbytes(),
    )
    findings = comm.allgather(mine)
    _refuse_if_nobody_can(findings)
    if comm.size > 1 or reference is not None:
        wanted = None
        if comm.is_coordinator:
            others = [item for item in findings if item.rank != comm.rank]
            others_nbytes = sum(item.held_nbytes for item in others if item.host == comm.host)
            wanted = output if reference is None else _attempt(reference, others_nbytes)
        findings = _compare(comm, mine, output, wanted)
        # Of two nobody knows which one is right.
        if comm.bcast(reference is None and _differ_mostly(findings)):
            findings = _compare(comm, mine, output, None)
    off = judge(findings)
    if len(off) == comm.size:
        raise DeviceError("; ".join(off.values()), key="compute.device")
    if comm.is_coordinator:
        for sentence in off.values():
            log.error("%s; the run goes on without it", sentence)
    return off


def _compare(
    comm: Communicator, mine: GoldenResult, output: Output | None, wanted: Output | None
) -> list[GoldenResult]:
    """Return the findings of all ranks; `wanted` is the coordinator's reference, if it has one."""
    is_there, digest = comm.bcast((wanted is not None, wanted is not None and digest_of(wanted)))
    if is_there:
        # Ranks of one kind have the very same bytes, and then the array stays at home.
        is_same = output is not None and digest_of(output) == digest
        if not all(comm.allgather(is_same)):
            wanted = comm.bcast(wanted)
    else:
        is_same = False
        output = None if output is None else _sample(output)
        outputs = comm.gather(output)
        found = [item for item in outputs or [] if item is not None]
        wanted = comm.bcast(median_of(found) if found else None)
    share = 0.0
    if not is_same and output is not None and wanted is not None:
        share = deviation(output, wanted)
    return comm.allgather(replace(mine, deviation=share))


def _differ_mostly(findings: Sequence[GoldenResult]) -> bool:
    """Return whether, of three outputs and more, most are not what they are compared with."""
    able = [item for item in findings if item.error is None]
    return len(able) > 2 and 2 * len(judge(able)) > len(able)


def _require_room(model: Model, request: EngineRequest, engine: Engine, others_nbytes: int) -> None:
    """Refuse to load the network on the host as well, where that does not fit beside the ranks.

    Args:
        model: The network.
        request: What this rank's engine was asked for.
        engine: This rank's engine.
        others_nbytes: What the other ranks of this host hold.

    Raises:
        MemoryError: it does not, by the weights and what a forward of one patch takes.
    """
    forward = 0
    # What fails here is the device, and may be why a reference is wanted.
    with suppress(*DEVICE_FAILURES):
        forward = forward_nbytes(engine, request) or 0
    if request.precision in ("bfloat16", "float16"):
        forward *= 2
    num_values = prod(request.patch_shape) * (request.in_channels + request.out_channels)
    patch = forward // request.batch_size + num_values * FLOAT32_NBYTES
    weights = sum(path.stat().st_size for path in get_backend(model.backend).model_files(model))
    need = weights + HOST_FACTOR * patch
    # The other ranks wait, and hold what they hold.
    held = held_nbytes()
    groups = [(group, 1) for group in memory_groups()]
    room = host_room(1, groups, own_nbytes=held, idle_nbytes=others_nbytes)
    if need > room.nbytes - held:
        raise MemoryError(f"it would take about {size(need)} there: {room.words}")


def _refuse_if_nobody_can(findings: Sequence[GoldenResult]) -> None:
    """Raise the first rank's error where every rank has one."""
    errors = [item.error for item in findings]
    first = errors[0]
    if first is None or None in errors:
        return
    if len({str(error) for error in errors}) > 1:
        first.prefixed(f"rank {findings[0].rank} on {findings[0].host}")
    raise first


def _attempt(reference: Callable[[int], Output], others_nbytes: int) -> Output | None:
    """Return the reference, None where the network does not run on this CPU."""
    try:
        return reference(others_nbytes)
    except DEVICE_FAILURES as error:
        log.warning(
            "the network does not run on this CPU (%s), so ranks are compared with the median of "
            "all",
            error,
        )
        return None


def _as_refusal(error: Exception, device: str) -> UserError:
    """Return what went wrong on this rank's device in a form that can travel."""
    if isinstance(error, UserError):
        return error.with_traceback(None)
    text = (str(error).strip() or "no message").splitlines()[0]
    return DeviceError(f"{device} fails: {type(error).__name__}: {text}", key="compute.device")


def _sample(output: Output) -> Output:
    """Return evenly spread values of an output."""
    flat = output.reshape(-1)
    return flat[:: max(1, -(-len(flat) // MOST_VALUES))]
