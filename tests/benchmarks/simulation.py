"""Made-up ranks around rank 0's real scheduler, coordinator and journal, on a simulated clock.

    events in a heap -> what ranks say -> Coordinator -> what it says -> more events
                        '-------------- one turn of simulated time --------------'

Knows no MPI, no storage and no network.
"""

import heapq
import pickle
import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from mpichunk.geometry.box import Box, Triple
from mpichunk.plan.memory import BLOCKS_IN_FLIGHT
from mpichunk.plan.plan import Plan
from mpichunk.roles.coordinator import Coordinator
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.hang import BlockDurations
from mpichunk.schedule.messages import (
    Acknowledge,
    Assign,
    Contest,
    Done,
    Failed,
    GiveBack,
    Lease,
    PromiseToAsk,
    Request,
    Stop,
    ToCoordinator,
    ToWorker,
)
from mpichunk.schedule.scheduler import Scheduler

EDGE = 64
"""Voxels of a block's edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is simulated."""

    num_ranks: int
    num_blocks: int

    block_seconds: float = 30.0
    """Median of a block's time."""

    spread: float = 0.4
    """Standard deviation of its logarithm."""

    straggling: float = 1e-4
    """Share of blocks that take `slowness` times as long where they are, not elsewhere."""

    slowness: float = 40.0
    failing: float = 1e-5
    """Share of tries that fail."""

    num_deaths: int = 10
    """Ranks that die, spread over the run."""

    turn_seconds: float = 0.25
    """Simulated time of one turn of rank 0."""

    num_left: int | None = None
    """Blocks that earlier starts have left; default: all."""

    is_backing_up: bool = True
    seed: int = 0


class NeverSlow(BlockDurations):
    """Takes nothing for slow, so that nothing is backed up."""

    slow_seconds = float("inf")


class Rank:
    """A rank that computes its leases one after another."""

    __slots__ = ("contested", "held", "is_stopped", "last", "number", "unacknowledged")

    def __init__(self, number: int) -> None:
        self.number = number
        self.held: deque[Lease] = deque()
        self.contested: set[Lease] = set()
        self.unacknowledged: dict[Lease, Done | Failed] = {}
        self.is_stopped = False
        self.last = 0.0
        """When it has last finished a block."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of it."""

    num_decisions: int = 0
    """Leases given and records taken in."""

    num_backups: int = 0
    seconds: float = 0.0
    """Real seconds of the coordinator and its journal, fsync included."""

    cpu_seconds: float = 0.0
    """CPU time of the same."""

    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    idle_seconds: float = 0.0
    """Of all ranks together between their last block and the end."""

    most_leased: int = 0
    """Leases out at a time."""

    regroup_seconds: list[float] = field(default_factory=list)
    """Real time that rank 0 takes when a rank was lost."""

    wire_nbytes: float = 0.0
    """Per block, both ways, estimated from every 50th turn."""

    slowest_turn: float = 0.0
    """CPU seconds of the coordinator in one turn, losses apart."""


def plan_of(num_blocks: int) -> Plan:
    """Return a plan of so many blocks, as near a cube as it goes."""
    shape: Triple = (num_blocks, 1, 1)
    for z in range(1, round(num_blocks ** (1 / 3)) + 2):
        if num_blocks % z == 0:
            rest = num_blocks // z
            y = next(y for y in range(int(rest**0.5), 0, -1) if rest % y == 0)
            shape = (z, y, rest // y)
    volume = Box(start=(0, 0, 0), stop=(EDGE * shape[0], EDGE * shape[1], EDGE * shape[2]))
    return Plan(
        volume=volume,
        roi=volume,
        output_domain=volume,
        block_shape=(EDGE, EDGE, EDGE),
        output_patch_shape=(16, 32, 32),
        crop=(0, 0, 0),
        overlap=(0, 0, 0),
        stitch="crop",
        margin=(0, 0, 0),
    )


class Simulation:
    """All ranks, and rank 0's second role."""

    def __init__(self, case: Case, journal: Journal, plan: Plan) -> None:
        self.case, self.random, self.now = case, random.Random(case.seed), 0.0
        self.result = Result()
        self.ranks = {number: Rank(number) for number in range(case.num_ranks)}
        self.events: list[tuple[float, int]] = []
        self.inbox: list[tuple[int, ToCoordinator]] = []
        done = np.zeros(case.num_blocks, np.bool_)
        if case.num_left is not None:
            done[: case.num_blocks - case.num_left] = True
        self.num_to_do = case.num_blocks - int(np.count_nonzero(done))
        self.scheduler = Scheduler(case.num_blocks, ranks=range(case.num_ranks), done=done)
        self.coordinator = Coordinator(
            self.scheduler,
            journal,
            core_of=plan.grid.__getitem__,
            hosts={rank: f"node{rank // 8:05d}" for rank in range(case.num_ranks)},
            breaker=Breaker(num_ranks=case.num_ranks, max_consecutive_failures=50),
            durations=(BlockDurations if case.is_backing_up else NeverSlow)(300.0),
        )
        expected = case.block_seconds * self.num_to_do / case.num_ranks
        self.deaths = [expected * (i + 1) / (case.num_deaths + 1) for i in range(case.num_deaths)]

    def run(self) -> Result:
        """Let everything happen; return what was measured."""
        started = time.perf_counter()
        for number in self.ranks:
            self.inbox.append((number, Request(num_blocks=BLOCKS_IN_FLIGHT)))
        num_turns = 0
        while not self.coordinator.is_ended:
            self.turn(is_sampled=num_turns % 50 == 49)
            num_turns += 1
            # At the end nothing may happen for long: rank 0 looks around twice a second.
            next_event = self.events[0][0] if self.events else float("inf")
            soon = self.now + max(self.case.turn_seconds, 0.5 if not self.inbox else 0.0)
            self.now = max(self.now + self.case.turn_seconds, min(next_event, soon))
            self.let_happen()
        self.result.wall_seconds = time.perf_counter() - started
        self.result.simulated_seconds = self.now
        self.result.idle_seconds = sum(self.now - rank.last for rank in self.ranks.values())
        self.result.wire_nbytes *= 50 / max(1, self.num_to_do)
        return self.result

    def let_happen(self) -> None:
        """Let blocks end and ranks die up to now."""
        while self.events and self.events[0][0] <= self.now:
            at, number = heapq.heappop(self.events)
            rank = self.ranks.get(number)
            if rank is not None and not rank.is_stopped:
                self.end_block(rank, at)
        while self.deaths and self.deaths[0] <= self.now:
            self.deaths.pop(0)
            self.lose(self.random.choice(list(self.ranks)[1:]))

    def end_block(self, rank: Rank, at: float) -> None:
        """Let a rank finish its block, report it, ask for another and go on."""
        lease = rank.held.popleft()
        rank.last = at
        must_ask = lease.is_backup or lease in rank.contested
        rank.contested.discard(lease)
        if must_ask and not self.coordinator.may_write(rank.number, lease):
            self.inbox.append((rank.number, GiveBack(leases=(lease,))))
        else:
            record = self.record(lease)
            rank.unacknowledged[lease] = record
            self.inbox.append((rank.number, record))
        self.inbox.append((rank.number, Request(num_blocks=1)))
        if rank.held:
            self.begin_block(rank, at)

    def begin_block(self, rank: Rank, at: float) -> None:
        """Draw when the block at hand will be finished."""
        case = self.case
        seconds = self.random.lognormvariate(0.0, case.spread) * case.block_seconds
        if self.random.random() < case.straggling:
            seconds *= case.slowness
        heapq.heappush(self.events, (at + seconds, rank.number))

    def record(self, lease: Lease) -> Done | Failed:
        if self.random.random() < self.case.failing:
            return Failed(lease=lease, error="BlockError", message="made to fail")
        return Done(
            lease=lease,
            num_patches=100,
            num_voxels=EDGE**3,
            nbytes_read=EDGE**3,
            nbytes_written=EDGE**3,
            seconds={"read": 0.8123, "infer": self.case.block_seconds, "write": 0.5123},
            checksum=f"xxh3:{self.random.getrandbits(128):032x}",
        )

    def turn(self, *, is_sampled: bool) -> None:
        """Take a turn of the coordinator."""
        inbox, self.inbox = self.inbox, []
        started, cpu_started = time.perf_counter(), time.thread_time()
        for number, message in inbox:
            if number in self.ranks:
                self.coordinator.handle(number, message)
        outgoing = self.coordinator.assign(self.now)
        outgoing += self.coordinator.commit(self.now)
        cpu_seconds = time.thread_time() - cpu_started
        self.result.seconds += time.perf_counter() - started
        self.result.cpu_seconds += cpu_seconds
        self.result.slowest_turn = max(self.result.slowest_turn, cpu_seconds)
        self.result.most_leased = max(self.result.most_leased, self.scheduler.num_leased)
        if is_sampled:
            self.result.wire_nbytes += wire_nbytes(inbox) + wire_nbytes(outgoing)
        self.result.num_decisions += sum(isinstance(m, Done | Failed) for _, m in inbox)
        for number, message in outgoing:
            if number in self.ranks:
                self.hear(self.ranks[number], message)

    def hear(self, rank: Rank, message: ToWorker) -> None:
        """Let a rank take in what the coordinator says."""
        match message:
            case Assign(leases=leases):
                is_idle = not rank.held
                rank.held.extend(leases)
                self.result.num_decisions += len(leases)
                self.result.num_backups += sum(lease.is_backup for lease in leases)
                if is_idle:
                    self.begin_block(rank, self.now)
            case Acknowledge(leases=leases):
                for lease in leases:
                    rank.unacknowledged.pop(lease, None)
            case Contest(lease=lease):
                if lease in rank.held:
                    rank.contested.add(lease)
                    self.inbox.append((rank.number, PromiseToAsk(lease=lease)))
            case Stop():
                rank.is_stopped = True

    def lose(self, number: int) -> None:
        """Let a rank die, and the others begin again, as after a Shrink."""
        del self.ranks[number]
        held = {n: (*rank.held, *rank.unacknowledged) for n, rank in self.ranks.items()}
        writing = {n: tuple(rank.unacknowledged) for n, rank in self.ranks.items()}
        started = time.perf_counter()
        self.coordinator.regroup(held, self.now, writing=writing)
        self.result.regroup_seconds.append(time.perf_counter() - started)
        self.inbox.clear()
        for n, rank in self.ranks.items():
            self.inbox += [(n, record) for record in rank.unacknowledged.values()]
            num_missing = BLOCKS_IN_FLIGHT - len(rank.held)
            if num_missing:
                self.inbox.append((n, Request(num_blocks=num_missing)))


def wire_nbytes(messages: list[tuple[int, ToCoordinator]] | list[tuple[int, ToWorker]]) -> int:
    """Return the bytes of these messages as parcels between ranks, those of rank 0 left out."""
    parcels = defaultdict(list)
    for number, message in messages:
        if number:
            parcels[number].append(message)
    return sum(len(pickle.dumps(parcel, -1)) for parcel in parcels.values())
