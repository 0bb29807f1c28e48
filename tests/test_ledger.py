"""The ledger while a run goes on: joules by the machine's counters, the memory of the process."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import build, tiny

from bigmodel import ledger as ledger_lib
from bigmodel import log, train, units
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import InputError
from bigmodel.ledger import Ledger
from bigmodel.machines import energy
from bigmodel.machines.memory import ProcessMemory
from bigmodel.plan import receipt
from bigmodel.training.spending import Spending


@pytest.fixture
def rapl(tmp_path):
    """Two CPU packages; the first has a part of its own, which must not count twice."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("5000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
    return tmp_path


def test_a_meter_adds_packages_and_survives_a_counter_that_starts_anew(rapl):
    meter = energy.Meter(jax.devices()[:1], rapl)
    assert meter.joules() == 0
    (rapl / "intel-rapl:0/energy_uj").write_text("90000000")
    (rapl / "intel-rapl:0:0/energy_uj").write_text("70000000")
    assert meter.joules() == pytest.approx(85)
    (rapl / "intel-rapl:0/energy_uj").write_text("2000000")
    (rapl / "intel-rapl:1/energy_uj").write_text("6000000")
    assert meter.joules() == pytest.approx(85 + 12 + 1)


def test_without_a_counter_there_are_no_joules(tmp_path):
    assert energy.Meter(jax.devices()[:1], tmp_path).joules() is None


def test_a_run_s_joules_are_counted_or_modelled_and_say_so(rapl, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "nothing")
    ledger = Ledger()
    ledger.watch(jax.devices()[:1])
    ledger.steps, ledger.seconds["step"] = 10, 5.0
    watts, _ = energy.watts(jax.devices()[:1])
    report = ledger.report(1.0)
    assert report["step_j"] == pytest.approx(watts * 0.5)
    assert report["joules_from"].startswith("modelled")

    monkeypatch.setattr(energy, "RAPL", rapl)
    ledger = Ledger()
    ledger.watch(jax.devices()[:1])
    ledger.steps = 10
    with ledger.timing("eval"):
        (rapl / "intel-rapl:0/energy_uj").write_text("15000000")
    (rapl / "intel-rapl:1/energy_uj").write_text("45000000")
    report = ledger.report(1.0)
    assert (report["joules"], report["step_j"]) == (pytest.approx(50), pytest.approx(4))
    assert report["joules_from"].startswith("measured")


def test_the_memory_that_a_process_takes_is_seen_and_what_it_held_before_is_not():
    before = np.ones(2**25)
    memory = ProcessMemory()
    memory.begin(allocated_bytes=0)
    taken = np.ones(2**25)  # 256 MiB, touched
    memory.end()
    assert memory.peak_bytes == pytest.approx(taken.nbytes, rel=0.05)
    assert before.sum() == taken.sum() == 2**25


def read(path: pathlib.Path, name: str) -> dict:
    return json.loads((path / name).read_text())


def test_the_ledger_and_the_plan_add_up_over_resumes(tmp_path):
    keys = {"log__tensorboard": False, "eval__batches": 1}
    for steps in (3, 5, 9):
        train.run(tiny("cnn", steps=steps, **keys), tmp_path)
        ledger, plan = read(tmp_path, "ledger.json"), read(tmp_path, "plan.json")
        assert (ledger["steps"], plan["steps"]) == (steps, steps)
    assert [each["steps"] for each in ledger["sessions"]] == [3, 2, 4]
    for name in ("total_s", "model_flops", "joules"):
        assert ledger[name] == pytest.approx(sum(each[name] for each in ledger["sessions"]))
    assert ledger["model_flops"] == 9 * plan["model_flops_per_step"]
    assert ledger["step_s"] == pytest.approx(ledger["seconds"]["step"] / 9)
    assert ledger["goodput"] == pytest.approx(ledger["seconds"]["step"] / ledger["total_s"])
    assert [each["first_step"] for each in plan["sessions"]] == [0, 3, 5]
    assert plan["total_flops"] == 9 * plan["model_flops_per_step"]
    assert plan["total_s"] == pytest.approx(sum(each["total_s"] for each in plan["sessions"]))


def test_a_session_that_stopped_early_counts_as_far_as_it_came():
    made = {
        "total_flops": 80.0,
        "total_s": 8.0,
        "total_s_range": [4.0, 16.0],
        "step_s": 1.0,
        "made_at": "now",
    }
    first = receipt.add_up({}, {"steps": 8, **made}, 0)
    # Killed after a checkpoint at 6, then twice as fast; a start that saved nothing does not count.
    second = {"steps": 2, "total_flops": 20.0, "total_s": 1.0, "total_s_range": [0.5, 2.0], "step_s": 0.5}
    for _ in range(2):
        both = receipt.add_up(first, second, 6)
        assert (both["steps"], both["total_flops"], both["total_s"]) == (8, 80.0, 6.0 + 1.0)
        assert both["total_s_range"] == [3.5, 14.0]
        first = both


def test_an_old_ledger_is_a_session_and_damage_is_none():
    session = {"steps": 2, "total_s": 1.0, "seconds": {"step": 0.5}, "model_flops": 10.0}
    assert ledger_lib.add_up(session, session)["steps"] == 4
    for damage in ({"steps": "x"}, {"sessions": [3, None, {"steps": 1}]}, {"sessions": [], "steps": 9}):
        assert ledger_lib.add_up(damage, session)["steps"] == 2


# ------------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize(
    ("text", "key", "amount"),
    [("2h", "total_s", 7200), ("90min", "total_s", 5400), ("512chip-hours", "chip_hours", 512),
     ("$50", "dollars", 50), ("3kWh", "kwh", 3), ("1e18flop", "total_flops", 1e18),
     (1e18, "total_flops", 1e18)],
)  # fmt: skip
def test_caps_are_read(text, key, amount):
    assert (cap := units.cap(text))
    assert (cap.key, cap.amount) == (key, amount)


@pytest.mark.parametrize("text", ["2 weeks", "-1h", "$", "$-3", "0h", "1e999flop", "2", -1.0])
def test_bad_caps_are_refused(text):
    with pytest.raises(ValueError, match="such as 2h"):
        units.cap(text)


# A second costs one of each.
PRICED = {"assume__dollars_per_chip_hour": 3600.0, "assume__watts": 3.6e6, "assume__pue": 1.0}


@pytest.mark.parametrize("budget", ["10000s", "$10000", "10000kwh", "2.77778chip-hours"])
def test_a_budget_counts_all_sessions_and_what_the_end_takes(budget, monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path / "nothing")
    config = tiny("cnn", budget=budget, **PRICED)
    mesh = build(config).mesh
    spending = Spending(config, {"total_s": 4000.0}, Ledger(), mesh)
    assert spending.spent() == pytest.approx(spending.cap.amount * 0.4, rel=0.01)
    assert not spending.is_spent(5900.0)
    assert spending.is_spent(6100.0)
    spending.evaluated = 3  # takes as long as a step
    assert not spending.is_spent(2900.0)
    assert spending.is_spent(3100.0)
    spending.ending_s = 3000.0
    assert not spending.is_spent(2900.0)
    assert spending.is_spent(3100.0)
    earlier = {"total_s": 1.0, spending.cap.key: spending.cap.amount * 0.9}  # on dearer chips
    assert not Spending(config, earlier, Ledger(), mesh).is_spent(900.0)
    assert Spending(config, earlier, Ledger(), mesh).is_spent(1100.0)


def test_measured_joules_count_and_not_the_assumed_watts(rapl, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", rapl)
    ledger, config = Ledger(), tiny("cnn", budget="1kwh", assume__pue=2.0)
    ledger.watch(jax.devices()[:1])
    (rapl / "intel-rapl:0/energy_uj").write_text(str(5000000 + 90_000_000))
    assert Spending(config, {}, ledger, build(config).mesh).spent() == pytest.approx(2 * 90 / 3.6e6)


@pytest.mark.parametrize(("budget", "key"), [("$5", "assume.dollars_per_chip_hour"), ("5 weeks", "budget")])
def test_a_price_that_is_not_known_is_named(budget, key, tmp_path):
    with pytest.raises(InputError, match=key):
        train.run(tiny("cnn", data__name="digits", budget=budget), tmp_path)


def test_a_run_ends_where_its_budget_does_and_a_resumed_one_has_what_is_left(tmp_path, capsys):
    keys = {"data__name": "digits", "eval__batches": 1, "log__tensorboard": False}
    config = tiny("cnn", budget="60min", assume__dollars_per_chip_hour=1.0, **keys)
    stop = [lambda event: True]  # at the first line of the log
    first = train.run(config, tmp_path, callbacks=stop)
    assert first.program.config.steps > 1000  # planned by the time that a step takes
    spent = read(tmp_path, "ledger.json")
    assert spent["dollars"] == pytest.approx(spent["total_s"] * first.program.mesh.size / 3600)
    later = {**spent["sessions"][0], "total_s": 3600 - 1.2 * spent["total_s"]}  # as if it had gone on
    (tmp_path / "ledger.json").write_text(json.dumps(ledger_lib.add_up({}, later)))
    second = train.run(config, tmp_path)
    said = capsys.readouterr().out
    assert (second.exit_code, second.step > first.step) == (0, True)
    assert second.program.config.steps == first.program.config.steps  # the schedule is as it was
    assert f"60min is spent at step {second.step:,}" in said
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == second.step
    third = train.run(config, tmp_path)
    assert third.step == second.step
    assert "raise budget to go on" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- lost work


def session(first: int, last: int, **keys: object) -> dict:
    """A session that spent a second a step, and two seconds otherwise."""
    steps, seconds = last - first, {"step": float(last - first), "start": 2.0}
    total = sum(seconds.values())
    return {
        "began_at": 1000.0, "total_s": total, "seconds": seconds, "steps": steps, "model_flops": 5.0 * steps,
        "redone_steps": 0, "first_step": first, "last_step": last, "dollars": 0.5 * total, "step_s": 1.0,
        "goodput": steps / total, **keys,
    }  # fmt: skip


def added(*sessions: dict) -> dict:
    return ledger_lib.add_up({"sessions": list(sessions[:-1])}, sessions[-1])


def check_parts(ledger: dict) -> None:
    """All time is in one bucket, and its price with it."""
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["total_s"])
    assert sum(part["share"] for part in ledger["parts"].values()) == pytest.approx(1)
    assert sum(part["dollars"] for part in ledger["parts"].values()) == pytest.approx(ledger["dollars"])
    workload = ledger["workload"]
    badput = [s for s in workload["badput_time"].values() if not isinstance(s, dict)]
    badput += workload["badput_time"]["CUSTOM_BADPUT_EVENTS"].values()
    assert sum(badput) + workload["goodput_time"]["TOTAL"] == pytest.approx(ledger["total_s"])


def test_steps_after_the_checkpoint_are_wasted_in_each_session_that_made_them():
    ledger = ledger_lib.lose(added(session(0, 10, ended="done"), session(8, 20, ended="75")), 6)
    check_parts(ledger)
    assert ledger["seconds"] == {"step": 6.0, "start": 4.0, "wasted": 16.0}
    assert (ledger["steps"], ledger["redone_steps"], ledger["step_s"]) == (22, 16, 1.0)
    assert ledger["goodput"] == pytest.approx(6 / 26)
    assert ledger_lib.lose(ledger, 6) == ledger  # the next start finds it so
    assert ledger_lib.lose(added(session(0, 10, ended="done")), 10)["seconds"].get("wasted", 0) == 0


def test_a_killed_session_also_spent_what_came_after_its_last_ledger():
    ledger = ledger_lib.lose(added(session(0, 10)), 10, died=(1000.0 + 12 + 3, 13))
    check_parts(ledger)
    assert (ledger["total_s"], ledger["seconds"]["wasted"]) == (15, 3)
    assert (ledger["steps"], ledger["redone_steps"], ledger["model_flops"]) == (13, 3, 65)
    assert ledger["dollars"] == pytest.approx(7.5)
    clean = added(session(0, 10, ended="done"))
    assert ledger_lib.lose(clean, 10, died=(2000.0, 10))["total_s"] == 12


def test_a_rewind_wastes_this_session_s_steps_and_then_those_before():
    ledger = Ledger(waited_s=3.0, started_s=2.0)
    ledger.steps, ledger.seconds["step"] = 8, 16.0
    assert ledger.waste(2) == 0
    assert (ledger.seconds["step"], ledger.seconds["wasted"]) == (12, 4)
    assert ledger.waste(9) == 3
    report = ledger.report(1.0)
    assert (report["redone_steps"], report["step_s"], report["seconds"]["wasted"]) == (8, None, 16)
    assert (report["seconds"]["waiting"], report["seconds"]["start"]) == (3, 2)
    assert report["total_s"] > 5


def test_a_run_that_is_killed_has_each_second_in_one_bucket(tmp_path):
    """An error between two checkpoints, then the rest."""
    config = tiny(
        "cnn", steps=30, checkpoint__every_steps=10, log__every_steps=1, eval__batches=1,
        log__tensorboard=False, log__maxtext_names=True,
    )  # fmt: skip

    def fail(event: train.Event) -> None:
        if event.kind == "log" and event.step == 17:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train.run(config, tmp_path, callbacks=[fail])
    train.run(config, tmp_path)
    ledger = read(tmp_path, "ledger.json")
    assert (ledger["steps"], ledger["redone_steps"]) == (37, 7)
    assert [(each["first_step"], each["last_step"]) for each in ledger["sessions"]] == [(0, 10), (10, 30)]
    assert ledger["workload"]["max_productive_step"] == 30
    assert ledger["workload"]["disruption_count"] == 1
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["total_s"], abs=1e-3)
    rows = [row for row in train_rows(tmp_path) if row["step"] > 20]
    for row in rows:
        assert row["learning/loss"] == row["train/loss"]
        assert 0 < row["goodput"] == row["perf/goodput"] < 1
        tflops = row["perf/per_device_tflops_per_sec"] * row["perf/step_time_seconds"]
        assert tflops == pytest.approx(row["perf/per_device_tflops"])


def train_rows(path: pathlib.Path) -> list[dict]:
    return [row for row in log.read_metrics(path) if "train/loss" in row]
