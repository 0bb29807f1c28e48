#!/usr/bin/env bash
# One process a node; JAX reads the SLURM variables and joins the nodes.
#   sbatch --nodes=4 --gpus-per-node=8 scripts/launch/slurm.sh --config=configs/gpt.py:size=1.5b --workdir=/shared/run
# On SIGTERM (here: 2 minutes before the time limit) the step is finished and saved, training exits with 75, and the
# job asks to be queued again; the same command resumes. DRY_RUN=1 prints what it would run.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "error: usage: sbatch --nodes=N scripts/launch/slurm.sh --config=FILE --workdir=DIR [more flags for scripts/train.py]" >&2
    exit 2
fi
run=(srun --kill-on-bad-exit=0 .venv/bin/python scripts/train.py --supervise "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${run[@]}"
    echo
    exit
fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}" || exit
"${run[@]}"
code=$?
if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
