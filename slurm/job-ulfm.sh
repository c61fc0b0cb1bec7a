#!/bin/bash
# Run mpichunk under Slurm with a fault-tolerant MPI (Open MPI 5 and its ULFM): a rank that dies is left
# behind, the others compute its blocks, and a node that is lost costs a new start on the nodes that are
# left, in the same allocation:
#
#     sbatch slurm/job-ulfm.sh my.yaml
#     salloc --no-kill --nodes=4 --ntasks-per-node=4 ... slurm/job-ulfm.sh my.yaml
#
# srun cannot do that: Slurm ends a step when one of its ranks dies. Where time or nodes run out the job
# is requeued and goes on where it stopped. Lines marked CHANGE are yours to change; see slurm/README.md.

#SBATCH --job-name=mpichunk
#SBATCH --nodes=2                   # CHANGE
#SBATCH --ntasks-per-node=4         # CHANGE: GPUs per node; without GPUs, some 4 to 8 tasks per node
#SBATCH --gpus-per-node=4           # CHANGE: the same number; remove the line to run on CPUs
#SBATCH --cpus-per-task=8           # CHANGE: cores per node / tasks per node
#SBATCH --mem-per-cpu=4G            # CHANGE: `python -m mpichunk plan my.yaml` says what a rank needs
#SBATCH --time=24:00:00             # CHANGE: short jobs start sooner, and this one comes back
#SBATCH --output=mpichunk-%j.out    # CHANGE if you like: a file that all starts of the job append to
#SBATCH --open-mode=append
# Keep the allocation when a node is lost; start again when it is the first one, where this script runs.
#SBATCH --no-kill
#SBATCH --requeue
# Tell this script (B:) so many seconds before the time limit; it passes that on to mpirun and its ranks.
# They finish the blocks that they hold: give them longer than the slowest block takes.
#SBATCH --signal=B:USR2@300         # CHANGE

config=${1:?usage: sbatch slurm/job-ulfm.sh CONFIG}

# CHANGE: the environment that mpichunk was installed into, on a file system that all nodes see, and
# before it the site's Open MPI 5 module if there is one.
# shellcheck disable=SC1091
. .venv/bin/activate || exit 2
# Not before: activation scripts and modules may use variables that are not set.
set -u

# CHANGE if you submit from elsewhere than the folder that holds slurm/: what job.sh needs as well. Slurm
# runs a copy of this script, so the path starts where you submit, as that of the environment does.
# shellcheck disable=SC1091
. slurm/requeue.sh || { echo "job-ulfm.sh: no slurm/requeue.sh here: change its line" >&2; exit 2; }

per_node=${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# What of an mpirun remains on a lost node would keep the next one waiting until Slurm knows of the loss.
export SLURM_OVERLAP=1

# How the latest start has ended: drained, failures, finished; None if it was lost.
end_reason() {
    python -m mpichunk status "$config" --json --check |
        python -c 'import json, sys; print(json.load(sys.stdin)["end_reason"])'
}

# The nodes that still start a task. Slurm itself may take minutes to notice that one is gone.
find_nodes() {
    local node
    for node in "${nodes[@]}"; do
        timeout --kill-after=5 60 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" \
            true >/dev/null 2>&1 && echo "$node" &
    done | sort -V
    wait
}

# End what is left of the ranks of an mpirun that gave up.
end_steps() {
    squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i |
        grep -E '^[0-9]+\.[0-9]+$' | xargs --no-run-if-empty scancel --signal=KILL 2>/dev/null
}

# Slurm sends SIGTERM to this shell when it ends the job: also then ranks finish what they hold.
is_ended=no
mpirun_pid=
trap '[ -z "$mpirun_pid" ] || kill -USR2 "$mpirun_pid"' USR2
trap 'is_ended=yes; [ -z "$mpirun_pid" ] || kill -USR2 "$mpirun_pid"' TERM

done_at_first=$(num_done "$config")
before=$done_at_first
while :; do
    echo "job-ulfm.sh: start on ${nodes[*]}, $before blocks are done"

    hosts=$(printf ",%s:$per_node" "${nodes[@]}")
    # The whole path of python: mpirun puts its own folder first on the PATH of other nodes.
    mpirun --with-ft ulfm --host "${hosts:1}" --map-by "ppr:$per_node:node" --bind-to none \
        "$(command -v python)" -m mpichunk run "$config" &
    mpirun_pid=$!
    # A signal ends `wait` before mpirun has ended.
    while kill -0 "$mpirun_pid" 2>/dev/null; do wait "$mpirun_pid"; done
    mpirun_pid=

    # What the journal proves decides, not what mpirun returns, which is 0 also when it has lost a node: 0
    # every block is done, 2 a mistake that is yours to mend, 3 blocks failed (listed), 75 blocks are left.
    python -m mpichunk status "$config" --check
    code=$?
    [ "$code" -eq 75 ] || exit "$code"

    now=$(num_done "$config")
    gained=$(gain "$before" "$now")
    before=$now
    if [ "$is_ended" = yes ] || [ "$(end_reason)" = drained ]; then break; fi

    num_before=${#nodes[@]}
    end_steps
    mapfile -t nodes < <(find_nodes)
    echo "job-ulfm.sh: ${#nodes[@]} of $num_before nodes are left: ${nodes[*]}"
    if [ "${#nodes[@]}" -eq 0 ] || [ "$is_ended" = yes ]; then break; fi
    if [ "${#nodes[@]}" -lt "$num_before" ]; then continue; fi
    if [ "$gained" = unknown ] || [ "$gained" -le 0 ]; then break; fi
done

# What counts here is all that the job has done since it was started or requeued, not the latest mpirun.
gained=$(gain "$done_at_first" "$before")
requeue_or_say_why_not job-ulfm.sh job "$gained" "$is_ended"
