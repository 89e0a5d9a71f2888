#!/usr/bin/env bash
# Lets training end in order before a pod does. Kubernetes runs this as the pod's preStop hook when
# a spot node is about to be lost, when a node is drained, and when the pod is deleted.
#
#   pre_stop.sh workers   asks the training workers of this pod for a checkpoint, by SIGTERM, and
#                         waits until they have ended
#   pre_stop.sh drivers   waits until the jobs of this pod (the head) have ended, without a signal:
#                         whoever stops a job sends it SIGTERM, and a second one ends it at once
#
# It waits for at most STGT_PRE_STOP_WAIT_S seconds (105 by default). The pod's
# terminationGracePeriodSeconds must be longer, since it includes this time.
set -euo pipefail

wait_s=${STGT_PRE_STOP_WAIT_S:-105}

case "${1:-}" in
    # Ray gives its workers this title. Other processes of Ray, and other users', are left alone.
    workers) pattern='^ray::RayTrainWorker' signal=TERM ;;
    drivers) pattern='^[^ ]*python[0-9.]* -m jobs\.' signal='' ;;
    *)
        echo "pre_stop.sh: give workers or drivers as the only argument" >&2
        exit 2
        ;;
esac

# pgrep exits with 1 if it finds no process, and with more if it fails.
processes() {
    pgrep --euid "$(id -u)" --full -- "$pattern" || [ $? -eq 1 ]
}

mapfile -t found < <(processes)
[ "${#found[@]}" -gt 0 ] || exit 0
echo "pre_stop.sh: waiting for ${#found[@]} $1: ${found[*]}" >&2
if [ -n "$signal" ]; then
    # One of them may have ended since.
    kill -"$signal" "${found[@]}" 2> /dev/null || true
fi

# Only those that were there at first: a worker group that restarts has new ones.
deadline=$((SECONDS + wait_s))
while [ "$SECONDS" -lt "$deadline" ]; do
    left=()
    for process in "${found[@]}"; do
        kill -0 "$process" 2> /dev/null && left+=("$process")
    done
    [ "${#left[@]}" -gt 0 ] || exit 0
    sleep 0.5
done
echo "pre_stop.sh: ${#left[@]} $1 still run after $wait_s s: ${left[*]}" >&2
