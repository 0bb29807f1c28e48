#!/usr/bin/env bash
# Runs one command on several hosts by ssh; they train as one job. The first host is the coordinator.
#   bash scripts/launch/ssh.sh 'node1 node2' 'python scripts/train.py --supervise --config=configs/gpt.py:size=1.5b --workdir=/shared/run'
# Each host has a clone of this repository, with its .venv, in DIR (default: bigmodel, from the home directory); all must
# be at this commit. PORT (default 8476) is the coordinator's. A signal is passed on to all hosts, and the exit code is
# that of the first host that failed. DRY_RUN=1 prints what it would run.
set -uo pipefail

if [ $# -ne 2 ]; then
    echo "error: usage: bash scripts/launch/ssh.sh 'HOST HOST ...' 'COMMAND', two arguments, but $# were given" >&2
    exit 2
fi
read -ra hosts <<<"$1"
command=$2
revision=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD)
pidfile=".bigmodel-$(printf %s "$command" | cksum | cut -d' ' -f1).pid"

remote() { # the command of host number $1
    printf '%s\n' "cd ${DIR:-bigmodel} || exit 2" \
        "[ \"\$(git rev-parse HEAD)\" = $revision ] || { echo \"error: \$(hostname) is not at commit $revision\" >&2; exit 2; }" \
        "export PATH=\"\$PWD/.venv/bin:\$PATH\" JAX_COORDINATOR_ADDRESS=${hosts[0]#*@}:${PORT:-8476} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$1" \
        "echo \$\$ >~/$pidfile-$1" "exec $command"
}

children=()
for index in "${!hosts[@]}"; do
    run=(ssh -o BatchMode=yes "${hosts[index]}" "$(remote "$index")")
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${run[@]}"
        echo
        continue
    fi
    "${run[@]}" &
    children+=($!)
done
[ -z "${DRY_RUN:-}" ] || exit 0

pass_on() {
    for index in "${!hosts[@]}"; do
        ssh -o BatchMode=yes "${hosts[index]}" "kill -$1 \"\$(cat ~/$pidfile-$index)\"" &
    done
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
code=0
for child in "${children[@]}"; do
    wait "$child"
    one=$?
    while kill -0 "$child" 2>/dev/null; do # the wait was cut short by a signal
        wait "$child"
        one=$?
    done
    [ "$code" -ne 0 ] || code=$one
done
exit "$code"
