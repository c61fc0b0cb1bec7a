"""What goes wrong, when and where: drawn from a seed, so that it can be drawn again.

Knows no process and no file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

MOST_RANKS = 4
POINTS = {"read": 12, "infer": 12, "write": 12, "report": 12, "turn": 120, "sync": 20}
"""Where a rank can meet a fault, and how often at most it comes past before."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that happens to one rank, once."""

    kind: str
    """See `program.MEET`."""

    rank: int
    """Which rank of the job."""

    point: str
    """One of `POINTS`, or `time`."""

    after: float
    """The time it comes past; seconds after its start for `time`."""

    code: int = 0
    """What it exits with."""

    seconds: float = 0
    """How long it sleeps."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the job."""

    num_ranks: int
    mode: str
    faults: tuple[Fault, ...] = ()
    """What ranks meet."""

    nan_blocks: tuple[int, ...] = ()
    """Blocks for which the network returns NaN."""

    bad_ranks: tuple[int, ...] = ()
    """Ranks whose network returns wrong numbers from the start."""

    hurdle: str | None = None
    """What is wrong with the files: `wall`, `corrupt`, `disk-full`, `journal-full`."""

    kill_seconds: float | None = None
    """When the whole job is killed, after its start."""

    kill_blocks: int | None = None
    """How many blocks are journaled when the whole job is killed."""

    @property
    def is_undisturbed(self) -> bool:
        return not (
            self.faults
            or self.nan_blocks
            or self.bad_ranks
            or self.hurdle
            or self.kill_seconds is not None
            or self.kill_blocks is not None
        )

    def told(self) -> dict[str, Any]:
        """Return what the ranks must know."""
        return {
            "faults": [asdict(f) for f in self.faults],
            "nan_blocks": self.nan_blocks,
            "bad_ranks": self.bad_ranks,
        }


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Starts of one run, each with its faults; then it is started until it is complete."""

    kind: str
    seed: int
    attempts: tuple[Attempt, ...]

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"


def draw(kind: str, seed: int, *, num_blocks: int) -> Scenario:
    """Return the scenario of a kind and a seed."""
    random = Random(f"{kind} {seed}")
    return Scenario(kind=kind, seed=seed, attempts=tuple(KINDS[kind](random, num_blocks)))


def _attempt(random: Random, *, min_ranks: int = 1, **more: Any) -> Attempt:
    return Attempt(
        num_ranks=random.randint(min_ranks, MOST_RANKS),
        mode=random.choice(["dynamic", "static"]),
        **more,
    )


def _fault(random: Random, kind: str, rank: int, point: str | None = None) -> Fault:
    # Only the coordinator comes past `sync`.
    points = [p for p in POINTS if rank == 0 or p != "sync"]
    if point is None or (point == "sync" and rank != 0):
        point = random.choice([*points, "time"])
    after = random.uniform(0.8, 2.5) if point == "time" else random.randint(1, POINTS[point])
    code = random.choice([0, 1, 3, 75])
    seconds = random.uniform(0.2, 1.5)
    return Fault(kind=kind, rank=rank, point=point, after=after, code=code, seconds=seconds)


def _rank_faults(
    *kinds: str, most: int = 1, points: tuple[str | None, ...] = (None,)
) -> Callable[[Random, int], list[Attempt]]:
    """Return a function that draws one start on which one to `most` ranks meet a fault."""

    def draw_attempts(random: Random, num_blocks: int) -> list[Attempt]:
        attempt = _attempt(random, min_ranks=2)
        num_faults = min(attempt.num_ranks, random.randint(min(2, most), most))
        ranks = random.sample(range(attempt.num_ranks), num_faults)
        # Rank 0 is one of several, but has two roles.
        if 0 not in ranks and random.random() < 0.25:
            ranks[0] = 0
        faults = tuple(
            _fault(random, random.choice(kinds), rank, random.choice(points)) for rank in ranks
        )
        return [_with(attempt, faults=faults)]

    return draw_attempts


def _with(attempt: Attempt, **changes: Any) -> Attempt:
    return Attempt(**{**attempt.__dict__, **changes})


def _job_kill(random: Random, num_blocks: int) -> list[Attempt]:
    """Kill the whole job, again and again, each time with another number of ranks."""
    attempts = []
    for _ in range(random.randint(1, 3)):
        if random.random() < 0.4:
            moment: dict[str, Any] = {"kill_seconds": random.uniform(0.0, 2.0)}
        else:
            moment = {"kill_blocks": random.randrange(num_blocks)}
        attempts.append(_attempt(random, **moment))
    return attempts


def _nan(random: Random, num_blocks: int) -> list[Attempt]:
    blocks = random.sample(range(num_blocks), random.randint(1, 3))
    return [_attempt(random, nan_blocks=tuple(sorted(blocks)))]


def _bad_rank(random: Random, num_blocks: int) -> list[Attempt]:
    """Some ranks compute wrongly. Not rank 0: it is what they are compared with."""
    attempt = _attempt(random, min_ranks=2)
    ranks = random.sample(range(1, attempt.num_ranks), random.randint(1, attempt.num_ranks - 1))
    return [_with(attempt, bad_ranks=tuple(sorted(ranks)))]


def _hurdle(name: str) -> Callable[[Random, int], list[Attempt]]:
    return lambda random, num_blocks: [_attempt(random, hurdle=name)]


IN_BLOCK = ("read", "infer", "write")
"""Points in the pipeline's threads, where an exception fails the block."""

KINDS: dict[str, Callable[[Random, int], list[Attempt]]] = {
    "job-kill": _job_kill,
    "rank-kill": _rank_faults("kill"),
    "rank-kills": _rank_faults("kill", most=3),
    "segfault": _rank_faults("segfault", points=(*IN_BLOCK, "report", "turn")),
    "exit": _rank_faults("exit"),
    "bug": _rank_faults("bug", points=(*IN_BLOCK, "report", "turn", "sync")),
    "stop": _rank_faults("stop"),
    "block-error": _rank_faults("block-error", "memory-error", most=3, points=IN_BLOCK),
    "slow": _rank_faults("slow", most=3, points=IN_BLOCK),
    "nan": _nan,
    "bad-rank": _bad_rank,
    "wall": _hurdle("wall"),
    "corrupt": _hurdle("corrupt"),
    "disk-full": _hurdle("disk-full"),
    "journal-full": _hurdle("journal-full"),
    "mixed": _rank_faults(
        "kill", "segfault", "exit", "block-error", "slow", most=3, points=("infer", "write")
    ),
}
