"""The launchers: what they would run, and one line for wrong use. Nothing here needs a cluster."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bigmodel.machines import accelerators

SCRIPTS = ROOT / "scripts"
FLAGS = ["--config=configs/gpt.py:size=1.5b", "--workdir=/shared/a run"]


def bash(*args: str | pathlib.Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **env}
    return subprocess.run(["bash", *args], env=env, capture_output=True, text=True, timeout=60, check=False)


def printed_words(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """The command of a dry run, read back by bash: printf %q writes several lines as one $'...' word."""
    assert (ran.returncode, ran.stderr) == (0, "")
    return bash("-c", f"printf '%s\\0' {ran.stdout}").stdout.split("\0")[:-1]


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_it(path):
    ran = bash("-n", path)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_tpu_vm_runs_the_command_in_a_clone_at_this_commit():
    command = shlex.join(["python", "scripts/train.py", *FLAGS])
    ran = bash(
        SCRIPTS / "tpu_vm.sh", "my-slice", "us-east5-b", command, DRY_RUN="1", REPO="https://x.org/me/r"
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
    assert lines[-1] == command


def test_slurm_starts_one_process_a_node(tmp_path):
    ran = bash(SCRIPTS / "slurm.sh", *FLAGS, DRY_RUN="1", SLURM_SUBMIT_DIR=str(tmp_path))
    train = ["srun", "--kill-on-bad-exit=0", ".venv/bin/python", "scripts/train.py", *FLAGS]
    assert printed_words(ran) == train
    assert "#SBATCH --ntasks-per-node=1" in (SCRIPTS / "slurm.sh").read_text()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, False), (75, True)])
def test_slurm_queues_again_what_was_preempted(tmp_path, code, requeued):
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >{tmp_path}/said'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = bash(SCRIPTS / "slurm.sh", *FLAGS, PATH=path, SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(tmp_path))
    assert ran.returncode == code
    said = tmp_path / "said"
    assert (said.read_text() if said.exists() else "") == ("requeue 42\n" if requeued else "")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("tpu_vm.sh", []),
        ("tpu_vm.sh", ["my-slice", "us-east5-b"]),
        ("tpu_vm.sh", list("abcd")),
        ("slurm.sh", []),
    ],
    ids=str,
)
def test_wrong_use_is_one_line(name, args):
    ran = bash(SCRIPTS / name, *args, DRY_RUN="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: usage: ")
    assert f"scripts/{name}" in line


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
