# shellcheck shell=bash
# What job.sh and job-ulfm.sh share: what a start has done, and whether another one is of use. They read
# this file (`.`); it is not to be submitted.

# Blocks that the journal has, 0 before the first start; "unknown" if it cannot be read.
num_done() {
    local config=$1
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

# Requeue the job, or say why not; either way the script ends here, with blocks left to do.
requeue_or_say_why_not() {
    local script=$1   # its name
    local what=$2     # start or job: what has done
    local gained=$3   # so many blocks
    local is_ended=$4 # yes if Slurm has sent SIGTERM

    if [ "$is_ended" = yes ] && ! is_preempted && ! is_out_of_time; then
        echo "$script: NOT requeued: somebody has ended this job (scancel), or Slurm, which" \
            "then starts it again"
        exit 75
    elif is_preempted; then
        echo "$script: requeued: the job was preempted"
    elif [ "$gained" = unknown ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
        echo "$script: requeued: the journal could not be read, so nobody knows what this $what has done"
    elif [ "$gained" = unknown ]; then
        echo "$script: NOT requeued: the journal could not be read, and the job has started" \
            "$((SLURM_RESTART_COUNT + 1)) times; submit it again when that is mended"
        exit 75
    elif [ "$gained" -le 0 ]; then
        echo "$script: NOT requeued: this $what has done no block, and the next would not either. What is" \
            "wrong stands above; submit the job again when that is mended"
        exit 75
    else
        echo "$script: requeued: this $what has done $gained blocks"
    fi

    # Slurm ends this script.
    trap - TERM
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "$script: NOT requeued: scontrol refuses; submit the job again to go on"
        exit 75
    fi
    sleep 60
    exit 75
}
