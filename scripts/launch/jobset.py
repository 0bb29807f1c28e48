"""Starts a command on Kubernetes as a JobSet: a job for each slice, a pod for each host.

    python scripts/launch/jobset.py --name=run1 --target=2*v5e:16x16 --image=IMAGE --claim=CLAIM -- \\
        python scripts/train.py --supervise --config=configs/gpt.py:size=1.5b --workdir=/checkpoints/run1
    DRY_RUN=1 python scripts/launch/jobset.py ...    # prints the manifest that kubectl would apply

The cluster has the JobSet controller (jobset.sigs.k8s.io), and node pools of GKE as xpk makes them. A pod
that is taken away, or ends with 75, restarts the JobSet, and the command resumes; 2 (bad input), 3 (diverged)
and 4 (wrong program) end it.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import cli

from bigmodel.config import InputError

# chip -> the label of GKE's node pools, cloud.google.com/gke-tpu-accelerator
TPUS = {
    "v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
}  # fmt: skip
# GPU -> cloud.google.com/gke-accelerator
GPUS = {
    "a100": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
FINAL = [2, 3, 4]  # exit codes that a restart does not mend
PORT = 8476


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--name", required=True, help="of the JobSet: small letters, digits and -")
    flags.add_argument(
        "--target", required=True, help="as plan.py's: v5e:4x4, 2*v5p:4x4x4, h100:4x8 (hosts x GPUs)"
    )
    flags.add_argument(
        "--image", required=True, help="a container with this repository, installed in its workdir"
    )
    flags.add_argument("--spot", action="store_true", help="ask for spot nodes")
    flags.add_argument("--restarts", type=int, default=50, help="of the JobSet, at most")
    flags.add_argument("--claim", default="", help="a PersistentVolumeClaim to mount at /checkpoints")
    flags.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = flags.parse_args()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        raise InputError("no command is given; put it after --")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        raise InputError(f"--name={args.name}: give up to 40 small letters, digits and -, a letter first")
    text = yaml.safe_dump(manifest(args), sort_keys=False)
    if os.environ.get("DRY_RUN"):
        print(text, end="")
        return 0
    try:
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=False).returncode
    except FileNotFoundError as error:
        raise InputError("kubectl is not installed; DRY_RUN=1 prints the manifest") from error


def manifest(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet. Raises InputError: a target that is none."""
    slices, pods, selector, limits, env = _hardware(args.target, args.name)
    if args.spot:
        selector = selector | {"cloud.google.com/gke-spot": "true"}
    container: dict[str, Any] = {
        "name": "bigmodel",
        "image": args.image,
        "command": args.command,
        "env": env,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if args.claim:
        container["volumeMounts"].append({"name": "checkpoints", "mountPath": "/checkpoints"})
        volumes.append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": args.claim}})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # the step is finished and saved
        "nodeSelector": selector,
        "volumes": volumes,
        "containers": [container],
    }
    if args.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    fail = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "bigmodel", "operator": "In", "values": FINAL},
    }
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [fail]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.restarts,
                "rules": [
                    {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def _hardware(
    target: str, name: str
) -> tuple[int, int, dict[str, str], dict[str, int], list[dict[str, Any]]]:
    """-> slices, pods a slice, labels of the nodes, devices a pod, environment."""
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", target)
    if not found or found[2] not in TPUS | GPUS:
        raise InputError(
            f"--target={target}: give v5e:4x4, 2*v5p:4x4x4 or h100:4x8; known: {', '.join(TPUS | GPUS)}"
        )
    slices, chip, topology = int(found[1] or 1), found[2], found[3]
    sizes = [int(size) for size in topology.split("x")]
    if chip in TPUS:
        if len(sizes) != (2 if chip in ("v5e", "v6e") else 3):
            raise InputError(
                f"--target={target}: {chip} has {'two' if chip in ('v5e', 'v6e') else 'three'} sizes"
            )
        chips = math.prod(sizes)
        a_pod = chips if chips <= 8 and len(sizes) == 2 else min(chips, 4)
        if chips % a_pod:
            raise InputError(f"--target={target}: {chips} chips do not divide over hosts of {a_pod}")
        selector = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[chip],
            "cloud.google.com/gke-tpu-topology": topology,
        }
        return slices, chips // a_pod, selector, {"google.com/tpu": a_pod}, []
    if len(sizes) != 2 or slices != 1:
        raise InputError(f"--target={target}: for GPUs give hosts x GPUs a host, such as {chip}:4x8")
    hosts, gpus = sizes
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    env: list[dict[str, Any]] = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-slice-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": index},
    ]
    return (
        1,
        hosts,
        {"cloud.google.com/gke-accelerator": GPUS[chip]},
        {"nvidia.com/gpu": gpus},
        env if hosts > 1 else [],
    )


if __name__ == "__main__":
    cli.run(main)
