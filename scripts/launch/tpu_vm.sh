#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU VM slice, in a clone of this repository there, at this commit and with
# the versions of tpu.lock.
#   bash scripts/launch/tpu_vm.sh NAME ZONE 'python scripts/train.py --supervise --config=configs/gpt.py:size=1.5b --workdir=/mnt/shared/run'
# The hosts find each other (JAX asks the TPU's metadata); the workdir must be one that all of them see, such as a
# bucket mounted with gcsfuse. DRY_RUN=1 prints what it would run.
set -euo pipefail

if [ $# -ne 3 ]; then
    echo "error: usage: bash scripts/launch/tpu_vm.sh NAME ZONE 'COMMAND', three arguments, but $# were given" >&2
    exit 2
fi
name=$1 zone=$2 command=$3
repo=${REPO:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin)}
revision=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD)

remote="set -e
[ -d bigmodel ] || git clone --quiet '$repo' bigmodel
cd bigmodel && git fetch --quiet && git checkout --quiet $revision
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install --quiet --require-hashes --requirement scripts/launch/tpu.lock
pip install --quiet --no-deps --editable .
$command"

run=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${run[@]}"
    echo
else
    exec "${run[@]}"
fi
