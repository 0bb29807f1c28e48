"""Runs under signals, full disks, closed pipes, hanging reads, and hosts that fail alone."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import ROOT, config_flag, finish, run_script, script_env, start_script, tiny

from bigmodel import log
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config

pytestmark = pytest.mark.fault

FOREVER = 1_000_000
# Runs scripts/train.py with `get` in place of the pipeline's: get(read, pipeline, step) -> batch.
PATCHED = """
import os, runpy, sys, time
sys.path.insert(0, "scripts")
from bigmodel.config import InputError
from bigmodel.data import pipeline
read, HOST = pipeline.Pipeline.__getitem__, os.environ.get("JAX_PROCESS_ID", "0")
{get}
pipeline.Pipeline.__getitem__ = lambda self, step: get(self, step)
sys.argv = ["scripts/train.py", *sys.argv[1:]]
runpy.run_path("scripts/train.py", run_name="__main__")
"""
TRAINS = f"len(self) > {FOREVER // 2}"  # the pipeline of training


def config_of(corpus: str, **overrides: object) -> Config:
    keys = {
        "data__name": corpus, "model__vocab_size": 264, "eval__batches": 2, "steps": FOREVER,
        "optim__lr": 1e-4, "log__every_steps": 1, "log__tensorboard": False,
    }  # fmt: skip
    return tiny("gpt", **keys | overrides)


def start(config: Config, directory: pathlib.Path, get: str, **env: str) -> subprocess.Popen[str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    code = PATCHED.format(get=get)
    args = [sys.executable, "-c", code, config_flag(config, directory), f"--workdir={directory / 'run'}"]
    return subprocess.Popen(
        args, cwd=ROOT, env=script_env(XLA_FLAGS=flags, **env), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for_step(
    process: subprocess.Popen[str], path: pathlib.Path, step: int, limit_s: float = 150
) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(row["step"] >= step for row in log.read_metrics(path)):
                return
        time.sleep(0.05)
    pytest.fail(f"no step {step}: {finish(process, 10)}")


def newest(path: pathlib.Path) -> int | None:
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.latest()


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.5, 6.0])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_has_its_code(corpus, tmp_path, after_s, number, code):
    # Deep and unrolled: so compiling takes longer than the last of these times.
    config = config_of(corpus, model__depth=40, model__scan=False)
    process = start_script("train.py", config_flag(config, tmp_path), f"--workdir={tmp_path / 'run'}")
    time.sleep(after_s)
    os.kill(process.pid, number)
    began = time.monotonic()
    got, _, err = finish(process)
    assert got == code, err
    assert time.monotonic() - began < 5
    assert "Traceback" not in err
    assert newest(tmp_path / "run") is None


def test_ctrl_c_saves_the_step_without_a_traceback(corpus, tmp_path):
    process = start(config_of(corpus), tmp_path, "get = read")
    wait_for_step(process, tmp_path / "run", 3)
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert (code, "Traceback" in err) == (130, False), err
    assert f"saved     step {newest(tmp_path / 'run')}" in out


def test_sigterm_while_a_read_hangs_saves_the_step_before_it(corpus, tmp_path):
    get = f"def get(self, step):\n    time.sleep(999 * ({TRAINS} and step == 7))\n    return read(self, step)"
    process = start(config_of(corpus), tmp_path, get)
    wait_for_step(process, tmp_path / "run", 6)
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    code, _, err = finish(process)
    assert code == 75, err
    assert time.monotonic() - began < 30
    assert newest(tmp_path / "run") == 7


def test_sigterm_in_an_evaluation_gives_it_up(corpus, tmp_path):
    get = f"def get(self, step):\n    time.sleep(0 if {TRAINS} else 3)\n    return read(self, step)"
    process = start(config_of(corpus, eval__every_steps=5, eval__batches=-1), tmp_path, get)
    wait_for_step(process, tmp_path / "run", 5)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    code, out, err = finish(process)
    assert code == 75, err
    assert time.monotonic() - began < 20
    assert newest(tmp_path / "run") == 5
    assert "given up" in out


def test_a_second_signal_ends_at_once_and_nothing_is_harmed(corpus, tmp_path):
    get = f"def get(self, step):\n    time.sleep(999 * ({TRAINS} and step == 7))\n    return read(self, step)"
    process = start(config_of(corpus, checkpoint__every_steps=2), tmp_path, get)
    wait_for_step(process, tmp_path / "run", 6)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
    began = time.monotonic()
    assert finish(process)[0] == 75
    assert time.monotonic() - began < 3
    assert newest(tmp_path / "run") in (4, 6, 7)  # 7: the step that ran when the first one came


# -------------------------------------------------------------------------------------------------- pipes


@pytest.mark.parametrize("both", [False, True])
def test_a_closed_pipe_does_not_end_a_run(corpus, tmp_path, both):
    flag = config_flag(config_of(corpus, steps=6), tmp_path)
    command = f"{sys.executable} scripts/train.py {flag} --workdir={tmp_path}/run"
    command += " 2>&1 | head -1" if both else " | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=script_env(), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path / "run") == 6


def test_stdout_on_a_full_disk_does_not_end_a_run(corpus, tmp_path):
    flag = config_flag(config_of(corpus, steps=6), tmp_path)
    args = [sys.executable, "scripts/train.py", flag, f"--workdir={tmp_path}/run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            args, cwd=ROOT, env=script_env(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert newest(tmp_path / "run") == 6


# -------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 1024)
    return disk / "fill"


def one_line(err: str) -> str:
    *before, last = err.splitlines()
    assert "Traceback" not in err
    assert all(line.startswith("warning:") for line in before), err
    return last


def test_a_disk_that_fills_up_and_one_that_is_full(corpus, tmp_path, small_disk):
    config = config_of(
        corpus, steps=600, checkpoint__every_steps=100, log__every_steps=5, log__tensorboard=True
    )
    flag, path = config_flag(config, tmp_path), small_disk / "run"
    process = start_script("train.py", flag, f"--workdir={path}")
    wait_for_step(process, path, 120)
    filled = fill(small_disk)
    code, _, err = finish(process)
    assert code == 2
    assert "No space left on device" in one_line(err)
    assert str(path) in one_line(err)
    last = newest(path)
    assert last in (100, 200)
    assert not list(path.glob(".*.*")), os.listdir(path)  # nothing half-written stays
    before = (path / "metrics.jsonl").read_bytes()

    ran = run_script("train.py", flag, f"--workdir={path}")  # a resume
    assert (ran.code, "No space left on device" in one_line(ran.err)) == (2, True), ran
    ran = run_script("train.py", flag, f"--workdir={small_disk / 'new'}")
    assert (ran.code, "No space left on device" in one_line(ran.err)) == (2, True), ran
    assert not (small_disk / "new").exists()
    assert (path / "metrics.jsonl").read_bytes() == before
    assert newest(path) == last
    filled.unlink()
    ran = run_script("train.py", flag, f"--workdir={path}")
    assert (ran.code, newest(path)) == (0, 600), ran
    rows = [row["step"] for row in log.read_metrics(path) if "train/loss" in row]
    assert rows == list(range(5, 601, 5))
    assert json.loads((path / "ledger.json").read_text())["steps"] >= 600


# ------------------------------------------------------------------------------------------ several hosts


def two_hosts(config: Config, directory: pathlib.Path, get: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(config, directory, get, **env, JAX_PROCESS_ID=str(index)) for index in (0, 1)]


def finish_both(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        return [finish(process, 200) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("host", ["0", "1"])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [("InputError('record 973 is damaged')", 2, "record 973 is damaged"), ("ZeroDivisionError('x')", 1, "x")],
)
def test_an_error_on_one_host_ends_both_with_its_line_and_code(corpus, tmp_path, host, error, code, words):
    get = (
        f"def get(self, step):\n    if HOST == '{host}' and {TRAINS} and step == 8:\n        time.sleep(3)\n"
        f"        raise {error}\n    return read(self, step)"
    )
    config = config_of(corpus, mesh__data=2)
    processes = two_hosts(config, tmp_path, get)
    wait_for_step(processes[0], tmp_path / "run", 6)
    began = time.monotonic()
    results = finish_both(processes)
    assert [each[0] for each in results] == [code, code], results
    assert time.monotonic() - began < 20
    for _, _, err in results:
        assert words in err.strip().splitlines()[-1]
    assert f"process {host} of the job failed" in results[1 - int(host)][2]


def test_a_lock_that_process_0_finds_ends_both(corpus, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        results = finish_both(two_hosts(config_of(corpus, mesh__data=2), tmp_path, "get = read"))
    assert [code for code, _, _ in results] == [2, 2], results
    assert all("is in use by process" in err.splitlines()[-1] for _, _, err in results)


def test_sigterm_to_one_host_before_the_first_step_ends_both(corpus, tmp_path):
    config = config_of(corpus, mesh__data=2, model__depth=60, model__scan=False)
    processes = two_hosts(config, tmp_path, "get = read")
    time.sleep(15)
    os.kill(processes[1].pid, signal.SIGTERM)
    results = finish_both(processes)
    assert [code for code, _, _ in results] == [75, 75], results
