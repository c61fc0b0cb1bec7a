"""What rank 0 prepares before any block is leased.

Opens volumes, plans, writes the run directory. Knows no communicator: `run` says which rank calls
what.
"""

import json
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk import __version__
from mpichunk.backends import get_backend
from mpichunk.backends.devices.binding import Bindings
from mpichunk.config.file import dump_config
from mpichunk.config.schema import Config, Input, Mask
from mpichunk.errors import JournalError, ModelError
from mpichunk.geometry.masking import MaskGrid
from mpichunk.geometry.volumeinfo import VolumeInfo
from mpichunk.job.forward_probe import read_probe
from mpichunk.plan.estimate import estimate
from mpichunk.plan.fingerprint import Fingerprint, make_fingerprint
from mpichunk.plan.plan import Plan
from mpichunk.plan.prediction import Forecast, forecast
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe, better_probe
from mpichunk.plan.report import plan_json
from mpichunk.plan.work import Work, work_of
from mpichunk.rundir import journal, layout
from mpichunk.rundir.journal import Journal
from mpichunk.rundir.layout import replace_text
from mpichunk.rundir.origin import foreign_output_message
from mpichunk.schedule.messages import State
from mpichunk.volume import OutputSpec, Reader, check_output, holds_chunks, open_input
from mpichunk.words import count

RECORDED_LIBRARIES = (
    "numpy",
    "tensorstore",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "monai",
    "mpi4py",
    "h5py",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What rank 0 has read and decided, small enough to send to every rank."""

    config: Config
    """The effective config."""

    plan: Plan
    """All blocks."""

    volume: VolumeInfo
    """The input."""

    volume_handle: dict[str, Any]
    """How other ranks open the input without reading its metadata again."""

    mask: VolumeInfo | None
    """The mask, if there is one."""

    mask_handle: dict[str, Any] | None
    """As `volume_handle`."""

    mask_grid: MaskGrid | None
    """How the mask lies over the output."""

    output: OutputSpec
    """What is written."""

    run_dir: Path
    """Absolute path of the run directory."""

    def model_files(self) -> tuple[Path, ...]:
        """Return the files of the network."""
        return tuple(get_backend(self.config.model.backend).model_files(self.config.model))

    def model_nbytes(self) -> int:
        """Return their bytes, which is about what the weights take."""
        return sum(path.stat().st_size for path in self.model_files())

    def probe(self) -> Probe | None:
        """Return what the last forward of this config has told, if there was one."""
        return read_probe(self.run_dir, self.config, self.model_files())

    def premise(self, num_ranks: int = 1, *, latest: Probe | None = None) -> Premise:
        """Return what estimates start from, on so many ranks: read from files, once.

        `latest` is what a forward has told just now, if one has.
        """
        return Premise(
            plan=self.plan,
            config=self.config,
            info=self.volume,
            num_ranks=num_ranks,
            model_nbytes=self.model_nbytes(),
            probe=better_probe(self.probe(), latest),
        )

    @property
    def work(self) -> Work:
        """What the plan computes and reads."""
        return work_of(self.plan, self.volume.chunk_shape)

    @property
    def sources(self) -> list[VolumeInfo]:
        """What is read, and must not be written."""
        return [self.volume] if self.mask is None else [self.volume, self.mask]


@dataclass(frozen=True, slots=True, kw_only=True)
class Todo:
    """What rank 0 finds of earlier starts, before it writes anything."""

    fingerprint: Fingerprint
    """What the result depends on."""

    packed: bytes
    """A bit per block, packed: whether it is still to be computed."""

    def unpack(self, num_blocks: int) -> npt.NDArray[np.bool_]:
        """Return (num_blocks,) whether each is still to be computed."""
        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=num_blocks).astype(bool)


def prepare(config: Config) -> Job:
    """Open the input and the mask, and plan.

    Raises:
        UserError: a volume cannot be opened or does not fit.
    """
    with open_config_input(config) as reader:
        volume, volume_handle = reader.info, reader.handle()
    plan = Plan.from_config(config, volume.domain)
    mask, mask_handle, mask_grid = None, None, None
    if config.mask is not None:
        with open_config_mask(config.mask) as reader:
            mask, mask_handle = reader.info, reader.handle()
        mask_grid = MaskGrid.between(volume, mask, invert=config.mask.invert)
    return Job(
        config=config,
        plan=plan,
        volume=volume,
        volume_handle=volume_handle,
        mask=mask,
        mask_handle=mask_handle,
        mask_grid=mask_grid,
        output=output_spec(config, plan, volume),
        run_dir=Path(config.run_dir),
    )


def open_config_input(config: Config) -> Reader:
    """Open the input that a config names."""
    return _open(config.input, "input")


def open_config_mask(section: Mask) -> Reader:
    """Open the mask that a config names."""
    return _open(section, "mask")


def _open(section: Input | Mask, key: str) -> Reader:
    return open_input(
        section.volume,
        mip=section.mip,
        dataset=section.dataset,
        voxel_size=section.voxel_size,
        voxel_offset=section.voxel_offset,
        key=key,
    )


def output_spec(config: Config, plan: Plan, volume: VolumeInfo) -> OutputSpec:
    """Return what the output volume must be."""
    return OutputSpec(
        volume=config.output.volume,
        domain=plan.output_domain,
        num_channels=config.num_written_channels,
        dtype=np.dtype(config.output.dtype),
        chunk_shape=config.chunk_shape,
        shard_shape=config.output.shard_shape,
        voxel_size=volume.voxel_size,
    )


def threads_of_earlier_start(run_dir: Path) -> int | None:
    """Return the CPU threads per rank that a run began with, None for a new run.

    They enter the result, so a resumed run keeps them, however many cores it has now.
    """
    header = journal.read_header(run_dir / journal.NAME)
    if header is None:
        return None
    threads: int | None = header["fingerprint"]["parts"].get("compute.threads")
    return threads


def fingerprint_of(job: Job, *, device_kinds: Sequence[str], threads: int | None) -> Fingerprint:
    """Return what the result of this job depends on; see `make_fingerprint`.

    Raises:
        ModelError: a file of the network is missing or cannot be read.
    """
    try:
        return make_fingerprint(
            job.config,
            volume=job.volume,
            mask=job.mask,
            model_files=job.model_files(),
            device_kind=" + ".join(sorted(device_kinds)),
            threads=threads,
        )
    except OSError as error:
        raise ModelError(
            f"{error.filename} cannot be read: {error.strerror}", key="model.path"
        ) from error


def blocks_to_do(job: Job, fingerprint: Fingerprint, *, fresh: bool) -> npt.NDArray[np.bool_]:
    """Return (blocks,) whether each is still to be computed; write nothing.

    Raises:
        JournalError: the journal is of another run, or its output is gone; or there is none, and
            what the output holds is somebody else's.
        VolumeError: the output exists and differs, or cannot be created.
    """
    is_there = check_output(job.output, sources=job.sources)
    num_blocks = len(job.plan)
    if fresh:
        return np.ones(num_blocks, dtype=np.bool_)
    path = job.run_dir / journal.NAME
    if is_there and journal.read_header(path) is None and holds_chunks(job.output):
        raise JournalError(foreign_output_message(job.run_dir, fingerprint), key="output.volume")
    states = journal.read_states(job.run_dir, num_blocks=num_blocks, fingerprint=fingerprint)
    num_done = int(np.count_nonzero(states == State.DONE))
    if num_done and not is_there:
        raise JournalError(
            f"{job.run_dir / journal.NAME} has {count(num_done, 'finished block')}, but the output "
            f"{job.config.output.volume} that was written to is gone; put it back, mark its blocks "
            "undone with `verify --repair`, or compute every block again with --fresh",
            key="output.volume",
        )
    todo: npt.NDArray[np.bool_] = states != State.DONE
    return todo


def find_todo(job: Job, bindings: Bindings, *, fresh: bool) -> Todo:
    """Return what earlier starts have left to do.

    Raises:
        UserError: as `fingerprint_of` and `blocks_to_do`.
    """
    on_cpu = bindings.ranks[0].device == "cpu"
    fingerprint = fingerprint_of(
        job,
        device_kinds=bindings.device_kinds,
        # On an accelerator the number of CPU threads does not touch the result.
        threads=bindings.ranks[0].threads if on_cpu else None,
    )
    todo = blocks_to_do(job, fingerprint, fresh=fresh)
    return Todo(fingerprint=fingerprint, packed=np.packbits(todo).tobytes())


def expect(job: Job, num_blocks: int, num_ranks: int, latest: Probe | None) -> Forecast:
    """Return how long so many blocks take on so many ranks, as `latest` told if it is known."""
    premise = job.premise(num_ranks, latest=latest)
    return forecast(premise, premise.work).of_blocks(num_blocks)


def open_journal(
    job: Job,
    fingerprint: Fingerprint,
    *,
    fresh: bool = False,
    guard: Callable[[], None] = lambda: None,
) -> Journal:
    """Open or begin the journal of this run; see `Journal.open`."""
    return Journal.open(
        job.run_dir,
        num_blocks=len(job.plan),
        fingerprint=fingerprint,
        versions=library_versions(),
        fresh=fresh,
        guard=guard,
    )


def sync_first(journal: Journal) -> None:
    """Make the first lines of a start durable.

    Raises:
        JournalError: that cannot be done; nothing has been computed yet.
    """
    try:
        journal.sync()
    except OSError as error:
        raise JournalError(
            f"{journal.path}: the journal cannot be written: {error.strerror}; make room, or "
            "choose another run_dir",
            key="run_dir",
        ) from error


def library_versions() -> dict[str, str]:
    """Return the versions of what computes and stores, without importing any of it."""
    versions = {"mpichunk": __version__, "python": platform.python_version()}
    for name in RECORDED_LIBRARIES:
        # A library that a site has put there in its own way may have no metadata.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def changed_versions(header: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """Return a line for each library whose version is not that of the journal's header."""
    return [
        f"{name} {old} when the run began, now {versions[name]}"
        for name, old in header["versions"].items()
        if name in versions and versions[name] != old
    ]


def write_run_files(config: Config, job: Job, expected: Forecast | None = None) -> str:
    """Write the run directory's files, with what this start is expected to take; return the nonce.

    Raises:
        JournalError: the run directory cannot be written.
    """
    nonce = secrets.token_hex(16)
    try:
        replace_text(job.run_dir / layout.CONFIG, dump_config(config))
        found = estimate(job.premise(1 if expected is None else expected.num_ranks))
        plan = plan_json(job.plan, config, job.volume, found, expected=expected)
        replace_text(job.run_dir / layout.PLAN, json.dumps(plan, indent=2) + "\n")
        replace_text(job.run_dir / layout.NONCE, nonce)
    except OSError as error:
        raise JournalError(
            f"{error.filename}: cannot be written: {error.strerror}; choose a run_dir on a file "
            "system that this job may write to",
            key="run_dir",
        ) from error
    return nonce
