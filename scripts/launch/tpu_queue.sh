#!/usr/bin/env bash
# Asks for a Cloud TPU VM slice as a queued resource, waits for it, and runs one command on all its hosts; where the
# slice is taken away (spot) it is asked for again, and the same command resumes.
#   SPOT=1 bash scripts/launch/tpu_queue.sh NAME ZONE v5litepod-256 v2-alpha-tpuv5-lite 'python scripts/train.py ...'
# Ends with the command's exit code once that is 0 (done), 2 (bad input), 3 (diverged) or 4 (wrong program), or after
# TRIES (default 50) slices, and then deletes the slice (KEEP=1 keeps it). DRY_RUN=1 prints what it would run.
set -euo pipefail

if [ $# -ne 5 ]; then
    echo "error: usage: bash scripts/launch/tpu_queue.sh NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION 'COMMAND', but $# arguments were given" >&2
    exit 2
fi
name=$1 zone=$2 type=$3 version=$4 command=$5
here=$(dirname "${BASH_SOURCE[0]}")
queue=(gcloud compute tpus queued-resources)
create=("${queue[@]}" create "$name" --zone="$zone" --node-id="$name" --accelerator-type="$type" --runtime-version="$version")
[ -z "${SPOT:-}" ] || create+=(--spot)
describe=("${queue[@]}" describe "$name" --zone="$zone" '--format=value(state.state)')
delete=("${queue[@]}" delete "$name" --zone="$zone" --force --quiet)

if [ -n "${DRY_RUN:-}" ]; then
    for each in create describe; do
        declare -n words=$each
        printf '%q ' "${words[@]}"
        echo
    done
    bash "$here/tpu_vm.sh" "$name" "$zone" "$command"
    printf '%q ' "${delete[@]}"
    echo
    exit
fi

for ((try = 1; try <= ${TRIES:-50}; try++)); do
    state=$("${describe[@]}" 2>/dev/null || true)
    if [ -z "$state" ]; then
        "${create[@]}"
        echo "queued: $name, slice $try"
    fi
    while state=$("${describe[@]}") && [ "$state" != ACTIVE ]; do
        case "$state" in
        FAILED | SUSPENDING | SUSPENDED | DELETING) break ;;
        esac
        sleep "${POLL_S:-30}"
    done
    code=1
    if [ "$state" = ACTIVE ]; then
        bash "$here/tpu_vm.sh" "$name" "$zone" "$command" && code=0 || code=$?
    fi
    case "$code" in
    0 | 2 | 3 | 4)
        [ -n "${KEEP:-}" ] || "${delete[@]}"
        exit "$code"
        ;;
    esac
    state=$("${describe[@]}" 2>/dev/null || true)
    echo "exit code $code, the slice is ${state:-gone}"
    if [ "$state" != ACTIVE ]; then
        "${delete[@]}" || true
    fi
done
echo "error: $name was started ${TRIES:-50} times without an end" >&2
exit 1
