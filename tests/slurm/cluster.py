"""A real Slurm of several nodes on this machine: munge, slurmctld, and a slurmd for each node.

Private to who starts it: own key, sockets, ports and files. Each node is a set of namespaces: its
own host name, process ids, /tmp and /dev/shm, as PMIx and MPI expect of different hosts. So a node
goes down as a real one does, everything on it at the same moment, and nothing is left behind.
Knows no module of the package and no pytest.

             munged   slurmctld            processes of this machine
    node1 [ slurmd  slurmstepd  ranks ]    ends with its `unshare`, which ends with this process
    node2 [ slurmd  slurmstepd  ranks ]
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from tests.launch import REPOSITORY, Completed, finish, launch_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare", "setpriv")
NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CPUS_PER_NODE = 2
GPUS_PER_NODE = 2
UP = {"idle", "allocated", "mixed", "completing"}
"""States of a node that answers; others have a `*`, or are down."""

START_SECONDS = 60
"""For the daemons of an overloaded machine."""

SLURM_CONF = """\
ClusterName=mpichunk
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=3600
InactiveLimit=0
MailProg=/bin/true
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""

NODE_SCRIPT = """\
set -e
name=$1 folder=$2 daemon=$3
shift 3
hostname "$name"
# What must be seen of the real /tmp, before it is hidden.
for path in "$@"; do
    mkdir -p "$folder/tmp-$name/${path#/tmp/}"
    mount --rbind "$path" "$folder/tmp-$name/${path#/tmp/}"
done
mount --rbind "$folder/tmp-$name" /tmp
mount -t tmpfs tmpfs /dev/shm
mount --bind "$folder/hosts" /etc/hosts
# The first process of a pid namespace must bury the others: a shell that waits does.
"$daemon" -D -N "$name" -f "$folder/slurm.conf" &
wait
"""


def why_not() -> str | None:
    """Return why no Slurm can be started on this machine, None if it can."""
    if os.geteuid() != 0:
        return "no Slurm here: only root can start one"
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        return (
            f"no Slurm here: {', '.join(missing)} not found "
            "(Debian, Ubuntu: apt-get install slurm-wlm munge libpmix-dev)"
        )
    plugins = list(Path("/usr/lib").glob("*/slurm-wlm/mpi_pmix*.so"))
    if plugins and not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")):
        return "no Slurm here: its plug-in finds no libpmix.so (apt-get install libpmix-dev)"
    command = ["unshare", *NAMESPACES, "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "no Slurm here: namespaces cannot be made (a container without privileges?)"
    return None


def find_program(name: str) -> str | None:
    """Return where a program is; those of daemons are not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


class Cluster:
    """Daemons that run from entering to leaving a `with`.

    Args:
        num_nodes: They are called node1, node2, ...
    """

    def __init__(self, num_nodes: int) -> None:
        self.nodes = tuple(f"node{k + 1}" for k in range(num_nodes))
        """Names of the nodes."""

        # Not below /tmp, of which each node has its own.
        self.folder = Path(tempfile.mkdtemp(prefix="mpichunk-slurm-", dir="/var/tmp"))
        """Files of the daemons, and of the jobs."""

        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            stack.push(self.__exit__)
            self._configure()
            self._start_munge()
            self._start("slurmctld", [find_program("slurmctld"), "-D", "-i", "-f", self.conf])
            for node in self.nodes:
                self.start_node(node)
            self._wait(self._is_up, "the nodes to come up")
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        for mounted in self.folder.glob("tmp-*"):
            # Namespaces are gone, and their mounts with them: nothing real can be reached here.
            assert not any(os.path.ismount(path) for path in mounted.rglob("*"))
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def conf(self) -> Path:
        """The configuration."""
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """Return an environment for commands that talk to this cluster."""
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        found = launch_environment(scratch)
        # Of the nodes' own /tmp, not of this machine's.
        found.pop("TMPDIR")
        found["PATH"] = f"{Path(sys.executable).parent}:{found['PATH']}:{SYSTEM_PATH}"
        return found | {"SLURM_CONF": str(self.conf)}

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        (self.folder / f"tmp-{node}").mkdir(exist_ok=True)
        (self.folder / f"tmp-{node}").chmod(0o1777)
        script = ["sh", "-c", NODE_SCRIPT, "node", node, self.folder, find_program("slurmd")]
        self._start(node, ["unshare", *NAMESPACES, "--kill-child", *script, *_needed_of_tmp()])

    def kill_node(self, node: str) -> None:
        """Take a node down: its slurmd and all its tasks die at the same moment."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def _configure(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        port, *ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeAddr=127.0.0.1 Port={p} CPUs={CPUS_PER_NODE} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1 RealMemory=4096 "
            f"Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, p in zip(self.nodes, ports, strict=True)
        ]
        text = SLURM_CONF.format(
            host=socket.gethostname(), port=port, folder=self.folder, nodes="\n".join(nodes)
        )
        self.conf.write_text(text)
        # Any device files do: who asks for GPU k is told its number, nobody opens it.
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File=/dev/tty[0-{GPUS_PER_NODE - 1}] Flags=nvidia_gpu_env,amd_gpu_env\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + names)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key": "munge.key", "socket": "munge.socket", "pid": "munge.pid"}
        files |= {"log": "munge.log", "seed": "munge.seed"}
        options = [
            f"--{word}{'' if word == 'socket' else '-file'}={self.folder / name}"
            for word, name in files.items()
        ]
        self._start("munged", [find_program("munged"), "--foreground", "--force", *options])
        self._wait((self.folder / "munge.socket").exists, "munged")

    def _start(self, name: str, command: list[object]) -> None:
        """Start a daemon that ends with this process."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    # ---- Commands and jobs -----------------------------------------------------------------------

    def run(self, *words: object, timeout: float = 120, **how: object) -> Completed:
        """Run srun, sbatch, scontrol, ... to their end; see `finish`."""
        env = self.environment() | {"TMPDIR": "/tmp"} | dict(how.pop("env", None) or {})
        return finish(list(words), timeout=timeout, env=env, **how)

    def ask(self, *words: object) -> str:
        """Return what a command prints, which must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, **how: object) -> int:
        """Submit a batch job; return its number."""
        done = self.run("sbatch", "--parsable", *words, **how)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` tells."""
        text = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, number: int, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job is in one of these states; return what is then known of it."""

        def is_there() -> bool:
            return self.job(number)["JobState"] in states

        try:
            self._wait(is_there, f"job {number} to be {' or '.join(states)}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.job(number)}\n{self.told()}") from None
        return self.job(number)

    def completed(self) -> list[dict[str, str]]:
        """Return the lines of the job-completion file."""
        path = self.folder / "completed.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [dict(w.split("=", 1) for w in line.split() if "=" in w) for line in lines]

    def switch_on(self) -> None:
        """Switch on the nodes that were taken down."""
        for node in self.nodes:
            if node not in self._daemons:
                self.start_node(node)
        self._wait(self._is_up, "the nodes to come up")

    def told(self) -> str:
        """Return the ends of all logs."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        tails = [(path, path.read_text(errors="replace")[-2000:]) for path in sorted(paths)]
        return "\n".join(f"---- {path.name}\n{tail}" for path, tail in tails if tail)

    def _is_up(self) -> bool:
        done = self.run("sinfo", "--noheader", "--partition=all", "--Node", "--format=%T")
        states = done.stdout.split()
        return len(states) == len(self.nodes) and set(states) <= UP

    def _wait(self, is_so: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"waited {seconds} s for {what}\n{self.told()}"
            time.sleep(0.3)


def _needed_of_tmp() -> list[Path]:
    """Return what of this machine's /tmp jobs need."""
    needed = {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)}
    return sorted(path for path in needed if path.is_relative_to("/tmp"))


def _free_ports(num_ports: int) -> list[int]:
    """Return TCP ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
