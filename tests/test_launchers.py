"""The launchers: what they would run, and one line for wrong use. Nothing here needs a cluster."""

from __future__ import annotations

import configparser
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bigmodel.machines import accelerators

SCRIPTS = ROOT / "scripts"
LAUNCH = SCRIPTS / "launch"
FLAGS = ["--config=configs/gpt.py:size=1.5b", "--workdir=/shared/a run"]


def bash(*args: str | pathlib.Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **env}
    return subprocess.run(["bash", *args], env=env, capture_output=True, text=True, timeout=60, check=False)


def printed_words(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """The command of a dry run, read back by bash: printf %q writes several lines as one $'...' word."""
    assert (ran.returncode, ran.stderr) == (0, "")
    return bash("-c", f"printf '%s\\0' {ran.stdout}").stdout.split("\0")[:-1]


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_it(path):
    ran = bash("-n", path)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_tpu_vm_runs_the_command_in_a_clone_at_this_commit():
    command = shlex.join(["python", "scripts/train.py", *FLAGS])
    ran = bash(
        LAUNCH / "tpu_vm.sh", "my-slice", "us-east5-b", command, DRY_RUN="1", REPO="https://x.org/me/r"
    )
    *start, remote = printed_words(ran)
    assert start == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "my-slice",
        "--zone=us-east5-b",
        "--worker=all",
    ]
    script = remote.removeprefix("--command=")
    assert bash("-n", "-c", script).returncode == 0
    lines = script.splitlines()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert lines[0] == "set -e"
    assert "git clone --quiet 'https://x.org/me/r' bigmodel" in script
    assert f"git checkout --quiet {head.stdout.strip()}" in script
    assert "pip install --quiet --require-hashes --requirement scripts/launch/tpu.lock" in script
    assert lines[-1] == command


GCLOUD = """#!/bin/bash
# A cloud that takes its first slice away: the states and the exit codes of ssh come one after another.
echo "$@" >>"$LOG"
next() { line=$(head -n 1 "$1"); sed -i 1d "$1"; echo "$line"; }
case "$*" in
*" describe "*) state=$(next "$STATES"); [ "$state" != none ] || exit 1; echo "$state" ;;
*" ssh "*) exit "$(next "$CODES")" ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "codes", "code", "expected"),
    [
        ("none WAITING_FOR_RESOURCES ACTIVE", "0", 0, "create ssh delete"),
        ("none ACTIVE SUSPENDED none ACTIVE", "255 0", 0, "create ssh delete create ssh delete"),
        ("none FAILED FAILED none ACTIVE", "2", 2, "create delete create ssh delete"),
        ("ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE", "75 3", 3, "ssh ssh delete"),
    ],
)
def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path, states, codes, code, expected):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_S": "0", "SPOT": "1", "REPO": "r"}
    for name, words in {"STATES": states, "CODES": codes, "LOG": ""}.items():
        (tmp_path / name).write_text(words.replace(" ", "\n") + "\n" * bool(words))
        env[name] = str(tmp_path / name)
    ran = bash(
        LAUNCH / "tpu_queue.sh", "run", "us-east5-b", "v5litepod-16", "v2-alpha-tpuv5-lite", "true", **env
    )
    assert ran.returncode == code, ran.stderr
    calls = [line for line in (tmp_path / "LOG").read_text().splitlines() if line.startswith("compute")]
    said = [word for line in calls for word in line.split() if word in ("create", "ssh", "delete")]
    assert " ".join(said) == expected
    if "create" in said:
        (first, *_) = (line for line in calls if " create " in line)
        assert "--accelerator-type=v5litepod-16" in first
        assert "--spot" in first


def test_a_queued_slices_commands_are_printed():
    ran = bash(LAUNCH / "tpu_queue.sh", "run", "z", "v5litepod-16", "v", "true", DRY_RUN="1", REPO="r")
    verbs = [re.search(r" (create|describe|ssh|delete) ", line) for line in ran.stdout.splitlines()]
    assert [found[1] for found in verbs if found] == ["create", "describe", "ssh", "delete"]


def test_hosts_by_ssh_are_one_job_and_hear_of_a_signal(tmp_path):
    (tmp_path / "ssh").write_text(
        '#!/bin/bash\nshift 2\nexport HOME=$HOME_OF/$1\nmkdir -p "$HOME"\nexec bash -c "$2"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME_OF": str(tmp_path), "DIR": str(ROOT)}
    variables = "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    ran = bash(LAUNCH / "ssh.sh", "me@a b", f"bash -c 'echo {variables}'", **env)
    assert sorted(ran.stdout.splitlines()) == ["a:8476 2 0", "a:8476 2 1"], ran.stderr
    assert bash(LAUNCH / "ssh.sh", "a b", "bash -c 'exit $((3 * JAX_PROCESS_ID))'", **env).returncode == 3
    started = f"{tmp_path}/started-$JAX_PROCESS_ID"
    trap = f"bash -c 'trap \"exit 75\" TERM; touch {started}; while :; do sleep 0.05; done'"
    process = subprocess.Popen(["bash", LAUNCH / "ssh.sh", "a b", trap], env={**os.environ, **env})
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 75


def jobset(*flags: str) -> dict[str, Any]:
    command = [
        sys.executable,
        LAUNCH / "jobset.py",
        "--name=run1",
        "--image=i",
        *flags,
        "--",
        "python",
        "x.py",
    ]
    env = {**os.environ, "DRY_RUN": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return yaml.safe_load(ran.stdout)


@pytest.mark.parametrize(
    ("target", "slices", "pods", "devices", "topology"),
    [
        ("2*v5e:16x16", 2, 64, 4, "16x16"),
        ("v5e:2x4", 1, 1, 8, "2x4"),
        ("v5p:4x4x4", 1, 16, 4, "4x4x4"),
        ("h100:4x8", 1, 4, 8, None),
    ],
)
def test_a_jobset_has_a_pod_for_each_host(target, slices, pods, devices, topology):
    made = jobset(f"--target={target}")
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, pods, pods)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology") == topology
    (container,) = pod["containers"]
    assert list(container["resources"]["limits"].values()) == [devices]
    assert container["command"] == ["python", "x.py"]
    names = {each["name"]: each.get("value") for each in container["env"]}
    assert names.get("JAX_NUM_PROCESSES") == (None if topology else str(pods))


def test_a_jobset_restarts_but_for_final_exit_codes():
    made = jobset("--target=v5e:4x4", "--spot", "--restarts=7")
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "FailJobSet"
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4]
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=v5e:4x4x4", "--", "x"], "two sizes"), (["--target=v9:4x4", "--", "x"], "--target=v9:4x4"),
        (["--target=v5e:4x4"], "no command"), (["--target=v5e:3x5", "--", "x"], "do not divide"),
    ],
)  # fmt: skip
def test_a_wrong_jobset_is_one_line(flags, message):
    command = [sys.executable, LAUNCH / "jobset.py", "--name=run1", "--image=i", *flags]
    env = {**os.environ, "DRY_RUN": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_skypilots_task_joins_its_nodes():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    variables = "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    ran = bash("-c", task["run"], COMMAND=f"echo {variables}", **sky)
    assert ran.stdout.split() == ["10.0.0.1:8476", "2", "1"]
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}


@pytest.mark.parametrize("name", ["tpu", "cuda"])
def test_locks_pin_what_setup_cfg_asks_for(name):
    pinned = dict(
        re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", (LAUNCH / f"{name}.lock").read_text(), re.MULTILINE)
    )
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options"]["install_requires"].split("\n"):
        if line:
            wanted = Requirement(line)
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line


def test_slurm_starts_one_process_a_node(tmp_path):
    ran = bash(LAUNCH / "slurm.sh", *FLAGS, DRY_RUN="1", SLURM_SUBMIT_DIR=str(tmp_path))
    train = ["srun", "--kill-on-bad-exit=0", ".venv/bin/python", "scripts/train.py", "--supervise", *FLAGS]
    assert printed_words(ran) == train
    assert "#SBATCH --ntasks-per-node=1" in (LAUNCH / "slurm.sh").read_text()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, False), (75, True)])
def test_slurm_queues_again_what_was_preempted(tmp_path, code, requeued):
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >{tmp_path}/said'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = bash(LAUNCH / "slurm.sh", *FLAGS, PATH=path, SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(tmp_path))
    assert ran.returncode == code
    said = tmp_path / "said"
    assert (said.read_text() if said.exists() else "") == ("requeue 42\n" if requeued else "")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("tpu_vm.sh", []),
        ("tpu_vm.sh", ["my-slice", "us-east5-b"]),
        ("tpu_vm.sh", list("abcd")),
        ("tpu_queue.sh", list("abcd")),
        ("ssh.sh", ["a b"]),
        ("slurm.sh", []),
    ],
    ids=str,
)
def test_wrong_use_is_one_line(name, args):
    ran = bash(LAUNCH / name, *args, DRY_RUN="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: usage: ")
    assert f"scripts/launch/{name}" in line


@pytest.mark.parametrize("told", [None, "cuda,cpu"])
def test_scripts_keep_jax_to_the_cpu_where_there_is_nothing_else(told):
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": str(ROOT)}
    env |= {"JAX_PLATFORMS": told} if told else {}
    code = "import os, cli; print(os.environ.get('JAX_PLATFORMS'))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=SCRIPTS, capture_output=True, text=True, check=True
    )
    expected = told or ("None" if accelerators.found() else "cpu")
    assert ran.stdout.strip() == expected


def test_importing_the_package_changes_no_environment():
    code = "import os, sys; was = dict(os.environ); from bigmodel import config"
    code += "; assert dict(os.environ) == was; assert 'jax' not in sys.modules"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_long_wait_is_told_of(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cli

    with cli.patience("planning", every_s=0.02):
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 2
    assert all(re.fullmatch(r"planning \.\.\. \d+ s", line) for line in said)
