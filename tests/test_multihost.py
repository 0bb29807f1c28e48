"""Two processes of four devices each train what one process of eight devices trains."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

import numpy as np
import pytest
from conftest import build, by_path, config_flag, finish, start_script, tiny

from bigmodel import log, train
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config


def config_of(corpus: str, **overrides: Any) -> Config:
    keys = {
        "data__name": corpus, "model__vocab_size": 264, "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2,
        "steps": 4, "optim__name": "sgd", "optim__schedule": "constant", "eval__batches": 2,
        "log__every_steps": 1, "log__tensorboard": False, "check__gradient": "never",
    }  # fmt: skip
    return tiny("gpt", **keys | overrides)


def two_processes(
    config: Config, directory: pathlib.Path, path: pathlib.Path, *flags: str, **env: str
) -> list[subprocess.Popen[str]]:
    """Args: flags, env: what the second process gets beside what both get."""
    flag = config_flag(config, directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": devices}
    both = ("train.py", flag, f"--workdir={path}")
    first = start_script(*both, env={**shared, "JAX_PROCESS_ID": "0"})
    return [first, start_script(*both, *flags, env={**shared, "JAX_PROCESS_ID": "1", **env})]


def finish_both(processes: list[subprocess.Popen[str]], limit_s: float = 150) -> list[tuple[int, str, str]]:
    try:
        return [finish(process, limit_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def losses(path: pathlib.Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in log.read_metrics(path) if "train/loss" in row]


def test_two_processes_train_what_one_does_and_one_goes_on(corpus, tmp_path):
    config, pair, alone = (
        config_of(corpus, checkpoint__best="-eval/test/loss"),
        tmp_path / "pair",
        tmp_path / "alone",
    )
    results = finish_both(two_processes(config, tmp_path, pair))
    assert [code for code, _, _ in results] == [0, 0], results
    assert "step 4/4" in results[0][1]
    assert not re.search("start|data|step", results[1][1])  # one process speaks

    straight = train.run(config, alone)
    assert [step for step, _ in losses(pair)] == [1, 2, 3, 4]
    np.testing.assert_allclose(losses(pair), losses(alone), rtol=1e-5)
    with Checkpoints(pair / "checkpoints", read_only=True) as checkpoints:
        state, meta, step = checkpoints.restore(build(config).state_spec)
    assert (step, meta["pipeline"]["batch_size"]) == (4, 8)
    ours, theirs = by_path(state["params"]), by_path(straight.state["params"])
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)

    for path in (pair, alone):  # now both on one process
        assert train.run(config.replace(steps=6), path, resume="must").step == 6
    np.testing.assert_allclose(losses(pair), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_agree_on_the_best_step_after_a_resume(corpus, tmp_path):
    """The loss falls, so that the highest one is the first."""
    path, keys = tmp_path / "pair", {"eval__every_steps": 2, "eval__patience": 2, "checkpoint__keep": 1}
    keys |= {
        "checkpoint__best": "eval/test/loss",
        "checkpoint__every_steps": 100,
    }  # the highest: the first one
    for steps in (4, 20):
        results = finish_both(two_processes(config_of(corpus, steps=steps, **keys), tmp_path, path))
        assert [code for code, _, _ in results] == [0, 0], results
    assert "did not improve in 2 evaluations" in results[0][1]
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 6]


@pytest.mark.slow
def test_two_processes_check_their_gradient_together(corpus, tmp_path):
    config = config_of(corpus, steps=1, seq_len=8, check__gradient="auto")
    results = finish_both(two_processes(config, tmp_path, tmp_path / "run"))
    assert [code for code, _, _ in results] == [0, 0], results
    assert "gradient checked on this mesh: " in results[0][1] + results[0][2]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["gradient_check"]
    assert plan["along"] < 0.02
    assert plan["gradient"] < 1e-4
    assert plan["outputs"] < 1e-4


@pytest.mark.slow
def test_bad_input_stops_both(corpus, tmp_path):
    results = finish_both(two_processes(config_of(corpus, mesh__data=4), tmp_path, tmp_path / "run"), 60)
    assert [code for code, _, _ in results] == [2, 2], results
    assert all("mesh.data=4" in err for _, _, err in results)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.optim.lr=0.5"], r"optim\.lr is 0\.002 on host 0, 0\.5 on host 1"),
        (
            [],
            r"train data: num_examples is \d+ on host 0, \d+ on host 1; .* train data: source is .text/train",
        ),
    ],
)
def test_hosts_that_differ_are_stopped_alike_before_the_first_step(corpus, tmp_path, flags, named):
    """Without a flag: both are told of one glob, under which they find other files."""
    for home, count in (("first", 9), ("second", 6)):
        (tmp_path / home).mkdir()
        for file in sorted(pathlib.Path(corpus.removeprefix("text:")).parent.iterdir())[:count]:
            shutil.copy(file, tmp_path / home)
    config = config_of("text:~/*.txt" if not flags else corpus)
    os.environ["HOME"], before = str(tmp_path / "first"), os.environ["HOME"]
    try:
        processes = two_processes(config, tmp_path, tmp_path / "run", *flags, HOME=str(tmp_path / "second"))
    finally:
        os.environ["HOME"] = before
    results = finish_both(processes, 60)
    assert [code for code, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert re.search(named, err), err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.fault
def test_sigterm_to_one_stops_both_at_the_same_step(corpus, tmp_path):
    path = tmp_path / "run"
    config = config_of(corpus, steps=100_000, optim__lr=1e-4)
    processes = two_processes(config, tmp_path, path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        with contextlib.suppress(FileNotFoundError):
            if len(losses(path)) > 5:
                break
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    results = finish_both(processes)
    assert [code for code, _, _ in results] == [train.PREEMPTED] * 2, results
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        stopped = checkpoints.latest()
        assert stopped is not None
        assert 5 < stopped < 100_000
        state, _, _ = checkpoints.restore(build(config).state_spec)
    assert int(state["step"]) == stopped
    assert losses(path)[-1][0] in (stopped - 1, stopped)
