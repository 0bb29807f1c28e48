"""Supervised runs under kills, hanging reads, signals, and errors of one host of two."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, config_flag, script_env, tiny
from test_multihost import losses
from test_run_faults import PATCHED, TRAINS, config_of, finish_both, newest, wait_for_step

from bigmodel import log, train
from bigmodel.config import Config
from bigmodel.training import events

pytestmark = pytest.mark.fault

HANGS_ONCE = f"""
def get(self, step):
    if {{where}} and {TRAINS} and step == 8 and not os.path.exists({{file!r}}):
        open({{file!r}}, "w").close()
        time.sleep(999)
    return read(self, step)"""


def start(
    config: Config, directory: pathlib.Path, get: str, *flags: str, **env: str
) -> subprocess.Popen[str]:
    count = env.pop("DEVICES", "1")
    devices = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")
    args = [sys.executable, "-c", PATCHED.format(get=get), config_flag(config, directory)]
    return subprocess.Popen(
        [*args, f"--workdir={directory / 'run'}", "--supervise", *flags], cwd=ROOT, text=True,
        env=script_env(XLA_FLAGS=devices, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def two_hosts(config: Config, directory: pathlib.Path, get: str, *flags: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return [start(config, directory, get, *flags, **env, JAX_PROCESS_ID=str(index)) for index in (0, 1)]


def trainer(path: pathlib.Path, host: int) -> int:
    """The process that trains on a host now."""
    end, started = time.monotonic() + 5, []
    while not started and time.monotonic() < end:  # events are written twice a second
        started = [each for each in events.read(path) if (each["event"], each["host"]) == ("started", host)]
        time.sleep(0.05)
    return int(started[-1]["pid"])


def check_steps(path: pathlib.Path, steps: int) -> None:
    rows = [row["step"] for row in log.read_metrics(path) if "train/loss" in row]
    assert rows == list(range(1, steps + 1))


def check_ledger(path: pathlib.Path) -> None:
    """All time from the first trainer's start to the end of the last is in one bucket, and in no other."""
    ledger = json.loads((path / "ledger.json").read_text())
    mine = [each for each in events.read(path) if each["host"] == 0]
    wall_s = mine[-1]["time"] - mine[0]["time"]
    parts = ledger["seconds"]
    assert sum(parts.values()) == pytest.approx(ledger["total_s"], abs=0.01)
    assert wall_s - 15 < ledger["total_s"] < wall_s + 1  # without a process's own start and end
    assert parts["waiting"] >= 1
    assert ledger["redone_steps"] > 0
    assert 0 < parts["wasted"] < wall_s
    assert ledger["workload"]["disruption_count"] == 1


@pytest.mark.parametrize("host", [0, 1])
def test_kill_9_of_one_of_two_hosts_and_both_train_again_within_a_minute(corpus, tmp_path, host):
    config = config_of(corpus, mesh__data=2, steps=80, checkpoint__every_steps=5)
    processes, path = two_hosts(config, tmp_path, "get = read"), tmp_path / "run"
    wait_for_step(processes[0], path, 12)
    os.kill(trainer(path, host), signal.SIGKILL)
    killed = time.time()
    results = finish_both(processes)
    assert [each[0] for each in results] == [0, 0], results
    check_steps(path, 80)
    check_ledger(path)
    first = next(row["time"] for row in log.read_metrics(path) if row["time"] > killed + 1)
    print(f"training again after {first - killed:.1f} s")
    assert first - killed < 60


@pytest.mark.parametrize("host", ["0", "1"])
def test_an_error_on_one_host_ends_both_within_10_s(corpus, tmp_path, host):
    get = (
        f"def get(self, step):\n    if HOST == '{host}' and {TRAINS} and step == 8:\n        time.sleep(3)\n"
        "        raise InputError('record 973 is damaged')\n    return read(self, step)"
    )
    processes = two_hosts(config_of(corpus, mesh__data=2), tmp_path, get)
    results = finish_both(processes)
    ended = time.time()
    assert [each[0] for each in results] == [2, 2], results
    assert "record 973 is damaged" in results[int(host)][2].splitlines()[-1]
    last = log.read_metrics(tmp_path / "run")[-1]["time"]  # 3 s before the error
    print(f"error to exit on both: {ended - last - 3:.1f} s")
    assert ended - last - 3 < 10
    assert not any(each["event"] == "restarting" for each in events.read(tmp_path / "run"))


def test_a_read_that_hangs_on_one_host_restarts_both_with_its_stacks(corpus, tmp_path):
    get = HANGS_ONCE.format(where="HOST == '1'", file=str(tmp_path / "hung"))
    config = config_of(corpus, mesh__data=2, steps=20, checkpoint__every_steps=5)
    results = finish_both(two_hosts(config, tmp_path, get, "--limits=least=10"))
    assert [each[0] for each in results] == [0, 0], results
    check_steps(tmp_path / "run", 20)
    assert "in get" in (tmp_path / "run" / "stacks" / "host-1-attempt-0.txt").read_text()


def test_a_run_that_always_fails_at_one_step_is_given_up(corpus, tmp_path):
    kill = f"if {TRAINS} and step == 8: os.kill(os.getpid(), 9)"
    get = f"def get(self, step):\n    {kill}\n    return read(self, step)"
    process = start(config_of(corpus, checkpoint__every_steps=3), tmp_path, get, "--restarts=1")
    ((code, _, err),) = finish_both([process])
    assert code == 1
    assert "gave up after 1 restarts without a newer checkpoint" in err.splitlines()[-1]


PHASES = {
    "restore": (
        "from bigmodel.checkpoint import start\nstart.initial_state = lambda *_: time.sleep(999)\nget = read"
    ),
    "compile": "get = read",
    "eval": f"def get(self, step):\n    time.sleep(0 if {TRAINS} else 3)\n    return read(self, step)",
    "read": HANGS_ONCE.format(where="True", file="{file}"),
    "step": "get = read",
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_in_each_phase_has_its_code_and_saves_what_was_trained(
    corpus, tmp_path, phase, number, code
):
    config = config_of(
        corpus, eval__every_steps=5 if phase == "eval" else 1000, eval__batches=-1,
        **({"model__depth": 40, "model__scan": False} if phase == "compile" else {}),
    )  # fmt: skip
    get = PHASES[phase].replace("{file}", str(tmp_path / "hung"))
    process, path = start(config, tmp_path, get), tmp_path / "run"
    if phase in ("compile", "restore"):
        time.sleep(8)
    else:
        wait_for_step(process, path, {"eval": 5, "read": 7, "step": 3}[phase])
        time.sleep(1)
    os.kill(process.pid, number)
    began = time.monotonic()
    ((got, _, err),) = finish_both([process])
    assert (got, "Traceback" in err) == (code, False), err
    assert time.monotonic() - began < 30
    if phase in ("compile", "restore"):
        assert newest(path) is None
    else:
        assert newest(path) >= {"eval": 5, "read": 8, "step": 3}[phase]


def grid_config(corpus: str, batch_size: int, **axes: int) -> Config:
    sizes = {"mesh__data": 1} | {f"mesh__{axis}": size for axis, size in axes.items()}
    return config_of(
        corpus, steps=30, checkpoint__every_steps=5, batch_size=batch_size, optim__name="sgd",
        optim__schedule="constant", check__gradient="never", **sizes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "axes", "batch_size"),
    [
        (2, {"data": 2, "fsdp": 2, "tensor": 2}, 8),
        pytest.param(4, {"data": 4, "tensor": 2}, 12, marks=pytest.mark.slow),
    ],
)
def test_an_elastic_job_goes_on_without_a_host_with_the_full_mesh_s_losses(
    corpus, tmp_path, hosts, axes, batch_size
):
    """The last host disappears with its supervisor, for good."""
    config, path = grid_config(corpus, batch_size, **axes), tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}"}
    env |= {"JAX_NUM_PROCESSES": str(hosts), "DEVICES": str(8 // hosts)}
    get = f"def get(self, step):\n    time.sleep(0.5 * ({TRAINS}))\n    return read(self, step)"
    processes = [
        start(config, tmp_path, get, "--elastic=2", **env, JAX_PROCESS_ID=str(index))
        for index in range(hosts)
    ]
    wait_for_step(processes[0], path, 7)
    for process in (trainer(path, hosts - 1), processes[-1].pid):
        os.kill(process, signal.SIGKILL)
    results = finish_both(processes)
    assert [each[0] for each in results] == [0] * (hosts - 1) + [-9], results
    check_steps(path, 30)
    members = [
        each["hosts"] for each in events.read(path) if each["event"] == "started" and each["host"] == 0
    ]
    assert members == [list(range(hosts)), list(range(hosts - 1))]
    assert "elastic   " in results[0][1]
    train.run(config, tmp_path / "straight")
    np.testing.assert_allclose(losses(path), losses(tmp_path / "straight"), rtol=1e-5)


def test_sigterm_to_the_supervisor_of_one_of_two_hosts_saves_and_ends_both(corpus, tmp_path):
    processes = two_hosts(config_of(corpus, mesh__data=2), tmp_path, "get = read")
    wait_for_step(processes[0], tmp_path / "run", 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    results = finish_both(processes)
    assert [each[0] for each in results] == [75, 75], results
    assert newest(tmp_path / "run") >= 5


def test_two_hosts_rewind_together(tmp_path):
    """And train what one does."""
    config = tiny(
        "cnn", steps=24, log__every_steps=1, log__tensorboard=False, eval__batches=1, mesh__data=2,
        checkpoint__every_steps=5, train__on_divergence="rewind",
    )  # fmt: skip
    get = (
        f"def get(self, step):\n    batch = read(self, step)\n    if {TRAINS} and step in (13, 14, 15):\n"
        "        batch['image'] = batch['image'] * float('nan')\n    return batch"
    )
    results = finish_both(two_hosts(config, tmp_path, get))
    assert [each[0] for each in results] == [0, 0], results
    (event,) = [each for each in events.read(tmp_path / "run") if each["event"] == "rewound"]
    assert (event["step"], event["to_step"], event["skip"]) == (16, 10, [10, 15])
    (tmp_path / "one").mkdir()
    one = config.replace(mesh=dataclasses.replace(config.mesh, data=1))
    ((code, _, err),) = finish_both([start(one, tmp_path / "one", get)])
    assert code == 0, err
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one" / "run"), rtol=1e-4)


def test_a_read_that_hangs_on_one_of_two_hosts_does_not_hold_sigterm_up_for_ever(corpus, tmp_path):
    """Nobody can save then: the last checkpoint stays the newest."""
    get = HANGS_ONCE.format(where="HOST == '1'", file=str(tmp_path / "hung"))
    processes = two_hosts(config_of(corpus, mesh__data=2, checkpoint__every_steps=5), tmp_path, get)
    wait_for_step(processes[0], tmp_path / "run", 7)
    time.sleep(2)
    began = time.monotonic()
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    results = finish_both(processes)
    assert [each[0] for each in results] == [75, 75], results
    assert time.monotonic() - began < 130
    assert newest(tmp_path / "run") == 5


def test_a_signal_that_a_launcher_sends_to_both_saves_the_step(corpus, tmp_path):
    """SLURM signals all processes of a step; the supervisor's copy comes late here."""
    process, path = start(config_of(corpus), tmp_path, "get = read"), tmp_path / "run"
    wait_for_step(process, path, 3)
    os.kill(trainer(path, 0), signal.SIGTERM)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    ((code, out, err),) = finish_both([process])
    assert (code, "came again" in err) == (75, False), err
    assert f"saved     step {newest(path)}" in out
