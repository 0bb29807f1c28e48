"""Weights & Biases (`log.wandb`): what it gets, and that it cannot end a run."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import types
from typing import Any

import pytest
from conftest import run_script, tiny

from bigmodel import train
from bigmodel.config import InputError
from bigmodel.training import tracking

KEYS: dict[str, Any] = {
    "data__name": "digits", "eval__every_steps": 4, "eval__batches": 1, "log__every_steps": 2,
    "log__wandb": "team/proj",
}  # fmt: skip


class FakeRun:
    """Records what it gets; `step` is where a resumed run stands."""

    offline, url = False, "https://wandb.example/run"

    def __init__(self, step: int = 0, fails_at: int = -1) -> None:
        self.step, self.fails_at = step, fails_at
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.codes: list[int] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise RuntimeError("the service\nis gone")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def fake(monkeypatch: pytest.MonkeyPatch, run: FakeRun) -> dict[str, Any]:
    """Puts a module in place of wandb. -> what `init` was called with."""
    module, given = types.ModuleType("wandb"), {}

    def init(**keys: Any) -> FakeRun:
        given.update(keys)
        if run.fails_at == 0:
            raise ConnectionError("no network")
        return run

    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return given


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def plain(found: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(row["step"], {k: v for k, v in row.items() if k not in ("step", "time")}) for row in found]


def test_it_gets_the_metrics_of_the_log_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    first = FakeRun()
    given = fake(monkeypatch, first)
    train.run(tiny("mlp", steps=4, **KEYS), tmp_path / "run")
    assert first.logged == plain(rows(tmp_path / "run"))
    assert first.codes == [0]
    assert (given["entity"], given["project"], given["resume"]) == ("team", "proj", "allow")
    assert given["config"] == json.loads((tmp_path / "run" / "config.json").read_text())
    second = FakeRun(step=7)  # what step 6 logged is there already
    again = fake(monkeypatch, second)
    train.run(tiny("mlp", steps=8, **KEYS), tmp_path / "run")
    assert again["id"] == given["id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert second.logged == [each for each in plain(rows(tmp_path / "run")) if each[0] >= 7]


def test_a_fault_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    fake(monkeypatch, FakeRun(fails_at=2))
    assert train.run(tiny("mlp", steps=4, **KEYS), tmp_path / "run").exit_code == 0
    (warning,) = [
        line for line in capsys.readouterr().out.splitlines() if "log.wandb" in line and "fail" in line
    ]
    assert (
        "warning: log.wandb: log failed (RuntimeError: the service is gone); the run goes on without it"
        in warning
    )


def test_a_start_that_fails_and_a_damaged_id_are_warnings(tmp_path, monkeypatch, caplog):
    given = fake(monkeypatch, FakeRun(fails_at=0))
    (tmp_path / "wandb.json").write_text("damaged")
    with tracking.tracking(tiny("mlp", **KEYS), tmp_path) as tracker:
        assert tracker is not None
        tracker.write(2, {"train/loss": math.nan})
    assert given["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    first, second = (each.getMessage() for each in caplog.records)
    assert "wandb.json is not JSON" in first
    assert "start failed (ConnectionError: no network)" in second


def test_a_run_that_fails_is_a_failed_one_there(tmp_path, monkeypatch):
    run = FakeRun()
    fake(monkeypatch, run)
    with pytest.raises(train.NotFinite), tracking.tracking(tiny("mlp", **KEYS), tmp_path):
        raise train.NotFinite
    assert run.codes == [1]


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
