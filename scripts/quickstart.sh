#!/usr/bin/env bash
# From a clone to a trained language model: makes .venv, installs, plans, trains a small GPT on the source of
# Python's standard library, evaluates it on held-out files and prints a sample. Run again, it resumes or is done.
#   bash scripts/quickstart.sh [WORKDIR] [more flags for scripts/train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

workdir=${1:-runs/quickstart}
setup_venv
.venv/bin/python scripts/train.py --config=configs/gpt.py:size=toy,seq_len=128 --workdir="$workdir" "${@:2}"
echo
echo "a sample (scripts/generate.py --workdir=$workdir):"
.venv/bin/python scripts/generate.py --workdir="$workdir" --prompt="def " --length=300
echo
echo "loss curve: $workdir/loss.png    TensorBoard: $workdir/tb    metrics: $workdir/metrics.jsonl"
