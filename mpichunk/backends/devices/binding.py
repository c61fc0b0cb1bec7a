"""Decides which device and how many CPU threads each rank gets, from what all ranks reported.

Pure: knows no torch, no MPI, no environment. Facts of all ranks come in, a table or a refusal goes
out.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpichunk.backends.devices.matching import match
from mpichunk.errors import DeviceError
from mpichunk.words import agree, count

_KEY = "compute.device"
_NUM_NAMED = 8
MOST_ROWS = 64
"""Rows of the table of ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device as one process sees it."""

    kind: str
    """The framework's word: `cuda`, `xpu`, `mps`."""

    index: int
    """Its number in this process."""

    name: str
    """Model."""

    physical_id: str
    """UUID or PCI address: the same in every process that sees the same device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleDevices:
    """What one process could compute on."""

    accelerators: tuple[Accelerator, ...] = ()
    """Visible accelerators, in the framework's order."""

    cpu_kind: str
    """Instruction set of the CPU, e.g. "cpu AVX512"."""

    framework: str = "torch"
    """Which package looked for accelerators."""

    note: str = ""
    """What the framework said while it looked, for the user who expected a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank reports of itself; small and picklable."""

    rank: int
    """Rank in the job."""

    host: str
    """Name of its node."""

    local_rank: int
    """Rank among those of its node."""

    cores: tuple[int, ...]
    """Numbers of the CPU cores that this rank may run on."""

    num_host_cores: int
    """Cores of the node."""

    devices: VisibleDevices
    """Devices that it sees."""

    gpu_hints: tuple[str, ...] = ()
    """Signs that the job was given accelerators; see `visibility`."""

    visible: str = "all"
    """Which accelerators the environment restricts it to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where one rank computes."""

    rank: int
    """Rank in the job."""

    host: str
    """Name of its node."""

    device: str
    """The framework's name, e.g. `cuda:0` or `cpu`."""

    device_id: str
    """What names the device on its node, `-` for a CPU."""

    visible: str
    """Which accelerators the environment restricts the rank to."""

    device_kind: str
    """Accelerator model or CPU instruction set: what the bytes depend on."""

    threads: int
    """CPU threads for the network; the same on every rank."""

    num_cores: int
    """Cores that this rank may run on."""

    def __str__(self) -> str:
        device = self.device if self.device == "cpu" else f"{self.device} ({self.device_id})"
        return (
            f"rank {self.rank} on {self.host}: {device}, {self.device_kind}; "
            f"threads {self.threads}, cores {self.num_cores}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """Where all ranks compute."""

    ranks: tuple[Binding, ...]
    """One per rank, in order."""

    warnings: tuple[str, ...]
    """What the user should know, one line each."""

    def of(self, rank: int) -> Binding:
        """Return where one rank computes."""
        return next(binding for binding in self.ranks if binding.rank == rank)

    @property
    def device_kinds(self) -> tuple[str, ...]:
        """The different device kinds, that of rank 0 first."""
        return tuple(dict.fromkeys(binding.device_kind for binding in self.ranks))

    @property
    def table(self) -> str:
        """Rank, host, device and threads as text; which device where there are any.

        Of very many ranks only the first: each tells its own row in its log.
        """
        shown = self.ranks[:MOST_ROWS]
        columns = {
            "rank": [str(b.rank) for b in shown],
            "host": [b.host for b in shown],
            "device": [b.device for b in shown],
            "id": [b.device_id for b in shown],
            "visible": [b.visible for b in shown],
            "threads": [str(b.threads) for b in shown],
            "cores": [str(b.num_cores) for b in shown],
            "kind": [b.device_kind for b in shown],
        }
        if all(b.device == "cpu" for b in self.ranks):
            del columns["id"], columns["visible"]
        padded = [
            [cell.ljust(max(map(len, [name, *cells]))) for cell in [name, *cells]]
            for name, cells in columns.items()
        ]
        lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
        num_more = len(self.ranks) - len(shown)
        if num_more:
            num_hosts = len({b.host for b in self.ranks})
            lines.append(
                f"and {count(num_more, 'rank')} more, {count(num_hosts, 'host')} in all: "
                "logs/rank-*.log"
            )
        return "\n".join(lines)


def bind(
    ranks: Sequence[RankFacts], *, device: str, threads: int | None, share_device: bool
) -> Bindings:
    """Decide for all ranks; every rank that calls this with the same facts decides the same.

    Args:
        ranks: facts of all ranks, in order.
        device: `compute.device`; `cpu` for a backend that has no use for accelerators.
        threads: `compute.threads`; None: the rank's share of its cores, the smallest of all ranks,
            since their number enters the result.
        share_device: allow several ranks on one accelerator.

    Raises:
        DeviceError: a rank finds no device of the kind asked for, the job was given accelerators
            that the framework does not see, or two ranks would share one.
    """
    chosen = _choose([_usable(facts, device) for facts in ranks], ranks)
    if not share_device:
        _refuse_sharing(ranks, chosen)
    shares = _thread_shares(ranks)
    num_threads = threads or min(shares)
    bindings = tuple(
        Binding(
            rank=facts.rank,
            host=facts.host,
            device=f"{found.kind}:{found.index}" if found else "cpu",
            device_id=found.physical_id if found else "-",
            visible=facts.visible,
            device_kind=found.name if found else facts.devices.cpu_kind,
            threads=num_threads,
            num_cores=len(facts.cores),
        )
        for facts, found in zip(ranks, chosen, strict=True)
    )
    warnings = [
        *_warn_of_cpu(ranks, chosen, device),
        *_warn_of_kinds(bindings),
        *_warn_of_threads(ranks, shares, num_threads, given=threads is not None),
        *_warn_of_single_cores(ranks),
    ]
    return Bindings(ranks=bindings, warnings=tuple(warnings))


def _choose(
    usable: Sequence[Sequence[Accelerator]], ranks: Sequence[RankFacts]
) -> list[Accelerator | None]:
    """Return the accelerator of each rank, None for its CPU.

    Ranks of a node take one each in order of their local ranks: of four that see the same four
    devices the k-th takes the k-th. Where each sees some, as Slurm may bind them, no two take the
    same unless there are too few.
    """
    chosen: list[Accelerator | None] = [None] * len(ranks)
    nodes: dict[str, list[int]] = defaultdict(list)
    for k, facts in enumerate(ranks):
        if usable[k]:
            nodes[facts.host].append(k)
    for members in nodes.values():
        members.sort(key=lambda k: ranks[k].local_rank)
        ids = match([[a.physical_id for a in usable[k]] for k in members])
        for k, physical_id in zip(members, ids, strict=True):
            seen = usable[k]
            own = [a for a in seen if a.physical_id == physical_id]
            # Too few: they take turns.
            chosen[k] = own[0] if None not in ids else seen[ranks[k].local_rank % len(seen)]
    return chosen


def _usable(facts: RankFacts, device: str) -> list[Accelerator]:
    """Return the accelerators that a rank may take, [] for its CPU."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", device)
    if match is None:
        raise DeviceError(
            f"{device!r} is not a device; expected auto, cpu, cuda, cuda:1 or the like", key=_KEY
        )
    kind, index = match.groups()
    if kind == "cpu":
        return []
    visible = [a for a in facts.devices.accelerators if kind in ("auto", a.kind)]
    if index is not None:
        visible = [a for a in visible if a.index == int(index)]
    if visible:
        return visible
    who, seen = f"rank {facts.rank} on {facts.host}", _what_is_seen(facts)
    if kind != "auto":
        raise DeviceError(
            f"{who} has no device {device!r}: {seen}; use `auto` or `cpu` (NVIDIA's and AMD's are "
            "`cuda`), ask the launcher for accelerators, or install a torch that is built for them",
            key=_KEY,
        )
    if facts.gpu_hints:
        raise DeviceError(
            f"{who} was given accelerators ({', '.join(facts.gpu_hints)}), but {seen}; install a "
            "torch that is built for them and for the node's driver, or set compute.device: cpu if "
            "that is intended",
            key=_KEY,
        )
    return []


def _what_is_seen(facts: RankFacts) -> str:
    """Return in words which accelerators the framework sees."""
    names = ", ".join(f"{a.kind}:{a.index} {a.name}" for a in facts.devices.accelerators)
    note = f" ({facts.devices.note})" if facts.devices.note else ""
    return f"{facts.devices.framework} sees {names or 'no accelerator'}{note}"


def _refuse_sharing(ranks: Sequence[RankFacts], chosen: Sequence[Accelerator | None]) -> None:
    """Refuse two ranks on one physical device."""
    taken: dict[tuple[str, str], int] = {}
    for facts, found in zip(ranks, chosen, strict=True):
        if found is None:
            continue
        other = taken.setdefault((facts.host, found.physical_id), facts.rank)
        if other == facts.rank:
            continue
        local = [r for r in ranks if r.host == facts.host]
        num_devices = len({a.physical_id for r in local for a in r.devices.accelerators})
        # A process sees one MIG instance of those in its list, the first.
        is_mig = "MIG-" in found.physical_id or "MIG-" in facts.visible
        cure = (
            "; give each rank a MIG instance of its own: srun --gpus-per-task=1" if is_mig else ""
        )
        raise DeviceError(
            f"ranks {other} and {facts.rank} on {facts.host} would share one device, {found.name} "
            f"({found.physical_id}): {count(len(local), 'rank')} and "
            f"{count(num_devices, 'visible device')} there; start no more ranks per node than it "
            f"has devices, or set compute.share_device: true{cure}",
            key=_KEY,
        )


def _thread_shares(ranks: Sequence[RankFacts]) -> list[int]:
    """Return each rank's cores divided by the ranks of its node that may run on any of them."""
    masks: dict[str, list[set[int]]] = defaultdict(list)
    for facts in ranks:
        masks[facts.host].append(set(facts.cores))
    shares = []
    for facts in ranks:
        num_sharing = sum(not mask.isdisjoint(facts.cores) for mask in masks[facts.host])
        shares.append(max(1, len(facts.cores) // max(1, num_sharing)))
    return shares


def _warn_of_cpu(
    ranks: Sequence[RankFacts], chosen: Sequence[Accelerator | None], device: str
) -> list[str]:
    """Warn when `auto` found nothing better than CPUs: loudly where others have more."""
    if device != "auto":
        return []
    on_cpu = [facts for facts, found in zip(ranks, chosen, strict=True) if found is None]
    if not on_cpu:
        return []
    cure = "set compute.device: cpu if that is intended"
    if len(on_cpu) == len(ranks):
        return [f"no accelerator is seen, so everything is computed on the CPU; {cure}"]
    return [
        f"NO ACCELERATOR on {_some(f.host for f in on_cpu)}: {len(on_cpu)} of {len(ranks)} ranks "
        f"{agree(len(on_cpu), 'computes', 'compute')} on the CPU; {cure}"
    ]


def _warn_of_kinds(bindings: Sequence[Binding]) -> list[str]:
    """Warn when the bytes depend on which rank computes a block."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for binding in bindings:
        hosts[binding.device_kind].append(binding.host)
    if len(hosts) < 2:
        return []
    kinds = "; ".join(f"{kind} on {_some(names)}" for kind, names in hosts.items())
    return [f"mixed device kinds: {kinds}. The bytes depend on which rank computes a block"]


def _warn_of_threads(
    ranks: Sequence[RankFacts], shares: Sequence[int], num_threads: int, *, given: bool
) -> list[str]:
    """Warn of cores that stay idle, and of threads that share cores."""
    if given and num_threads > min(shares):
        rank = ranks[shares.index(min(shares))]
        return [
            f"threads per rank: {num_threads} (compute.threads, or what the run began with), but "
            f"rank {rank.rank} on {rank.host} has only {count(min(shares), 'core')} to itself: "
            "threads will compete"
        ]
    if not given and max(shares) > num_threads:
        few = [r.host for r, share in zip(ranks, shares, strict=True) if share == num_threads]
        return [
            f"{count(num_threads, 'thread')} on every rank, since ranks on {_some(few)} have no "
            "more cores of their own and results depend on the number of threads; other ranks have "
            f"up to {max(shares)} cores"
        ]
    return []


def _warn_of_single_cores(ranks: Sequence[RankFacts]) -> list[str]:
    """Warn of ranks bound to one core while other cores of their node are left to nobody."""
    used: dict[str, set[int]] = defaultdict(set)
    for facts in ranks:
        used[facts.host].update(facts.cores)
    single = [
        facts
        for facts in ranks
        if len(facts.cores) == 1 and len(used[facts.host]) < facts.num_host_cores
    ]
    if not single:
        return []
    return [
        f"{len(single)} of {count(len(ranks), 'rank')}, on {_some(f.host for f in single)}, "
        f"{agree(len(single), 'is', 'are')} bound to one core each while cores of their node stay "
        "idle: start with `mpirun --bind-to none`, or `srun --cpus-per-task=N`"
    ]


def _some(names: Iterable[str]) -> str:
    """Return the different names, the first few of them."""
    different = list(dict.fromkeys(names))
    more = len(different) - _NUM_NAMED
    return ", ".join(different[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
