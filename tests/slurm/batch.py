"""Jobs that are the scripts in slurm/ as they stand, with other values in lines to be changed."""

import time
from collections import Counter

import psutil

from mpichunk.rundir import journal
from tests.endtoend import assert_same_files, block_lines, start_lines
from tests.faults.slow import DEPTH, NUM_BLOCKS, slow_config
from tests.slurm.site import change_script, told

OPTIONS = {
    "nodes": "4",
    "ntasks-per-node": "2",
    "gpus-per-node": "2",
    "cpus-per-task": "1",
    "mem-per-cpu": None,
    "time": "10",
    "signal": "USR2@1",
}


ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


class Job:
    """A submitted job, its config and its files."""

    def __init__(
        self,
        cluster,
        site,
        folder,
        *,
        name,
        seconds=0.3,
        schedule=None,
        faults=None,
        **options,
    ):
        self.cluster, self.folder = cluster, folder
        self.config = slow_config(folder, **({"schedule": schedule} if schedule else {}))
        self.run_dir = folder / "runs/v"
        options = OPTIONS | {n.replace("_", "-"): v for n, v in options.items()}
        self.out = folder / "job.out"
        options |= {"output": str(self.out)}
        script = change_script(name, folder / name, site, options)
        env = told(folder, seconds, **(faults or {}))
        self.number = cluster.submit(script, self.config, env=env)

    def wait_for_blocks(self, num_blocks, timeout=120):
        end = time.monotonic() + timeout
        path = self.run_dir / journal.NAME
        while not path.exists() or path.read_bytes().count(b'"state":"done"') < num_blocks:
            assert time.monotonic() < end, f"{self.told}\n{self.cluster.told()}"
            assert self.state in ALIVE, self.told
            time.sleep(0.3)

    def wait(self, timeout=180):
        """Wait for the end; return state and exit code by scontrol and the completion file."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        found = self.cluster.wait_for_state(self.number, *ends, timeout=timeout)
        last = [c for c in self.cluster.completed() if c["JobId"] == str(self.number)][-1]
        assert last["JobState"] == found["JobState"]
        # That of a cancelled job is noted before its script has ended.
        assert last["ExitCode"] == found["ExitCode"] or found["JobState"] == "CANCELLED"
        return found["JobState"], found["ExitCode"]

    def wait_for_restart(self, timeout=240):
        """Wait until it has been requeued and runs again."""
        end = time.monotonic() + timeout
        while self.told.count(": start ") < 2:
            assert time.monotonic() < end, f"{self.told}\n{self.cluster.told()}"
            assert self.state in ALIVE, self.told
            time.sleep(0.3)

    def cancel(self):
        """End it, whatever it does."""
        self.cluster.run("scancel", self.number)

    def pid_of_rank(self, rank):
        """Return the process that is a rank of an mpirun, as this machine numbers it."""
        for process in psutil.process_iter():
            try:
                environ, words = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            number = environ.get("OMPI_COMM_WORLD_RANK")
            if number == str(rank) and words[-2:] == ["run", str(self.config)]:
                return process.pid
        raise AssertionError(f"no rank {rank}\n{self.told}")

    @property
    def state(self):
        return self.cluster.job(self.number)["JobState"]

    @property
    def told(self):
        return self.out.read_text() if self.out.exists() else ""

    def assert_complete(self, undisturbed, *, num_ranks=8):
        """Every block is there, and at most those in flight were done twice."""
        blocks = Counter(line["block"] for line in block_lines(self.run_dir))
        assert sorted(blocks) == list(range(NUM_BLOCKS))
        written = (self.folder / "written").read_text().split()
        num_starts = len(start_lines(self.run_dir))
        most_redone = num_ranks * DEPTH * (num_starts - 1)
        assert len(written) - NUM_BLOCKS <= most_redone
        assert_same_files(self.folder / "out/v.zarr", undisturbed)
        return len(written) - NUM_BLOCKS
