"""A run from its config to its files; and a run that was stopped ends as one that was not."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import build, config_flag, finish, run_script, start_script, tiny

from bigmodel import config as config_lib
from bigmodel import data, log, train, workdir
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.checkpoint.digests import digest
from bigmodel.config import Config, InputError
from bigmodel.plan import flops, receipt

TEXT = {"model__vocab_size": 264, "seq_len": 32, "log__every_steps": 2, "eval__batches": 2}
# Everything that a state can hold, and everything random: a resume must bring back all of it.
FULL = TEXT | {
    "model__dropout": 0.1, "optim__ema_decay": 0.9, "checkpoint__every_steps": 3, "steps": 8,
    "eval__every_steps": 4, "log__tensorboard": False,
}  # fmt: skip


def gpt(corpus: str, **overrides: Any) -> Config:
    return tiny("gpt", data__name=corpus, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **TEXT | overrides)


def cnn(**overrides: Any) -> Config:
    return tiny("cnn", **{"eval__batches": 2, "log__tensorboard": False} | overrides)


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """SIGTERM arrives in the middle of each of these steps."""
    whole_step = train.Loop.step

    def step_with_signal(self: Any, step: int, batch: Any, wait_s: float) -> None:
        if step in steps:
            signal.raise_signal(signal.SIGTERM)
        whole_step(self, step, batch, wait_s)

    monkeypatch.setattr(train.Loop, "step", step_with_signal)


def rows_by_name(path: pathlib.Path) -> dict[str, list[int]]:
    """Metric -> the steps it was logged at."""
    out: dict[str, list[int]] = {}
    for row in log.read_metrics(path):
        for name in row.keys() - {"step", "time"}:
            out.setdefault(name, []).append(row["step"])
    return out


# ---------------------------------------------------------------------------------------------- files


def test_a_run_learns_and_leaves_its_files(corpus, tmp_path):
    keys = {"eval__every_steps": 20, "checkpoint__every_steps": 20, "check__gradient": "auto"}
    config = gpt(corpus, steps=30, optim__lr=0.01, **keys)
    result = train.run(config, tmp_path)
    assert (result.exit_code, result.step, int(result.state["step"])) == (0, 30, 30)
    assert workdir.read_config(tmp_path) == config

    rows = log.read_metrics(tmp_path)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["eval/test/loss"] < 0.7 * losses[0]
    names = rows_by_name(tmp_path)
    train_names = {f"train/{name}" for name in ("loss", "grad_norm", "lr", "accuracy", "bits_per_byte")}
    perf_names = {f"perf/{name}" for name in ("step_time_s", "input_wait_s", "tokens_per_s", "goodput")}
    eval_names = {f"eval/test/{name}" for name in ("loss", "accuracy", "bits_per_byte", "perplexity")}
    assert names.keys() - {"perf/joules"} == train_names | perf_names | eval_names  # not all CPUs count
    assert names["train/loss"] == list(range(2, 31, 2))
    assert names["eval/test/loss"] == [20, 30]

    png = (tmp_path / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", png[16:24])) > 300
    (events,) = (tmp_path / "tb").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()
    plan, ledger = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "ledger.json"))
    assert plan["model_flops_per_step"] * 30 == ledger["model_flops"] > 0
    assert plan["devices"] == 8
    assert plan["gradient_check"]["along"] < 0.02
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [20, 30]


@pytest.mark.slow
def test_the_cnn_learns_digits(tmp_path):
    config = cnn(steps=150, batch_size=32, optim__lr=0.01, eval__batches=-1, log__every_steps=50)
    result = train.run(config, tmp_path)
    assert result.metrics["eval/test/accuracy"] > 0.6  # ten classes
    assert "perf/examples_per_s" in rows_by_name(tmp_path)


# --------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(("share", "count"), [(1e-3, 1), (1.0, 1), (2.9, 2), (3.0, 3)])
def test_a_budget_decides_the_steps(share, count):
    part = build(tiny("cnn"))
    one = {"total_flops": flops.model_flops(part)}
    assert receipt.affordable(part.config.replace(budget=share * one["total_flops"]), one) == count


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (3.5, 3)])
def test_a_run_spends_its_budget_and_no_more(tmp_path, capsys, share, count):
    budget = share * flops.model_flops(build(cnn()))
    result = train.run(cnn(budget=budget, steps=1000), tmp_path)
    assert (result.exit_code, result.step, int(result.state["step"])) == (train.DONE, count, count)
    assert f"FLOP buys {count} steps" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [count]
    plan, ledger = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "ledger.json"))
    assert plan["steps"] == ledger["steps"] == count
    assert ledger["model_flops"] <= max(budget, plan["model_flops_per_step"])
    # The learning rate's schedule ends with the budget too: the config that is kept says how many steps.
    assert workdir.read_config(tmp_path).steps == result.program.config.steps == count
    again = train.run(cnn(budget=budget), tmp_path)
    assert (again.exit_code, again.step) == (train.DONE, count)


# --------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def straight(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A run that nothing stopped, and the SHA-256 of its last state."""
    path = tmp_path_factory.mktemp("straight")
    return path, digest(train.run(gpt(corpus, **FULL), path).state)


@pytest.mark.parametrize("stops", [pytest.param((3,), marks=pytest.mark.slow), (2, 5)], ids=str)
def test_a_stopped_run_ends_bit_for_bit_as_a_straight_one(corpus, straight, tmp_path, monkeypatch, stops):
    for step in stops:
        stop_at(monkeypatch, step)
        result = train.run(gpt(corpus, **FULL), tmp_path)
        monkeypatch.undo()
        assert (result.exit_code, result.step) == (train.PREEMPTED, step)
    result = train.run(gpt(corpus, **FULL), tmp_path)
    assert (result.exit_code, result.step) == (train.DONE, 8)
    assert digest(result.state) == straight[1]
    for name, logged in rows_by_name(tmp_path).items():
        assert len(logged) == len(set(logged)), name
    ours, theirs = ([r for r in log.read_metrics(p) if "train/loss" in r] for p in (tmp_path, straight[0]))
    assert [(r["step"], r["train/loss"]) for r in ours] == [(r["step"], r["train/loss"]) for r in theirs]


def test_what_was_logged_after_the_checkpoint_is_not_logged_twice(corpus, straight, tmp_path, monkeypatch):
    """After a kill the log is ahead of the newest checkpoint, and its last line is cut."""
    stop_at(monkeypatch, 3)
    train.run(gpt(corpus, **FULL), tmp_path)
    monkeypatch.undo()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 0, "train/loss": 9.0}\n{"step": 6, "ti')
    train.run(gpt(corpus, **FULL), tmp_path)
    rows = [row for row in log.read_metrics(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[1]["train/loss"] < 9.0


def test_running_again_says_done(corpus, straight, capsys):
    path, sha = straight
    before = {p: p.stat().st_mtime_ns for p in (path / "checkpoints").rglob("*")}
    metrics = (path / "metrics.jsonl").read_bytes()
    result = train.run(gpt(corpus, **FULL), path, resume="must")
    assert (result.exit_code, result.step, digest(result.state)) == (train.DONE, 8, sha)
    assert "done:" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (path / "checkpoints").rglob("*")}
    assert metrics == (path / "metrics.jsonl").read_bytes()


def contents(path: pathlib.Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("changes", "resume", "message"),
    [
        ({}, "never", r"--resume=never, but --workdir=.* holds a run; choose a new --workdir"),
        ({"seed": 1}, "auto", r"was trained on other data: seed was 0, now 1; use the same data, seed and"),
        ({"batch_size": 16}, "auto", r"trained on other data: batch_size was 8, now 16"),
        ({"data__split": "test"}, "auto", r"trained on other data: "),
        ({"model__width": 64}, "auto", r"trained with other settings, .*: model\.\S+ was \d+, now \d+; "),
        (
            {"optim__name": "sgd"},
            "auto",
            r"trained with other settings, .*: optim\.name was 'adamw', now 'sgd'",
        ),
    ],
    ids=["never", "seed", "batch", "data", "width", "optimizer"],
)
def test_what_does_not_fit_the_checkpoint_is_refused(corpus, straight, changes, resume, message):
    path, _ = straight
    before = contents(path)
    with pytest.raises(InputError, match=message) as caught:
        train.run(gpt(corpus, **FULL | changes | {"steps": 12}), path, resume=resume)
    assert "\n" not in str(caught.value)
    assert contents(path) == before


def test_must_resume_needs_a_checkpoint(corpus, tmp_path):
    with pytest.raises(InputError, match=r"--resume=must, but --workdir=.* holds no checkpoint"):
        train.run(gpt(corpus), tmp_path, resume="must")
    assert contents(tmp_path) == {}


def test_one_workdir_one_run(corpus, tmp_path):
    with (tmp_path / ".lock").open("w") as other:
        other.write("4242\n")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"--workdir=.* is in use by process 4242; wait for it"):
            train.run(gpt(corpus), tmp_path)
    assert contents(tmp_path) == {}


# --------------------------------------------------------------------------------------------- trouble


def change_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, dict], Any]) -> None:
    """Every batch of training passes through `change(step it is for, batch)`."""
    read = data.Pipeline.__getitem__

    def changed(pipeline: data.Pipeline, step: int) -> dict[str, np.ndarray]:
        batch = dict(read(pipeline, step))
        if len(pipeline) == sys.maxsize:  # training's, which never ends
            change(step + 1, batch)
        return batch

    monkeypatch.setattr(data.Pipeline, "__getitem__", changed)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    def poison(step: int, batch: dict) -> None:
        if step == 5:
            batch["image"] = np.full_like(batch["image"], np.inf)

    change_batches(monkeypatch, poison)
    with pytest.raises(train.NotFinite, match=r"step 5: .*nan.*newest checkpoint is step 4; lower optim\.lr"):
        train.run(cnn(steps=10, checkpoint__every_steps=1), tmp_path)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 4
    last = log.read_metrics(tmp_path)[-1]
    assert (last["step"], last["train/loss"]) == (5, None)
    assert json.loads((tmp_path / "ledger.json").read_text())["steps"] >= 5


def test_divergence_exits_with_3(tmp_path):
    flags = {"optim.lr": 1e30, "optim.clip_norm": 0, "optim.name": "sgd", "optim.warmup_steps": 0}
    config = {"steps": 20, "batch_size": 8, "model.channels": "4", "model.width": 8, **flags}
    overrides = [f"--config.{key}={value}" for key, value in config.items()]
    ran = run_script("train.py", "--config=configs/cnn.py", *overrides, f"--workdir={tmp_path}")
    assert ran.code == 3, ran
    assert len(ran.err.splitlines()) == 1
    assert "lower optim.lr" in ran.err
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == []


def test_a_starved_device_shows_in_the_log(tmp_path, monkeypatch):
    change_batches(monkeypatch, lambda step, batch: time.sleep(0.1))
    train.run(cnn(steps=8, log__every_steps=4), tmp_path)
    waits = [row["perf/input_wait_s"] for row in log.read_metrics(tmp_path) if "perf/input_wait_s" in row]
    assert waits[-1] > 0.05
    spent = json.loads((tmp_path / "ledger.json").read_text())["seconds"]
    assert spent["input"] > spent["step"]


def test_sigterm_saves_and_the_same_command_goes_on(corpus, straight, tmp_path):
    path = tmp_path / "run"
    config = dataclasses.replace(gpt(corpus, **FULL), log=config_lib.Log(1, False))
    process = start_script("train.py", config_flag(config, tmp_path), f"--workdir={path}")
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if "\n" in (path / "metrics.jsonl").read_text():
                break
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == train.PREEMPTED, err
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        stopped = checkpoints.latest()
    assert stopped is not None
    assert 1 <= stopped < 8
    result = train.run(config, path)
    assert digest(result.state) == straight[1]
