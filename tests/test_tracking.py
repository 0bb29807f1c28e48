"""Weights & Biases (`log.wandb`): what it gets, and that it cannot end a run."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np
import pytest
from conftest import run_script, tiny

from bigmodel import train
from bigmodel.config import InputError
from bigmodel.training import tracking

KEYS: dict[str, Any] = {
    "data__name": "digits", "eval__every_steps": 4, "eval__batches": 1, "log__every_steps": 2,
    "log__wandb": "team/proj",
}  # fmt: skip


# Writes what it is called with to a file, and fails as $FAKE says: "log 2" raises there, "hang", "die".
FAKE = """
import json, os, time
kind, _, at = os.environ.get("FAKE", "").partition(" ")

def write(**call):
    with open(os.environ["FAKE_FILE"], "a") as file:
        file.write(json.dumps(call) + chr(10))

def fault(here):
    if at == here and kind == "fail":
        raise RuntimeError("the service" + chr(10) + "is gone")
    if at == here and kind == "die":
        os._exit(9)
    if at == here and kind == "hang":
        time.sleep(1000)

class Run:
    offline, url, step = False, "https://wandb.example/run", int(os.environ.get("FAKE_STEP", 0))
    def log(self, values, step):
        fault(str(step))
        write(step=step, values=values)
    def finish(self, exit_code):
        fault("finish")
        write(code=exit_code)

def init(**keys):
    print("to nobody")
    fault("init")
    write(init={key: value for key, value in keys.items() if key != "settings"})
    return Run()

def Image(picture):
    return list(picture.size)

Settings = dict
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a module in place of wandb, here and in other processes. -> its calls, so far."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_FILE", str(tmp_path / "calls.jsonl"))

    def calls(name: str) -> list[Any]:
        found = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
        return [
            call[name] if name != "values" else (call["step"], call[name]) for call in found if name in call
        ]

    return calls


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def plain(found: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(row["step"], {k: v for k, v in row.items() if k not in ("step", "time")}) for row in found]


def test_it_gets_the_metrics_of_the_log_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch, fake, capsys):
    path = tmp_path / "run"
    train.run(tiny("mlp", steps=4, **KEYS), path)
    assert fake("values") == plain(rows(path))
    assert fake("code") == [0]
    assert "wandb     team/proj, run" in capsys.readouterr().out
    (given,) = fake("init")
    assert (given["entity"], given["project"], given["resume"]) == ("team", "proj", "allow")
    assert given["config"] == json.loads((path / "config.json").read_text())
    count = len(fake("values"))
    monkeypatch.setenv("FAKE_STEP", "7")  # what step 6 logged is there already
    train.run(tiny("mlp", steps=8, **KEYS), path)
    assert fake("init")[1]["id"] == given["id"] == json.loads((path / "wandb.json").read_text())["id"]
    assert fake("values")[count:] == [each for each in plain(rows(path)) if each[0] >= 7]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fail init", "RuntimeError: the service is gone"),
        ("fail 2", "RuntimeError: the service is gone"),
        ("die 2", "its process "),
        ("fail finish", "RuntimeError: the service is gone"),
        ("hang init", "it does not answer within 2 s"),
        ("hang 2", "it does not answer within 2 s"),
        ("hang finish", "it does not answer within 2 s"),
    ],
)
def test_a_fault_is_one_warning_and_delays_nothing(fault, said, tmp_path, monkeypatch, fake, caplog):
    monkeypatch.setenv("FAKE", fault)
    monkeypatch.setattr(tracking, "WAIT_S", 2.0 if fault.startswith("hang") else 20.0)
    with tracking.tracking(tiny("mlp", **KEYS), tmp_path) as tracker:
        assert tracker is not None
        began = time.monotonic()
        for step in range(3000):
            tracker.write(step, {"train/loss": math.nan if step else 1.0, "x": 1.0})
        tracker.picture(3000, "drawn", np.zeros((4, 4, 3), np.uint8))
        assert time.monotonic() - began < 2
    (warning,) = [each.getMessage() for each in caplog.records]
    assert said in warning
    assert "the run goes on" in warning


def test_a_service_that_does_not_keep_up_is_left_alone(tmp_path, monkeypatch, fake, caplog):
    monkeypatch.setenv("FAKE", "hang 2")
    monkeypatch.setattr(tracking, "MOST_BYTES", 100_000)
    with tracking.tracking(tiny("mlp", **KEYS), tmp_path) as tracker:
        assert tracker is not None
        for step in range(20_000):
            tracker.write(step, {"train/loss": 1.0})
    assert "does not keep up" in caplog.text


def test_a_damaged_id_is_a_new_one_and_a_run_that_fails_is_a_failed_one_there(tmp_path, fake, caplog):
    (tmp_path / "wandb.json").write_text("damaged")
    with pytest.raises(train.NotFinite), tracking.tracking(tiny("mlp", **KEYS), tmp_path):
        raise train.NotFinite
    assert fake("code") == [1]
    with tracking.tracking(tiny("mlp", **KEYS), tmp_path) as tracker:
        assert tracker is not None
        tracker.picture(5, "drawn", np.zeros((4, 6, 3), np.uint8))
        tracker.write(6, {"train/loss": math.inf})
    assert fake("values") == [(5, {"drawn": [6, 4]}), (6, {"train/loss": math.inf})]
    assert fake("init")[0]["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert "wandb.json is not JSON" in caplog.text


def test_without_it_or_with_a_wrong_name_a_run_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with pytest.raises(InputError, match=r"log\.wandb=team/proj: wandb is not installed.*pip install wandb"):
        train.run(tiny("mlp", steps=4, **KEYS), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"log\.wandb is 'a/b/c'; give PROJECT or ENTITY/PROJECT"):
        tiny("mlp", **KEYS | {"log__wandb": "a/b/c"})


def history(path: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Metrics by step, from a .wandb file: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = path.read_bytes(), 7, [], {}
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no room for a header: the next block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record, parts = wandb_internal_pb2.Record.FromString(b"".join(parts)), []
            if record.WhichOneof("record_type") == "history":
                pairs = [
                    (each.key or "/".join(each.nested_key), each.value_json) for each in record.history.item
                ]
                items = {key: json.loads(value) for key, value in pairs}
                found.setdefault(int(items["_step"]), {}).update(items)
    return found


@pytest.mark.slow
def test_the_real_one_offline_has_the_same_metrics_under_one_id(tmp_path):
    pytest.importorskip("wandb")
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": ""}
    for steps in (4, 8):
        flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in KEYS.items()]
        flags += [f"--config.steps={steps}", "--config.model.widths=16", "--config.batch_size=8"]
        flags += [f"--workdir={tmp_path}/run"]
        done = run_script("train.py", "--config=configs/mlp.py", *flags, env=env, limit_s=300)
        assert done.code == 0, done.err
        assert "offline" in done.out
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    run_id = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert {path.stem for path in files} == {f"run-{run_id}"}
    logged: dict[int, dict[str, Any]] = {}
    for path in files:
        logged |= history(path)
    for step, values in plain(rows(tmp_path / "run")):
        for name, value in values.items():
            assert value is not None
            assert math.isclose(logged[step][name], value, rel_tol=1e-12)
