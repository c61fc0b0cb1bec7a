"""Runs scenarios: real jobs, real signals; then compares every byte with an undisturbed run.

Knows no pytest: a scenario that goes wrong raises AssertionError.
"""

import io
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml

from mpichunk import cli
from mpichunk.errors import ExitCode
from mpichunk.geometry.box import Box
from mpichunk.rundir import journal
from mpichunk.rundir.runstatus import RunStatus, read_status
from mpichunk.volume import OutputSpec, create_output, open_output
from tests.endtoend import assert_same_files, block_lines, kill_tree, most_redone
from tests.faults.program import VARIABLE
from tests.faults.scenario import MOST_RANKS, Attempt, Scenario
from tests.launch import find_mpirun, launch_environment, mpirun_options

DOMAIN = Box(start=(3, -5, 7), stop=(27, 91, 103))
BLOCK_SHAPE = (8, 16, 16)
NUM_BLOCKS = 3 * 6 * 6
SECONDS_PER_BLOCK = 0.015
SCHEDULE = {"min_lease_seconds": 2, "start_timeout_seconds": 30}
"""What a config says so that ranks that hang are found soon."""

TIMEOUT_SECONDS = 90

MOST_STARTS = 8
JOB_VARIABLE = "MPICHUNK_TEST_JOB"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a scenario ended; that the bytes are right has been checked."""

    word: str
    """`finished` at the first start, `resumed`, or `untouched` when no fault was met."""

    codes: tuple[int, ...]
    """Exit code of each start; -9 where the whole job was killed."""

    num_redone: int
    """Blocks that were written more than once."""

    seconds: float
    """What it took."""

    met: tuple[str, ...]
    """Faults that ranks met."""


class Bench:
    """A folder with an input and what an undisturbed run makes of it.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw.zarr"
        _write_input(self.raw)
        self.expected = folder / "undisturbed" / "out" / "v.zarr"
        config = self.write_config(folder / "undisturbed")
        done = subprocess.run(
            [sys.executable, "-m", "mpichunk", "run", str(config)],
            env=launch_environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def write_config(self, folder: Path, **schedule: object) -> Path:
        """Write the config of a run in this folder."""
        folder.mkdir(parents=True)
        for name in ("out", "runs"):
            (folder / name).mkdir()
        config = {
            "input": {"volume": str(self.raw)},
            "model": {"backend": "identity", "out_channels": 2},
            "patch": {"shape": [8, 16, 16], "overlap": [2, 4, 4], "batch_size": 2},
            "block": {"shape": list(BLOCK_SHAPE), "stitch": "seamless"},
            "output": {"volume": "out/v.zarr", "dtype": "uint8", "chunk_shape": [8, 16, 16]},
            "run_dir": "runs/v",
        }
        if schedule:
            config["schedule"] = dict(schedule)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path


class Run:
    """One scenario being run."""

    def __init__(self, bench: Bench, scenario: Scenario) -> None:
        self._bench = bench
        self._scenario = scenario
        self.folder = bench.folder / str(scenario)
        self.config = bench.write_config(self.folder, **SCHEDULE)
        self.run_dir = self.folder / "runs/v"
        self.output = self.folder / "out/v.zarr"

    def finish(self) -> Outcome:
        """Start the job as the scenario says, then until it is complete; check what came of it."""
        started = time.monotonic()
        codes: list[int] = []
        last = Attempt(num_ranks=2, mode="dynamic")
        planned = [*self._scenario.attempts, *[last] * MOST_STARTS]
        most = 0
        while (found := self._status()) is None or found.exit_code != ExitCode.ALL_DONE:
            assert len(codes) < MOST_STARTS, f"not complete after {codes}"
            attempt = planned[len(codes)]
            codes.append(self._start(attempt, len(codes)))
            self._check_truth(codes[-1], attempt)
            most += most_redone(SECONDS_PER_BLOCK) * attempt.num_ranks
        num_redone = self._check_result()
        assert num_redone <= most, f"{num_redone} blocks redone"
        met = tuple(self._lines("met"))
        disturbed = met or any(not a.is_undisturbed and not a.faults for a in planned[: len(codes)])
        word = "finished" if len(codes) == 1 else "resumed"
        return Outcome(
            word=word if disturbed else "untouched",
            codes=tuple(codes),
            num_redone=num_redone,
            seconds=time.monotonic() - started,
            met=met,
        )

    def _start(self, attempt: Attempt, number: int) -> int:
        """Start the job once; return its exit code."""
        told = {
            **attempt.told(),
            "folder": str(self.folder),
            "seconds_per_block": SECONDS_PER_BLOCK,
        }
        mark = secrets.token_hex(8)
        log = self.folder / f"start-{number}.log"
        with HURDLES[attempt.hurdle](self), log.open("wb") as out:
            process = subprocess.Popen(
                _mpirun_command(attempt.num_ranks, self._config_for(attempt)),
                env=launch_environment(self.folder)
                | {VARIABLE: json.dumps(told), JOB_VARIABLE: mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            try:
                self._watch(process, attempt)
            finally:
                kill_tree(process)
                left = _end_leftovers(mark)
        assert process.returncode == -9 or not left, f"left behind: {left}"
        return process.returncode

    def _config_for(self, attempt: Attempt) -> Path:
        """Return a config that says the attempt's mode; the run is the same."""
        config = yaml.safe_load(self.config.read_text())
        config.setdefault("schedule", {})["mode"] = attempt.mode
        path = self.folder / f"{attempt.mode}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def _watch(self, process: subprocess.Popen[bytes], attempt: Attempt) -> None:
        """Wait for the job to end, or for the moment to kill it."""
        started = time.monotonic()
        path = self.run_dir / journal.NAME
        while process.poll() is None:
            seconds = time.monotonic() - started
            assert seconds < TIMEOUT_SECONDS, f"hangs: still running after {TIMEOUT_SECONDS} s"
            if attempt.kill_seconds is not None and seconds > attempt.kill_seconds:
                return kill_tree(process)
            if attempt.kill_blocks is not None and _num_done(path) >= attempt.kill_blocks:
                return kill_tree(process)
            time.sleep(0.01)

    def _status(self) -> RunStatus | None:
        """Return what the journal proves, None if there is none yet."""
        header = journal.read_header(self.run_dir / journal.NAME)
        return None if header is None else read_status(self.run_dir)

    def _check_truth(self, code: int, attempt: Attempt) -> None:
        """Compare an exit code with what the journal proves."""
        found = self._status()
        truth = None if found is None else found.exit_code
        # mpirun itself says 0 when no rank is left to say otherwise: hence `status --check`.
        if code == ExitCode.ALL_DONE and not self._have_all_died(attempt):
            assert truth == ExitCode.ALL_DONE, f"exit code 0, but {found}"
        # mpirun passes on what a rank says that ends by itself.
        if code == ExitCode.DRAINED and code not in {
            f.code for f in attempt.faults if f.kind == "exit"
        }:
            assert truth == ExitCode.DRAINED, f"exit code 75, but {found}"
        if attempt.is_undisturbed:
            assert code == ExitCode.ALL_DONE, f"exit code {code}, though nothing went wrong"
        if attempt.nan_blocks and not attempt.faults:
            assert code == ExitCode.BLOCKS_FAILED
            assert found is not None
            assert tuple(f.block for f in found.failures) == attempt.nan_blocks
        if attempt.bad_ranks:
            assert code == ExitCode.ALL_DONE
            ranks = {line["rank"] for line in block_lines(self.run_dir)}
            assert not ranks.intersection(attempt.bad_ranks), f"blocks done by {ranks}"
        if attempt.hurdle in ("wall", "corrupt", "disk-full"):
            assert code == ExitCode.BLOCKS_FAILED, f"exit code {code}, {found}"

    def _have_all_died(self, attempt: Attempt) -> bool:
        """Return whether every rank of the latest start met a deadly fault."""
        deadly = ("kill", "segfault", "exit")
        met = {line.split()[2] for line in self._lines("met") if line.split()[0] in deadly}
        return len(met) >= attempt.num_ranks

    def _check_result(self) -> int:
        """Compare the output with that of the undisturbed run; return the blocks redone."""
        # What a killed process was writing; no reader takes it for a chunk.
        for leftover in self.output.rglob("*.__lock"):
            leftover.unlink()
        with redirect_stdout(io.StringIO()) as told:
            assert cli.main(["verify", str(self.config)]) == 0, told.getvalue()
        assert_same_files(self.output, self._bench.expected)
        blocks = Counter(line["block"] for line in block_lines(self.run_dir))
        assert len(blocks) == NUM_BLOCKS
        assert max(blocks.values()) == 1, "a block is done twice in the journal"
        written = Counter(int(line) for line in self._lines("written"))
        return sum(written.values()) - len(written)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


# ---- Hurdles ------------------------------------------------------------------------------------


@contextmanager
def _none(run: Run) -> Iterator[None]:
    yield


@contextmanager
def _wall(run: Run) -> Iterator[None]:
    """Put a folder where the output's files belong."""
    walls = [run.output / "c/0/1/2" / name for name in ("3", "4")]
    for wall in walls:
        wall.mkdir(parents=True)
    # A folder of other files would be refused, so the volume must be there first.
    _create(run)
    yield
    for wall in walls:
        wall.rmdir()


def _create(run: Run) -> None:
    """Create the output as the run would."""
    source = run._bench.expected / "zarr.json"
    (run.output / "zarr.json").write_bytes(source.read_bytes())


@contextmanager
def _corrupt(run: Run) -> Iterator[None]:
    """Damage one chunk of the input, and truncate another."""
    files = sorted(p for p in run._bench.raw.rglob("*") if p.is_file() and p.name != "zarr.json")
    sound = {path: path.read_bytes() for path in (files[5], files[11])}
    files[5].write_bytes(b"garbage")
    files[11].write_bytes(sound[files[11]][:-9])
    yield
    for path, data in sound.items():
        path.write_bytes(data)


@contextmanager
def _small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Put a folder on a small disk; afterwards what is on it lies on the large one."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], check=True)
    aside = folder.with_name(folder.name + "-aside")
    try:
        yield
    finally:
        subprocess.run(["cp", "-a", folder, aside], check=True)
        subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()
    aside.rename(folder)


HURDLES = {
    None: _none,
    "wall": _wall,
    "corrupt": _corrupt,
    "disk-full": lambda run: _small_disk(run.folder / "out", 200 << 10),
    "journal-full": lambda run: _small_disk(run.folder / "runs", 32 << 10),
}


def can_mount() -> bool:
    """Return whether this machine lets us have a small disk."""
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return os.geteuid() == 0 and probe.returncode == 0


# ---- Parts --------------------------------------------------------------------------------------


def _num_done(path: Path) -> int:
    """Return the blocks that a journal calls done, -1 without a journal."""
    return path.read_bytes().count(b'"state":"done"') if path.exists() else -1


def _mpirun_command(num_ranks: int, config: Path) -> list[str]:
    program = find_mpirun()
    assert program is not None, "no mpirun here"
    python = [sys.executable, "-m", "tests.faults.program", str(config)]
    return [program, *mpirun_options(program), "--with-ft", "ulfm", "-n", str(num_ranks), *python]


def _end_leftovers(mark: str) -> list[str]:
    """Kill what a job has left behind; return what it was."""
    left = []
    end = time.monotonic() + 3
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB_VARIABLE) != mark:
                continue
            process.wait(timeout=max(0, end - time.monotonic()))
        except psutil.TimeoutExpired:
            left.append(f"{process.pid} {process.status()} {' '.join(process.cmdline()[:4])}")
            process.kill()
        except psutil.Error:
            continue
    return left


def _write_input(path: Path) -> None:
    spec = OutputSpec(
        volume=f"{path}|zarr3:",
        domain=DOMAIN,
        num_channels=1,
        dtype=np.dtype(np.uint8),
        chunk_shape=(8, 32, 32),
        shard_shape=None,
        voxel_size=(40.0, 4.0, 4.0),
    )
    create_output(spec)
    random = np.random.default_rng(3)
    voxels = random.integers(1, 256, (1, *DOMAIN.shape), dtype=np.uint8)
    open_output(spec).write(DOMAIN, voxels).result()


assert MOST_RANKS * most_redone(SECONDS_PER_BLOCK) < NUM_BLOCKS
