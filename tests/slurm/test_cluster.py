"""The Slurm of these tests leaves nothing behind, also when its starter is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil

from tests.launch import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import NUM_NODES

SCRIPT = """\
import time
from tests.slurm.cluster import Cluster
with Cluster(1) as found:
    found.submit("--wrap=sleep 1000")
    print(found.folder, flush=True)
    time.sleep(1000)
"""


def processes_of(folder):
    """Return the processes that have to do with a cluster: daemons, and what jobs have started."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if any(str(folder) in word for word in told):
            found.append(process)
    return found


def wait_until_gone(folder):
    end = time.monotonic() + 30
    while found := processes_of(folder):
        assert time.monotonic() < end, f"left behind: {found}"
        time.sleep(0.1)


def test_nothing_is_left_behind():
    with Cluster(1) as own:
        job = own.submit("--wrap=sleep 1000")
        own.wait_for_state(job, "RUNNING")
        # munge, slurmctld, unshare, its shell, slurmd, and something of the job.
        end = time.monotonic() + 30
        while len(processes_of(own.folder)) < 6:
            assert time.monotonic() < end, processes_of(own.folder)
            time.sleep(0.1)
    wait_until_gone(own.folder)
    assert not own.folder.exists()


def test_nothing_runs_on_when_the_starter_is_killed(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        folder = starter.stdout.readline().strip()
        os.kill(starter.pid, signal.SIGKILL)
    assert folder
    wait_until_gone(folder)
    subprocess.run(["rm", "-rf", folder], check=True)


def test_nodes_are_hosts_of_their_own(cluster):
    words = "hostname; readlink /proc/self/ns/pid"
    told = cluster.ask("srun", f"--nodes={NUM_NODES}", "sh", "-c", words).split()
    assert {word for word in told if word.startswith("node")} == set(cluster.nodes)
    assert len({word for word in told if word.startswith("pid:")}) == NUM_NODES
