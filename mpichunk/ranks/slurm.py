"""What Slurm tells of the job that this process is part of: its number, its restarts, its end.

Reads the environment, and asks `scontrol` once for what older versions do not put there. Knows no
MPI and no run directory; without Slurm it knows nothing, and says so.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

VARIABLES: Mapping[str, str] = {
    "SLURM_JOB_ID": "number of the job; unset: no Slurm",
    "SLURM_STEP_ID": "number of the step within the job: one for each srun",
    "SLURM_PROCID": "number of this task, before MPI says which rank it is",
    "SLURM_RESTART_COUNT": "how often the job was requeued; unset: never",
    "SLURM_JOB_PARTITION": "partition that the job runs in",
    "SLURM_CLUSTER_NAME": "cluster that the job runs on",
    "SLURM_JOB_END_TIME": "end of the allocation, seconds since the epoch; not in Slurm 22.05",
    "SLURM_STEP_NUM_TASKS": "how many tasks srun has started, against the ranks that MPI sees",
    "SLURM_MEM_PER_NODE": "memory that the job may take on a node, MiB; 0: all of it",
    "SLURM_MEM_PER_CPU": "memory per core instead, MiB",
    "SLURM_CPUS_ON_NODE": "cores of the job on this node, to multiply that by",
    "SLURM_JOB_GPUS": "GPUs of the job on this node, a list",
    "SLURM_STEP_GPUS": "GPUs of the step on this node, a list",
    "SLURM_GPUS": "what was asked for by --gpus",
    "SLURM_GPUS_ON_NODE": "GPUs of the step on this node, a number",
    "SLURM_GPUS_PER_NODE": "what was asked for by --gpus-per-node",
    "SLURM_GPUS_PER_SOCKET": "what was asked for by --gpus-per-socket",
    "SLURM_GPUS_PER_TASK": "what was asked for by --gpus-per-task",
}
"""Every variable of Slurm that the package reads, here and in other modules, and what it says."""

ASK_SECONDS = 10.0
"""How long Slurm's controller may take to answer."""

AGAIN_SECONDS = 300.0
"""When a controller that did not answer is asked again."""

Ask = Callable[[str], str]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """The job, as the journal notes it."""

    job: str
    """Its number."""

    step: str | None
    """Number of the step within it, None outside of any."""

    num_restarts: int
    """How often it was requeued before."""

    partition: str | None
    """Where it runs."""

    cluster: str | None
    """On which cluster."""


def find_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """Return the job that this process is part of, None outside of Slurm."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    return SlurmJob(
        job=job,
        step=environ.get("SLURM_STEP_ID"),
        num_restarts=int(restarts) if restarts.isdigit() else 0,
        partition=environ.get("SLURM_JOB_PARTITION"),
        cluster=environ.get("SLURM_CLUSTER_NAME"),
    )


class Allocation:
    """The job and its end, which is looked up when it is first asked for, and remembered.

    Only a rank that needs the end should ask: a thousand ranks would trouble Slurm's controller.

    Args:
        environ: The environment.
        ask: Returns what `scontrol show job` prints about a job; OSError or SubprocessError if it
            cannot.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = find_job(environ)
        """The job, None outside of Slurm."""

        self._told = environ.get("SLURM_JOB_END_TIME", "")
        self._ask = ask or _scontrol
        self._clock = clock
        self._end_time: float | None = None
        self._ask_next = float("-inf") if self.job else float("inf")

    def end_time(self) -> float | None:
        """Return when the allocation ends, seconds since the epoch; None if nobody says."""
        if self._told.isdigit():
            return float(self._told)
        if self._end_time is None and self._clock() >= self._ask_next:
            self._end_time = self._look_up()
        return self._end_time

    def facts(self) -> dict[str, Any]:
        """Return what the journal notes, {} outside of Slurm."""
        return {} if self.job is None else asdict(self.job) | {"end_time": self.end_time()}

    def _look_up(self) -> float | None:
        assert self.job is not None
        try:
            answer = self._ask(self.job.job)
        except FileNotFoundError:
            # As in a container that does not hold Slurm.
            self._ask_next = float("inf")
            return None
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("scontrol does not say when job %s ends: %s", self.job.job, error)
            self._ask_next = self._clock() + AGAIN_SECONDS
            return None
        # An answer holds, also that there is no end.
        self._ask_next = float("inf")
        return parse_end_time(answer)


def parse_end_time(answer: str) -> float | None:
    """Return the end of a job from what `scontrol show job` prints, None if there is none.

    The end is a number of seconds since the epoch, as it is asked for, or local time.
    """
    found = [word.removeprefix("EndTime=") for word in answer.split() if "EndTime=" in word]
    if not found:
        return None
    if found[0].isdigit():
        # A job without limit ends at 0, or in the year 2106.
        seconds = float(found[0])
        return seconds if 0 < seconds < 2**32 - 3 else None
    try:
        return datetime.strptime(found[0], "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:
        return None


def describe(facts: Mapping[str, Any]) -> str:
    """Return what a journal notes of a job, in words."""
    step = facts.get("step")
    words = [f"Slurm job {facts.get('job')}" + (f".{step}" if step else "")]
    if facts.get("num_restarts"):
        words.append(f"restart {facts['num_restarts']}")
    if facts.get("partition"):
        words.append(f"partition {facts['partition']}")
    if facts.get("cluster"):
        words.append(f"cluster {facts['cluster']}")
    if facts.get("end_time"):
        words.append(f"ends {datetime.fromtimestamp(facts['end_time']):%Y-%m-%d %H:%M:%S}")
    return ", ".join(words)


def _scontrol(job: str) -> str:
    """Ask Slurm's controller about a job."""
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job],
        # Times that mean the same in every time zone.
        env=dict(os.environ, SLURM_TIME_FORMAT="%s"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ASK_SECONDS,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout
