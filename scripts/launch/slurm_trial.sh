#!/usr/bin/env bash
# One task of a study's job array: runs the command that scripts/sweep.py --on=slurm gives it.
# On SIGTERM (2 minutes before the time limit) the trial saves and exits with 75; the task then asks to be queued
# again, and goes on with the trial.
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "error: this is for scripts/sweep.py --on=slurm, which submits it" >&2
    exit 2
fi
"$@" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the wait was cut short by the signal
    wait "$child"
    code=$?
done
if [ "$code" -eq 75 ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
