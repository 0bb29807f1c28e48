"""Studies: what they try, what it costs, and that killing one changes nothing."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, run_script, start_script

from bigmodel import units
from bigmodel.config import InputError
from bigmodel.study import compare, overhead, price, trials
from bigmodel.study.order import Definition
from bigmodel.study.runner import Runner
from bigmodel.study.sweep import Study

Command = Callable[[dict[str, str]], list[str]]

# Trains nothing: its loss is (x - 0.3)^2 at once, or on a way there of several evaluations.
FAKE = """
import json, os, pathlib, signal, sys, time
flags = dict(item.removeprefix("--config.").lstrip("-").split("=", 1) for item in sys.argv[1:])
directory = pathlib.Path(flags["workdir"])
with (directory.parent / "starts.txt").open("a") as file:
    file.write(directory.name + "\\n")
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
x, evaluations = float(flags["x"]), int(flags.get("evaluations", 1))
if x > 90:
    sys.exit(3)
if x > 80:
    sys.exit(2)
done = 0
if (directory / "metrics.jsonl").exists():
    done = len((directory / "metrics.jsonl").read_text().splitlines())
for step in range(done + 1, evaluations + 1):
    time.sleep(float(flags.get("sleep", 0)))
    loss = (x - 0.3) ** 2 + 1 / step - 1 / evaluations
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "eval/test/loss": loss}) + "\\n")
ledger = {"total_s": 10.0, "model_flops": 1e9}
(directory / "ledger.json").write_text(json.dumps(ledger))
"""


def fake(tmp_path: pathlib.Path, *flags: str) -> Command:
    (tmp_path / "fake.py").write_text(FAKE)
    command = [sys.executable, str(tmp_path / "fake.py"), *flags]
    return lambda settings: [*command, *(f"--config.{key}={value}" for key, value in settings.items())]


def study(path: pathlib.Path, over: list[str], **keys: Any) -> Study:
    definition = Definition("configs/mlp.py", (), "eval/test/loss", False, **keys)
    return Study(path / "study", definition, trials.parse(over))


def priced(settings: dict[str, str]) -> price.Price:
    return {"total_s": 9.0, "total_flops": 1e9, "dollars": 0.9}


def run(path: pathlib.Path, over: list[str], command: Command, count: int = 0, **keys: object) -> Study:
    made = study(path, over, **{k: v for k, v in keys.items() if k in ("sampler", "prune")})
    if not keys.get("sampler"):
        made.enqueue(made.space.grid())
    options = {k: v for k, v in keys.items() if k in ("jobs", "cap")}
    Runner(made, command, priced, count=count, **options).run()
    return made


def best(made: Study) -> str:
    return made.study.best_trial.user_attrs["settings"]["x"]


def starts(path: pathlib.Path) -> list[str]:
    return (path / "study" / "starts.txt").read_text().split()


# ------------------------------------------------------------------------------------------ what is tried


def test_values_ranges_and_counts_are_read():
    space = trials.parse(["optim.lr=5e-3,1e-2", "seed=0:3", "model.widths=[4,8],[16]"])
    assert space.values == {
        "optim.lr": ("5e-3", "1e-2"),
        "seed": ("0", "1", "2"),
        "model.widths": ("[4,8]", "[16]"),
    }
    assert len(space.grid()) == 12
    assert space.grid()[1] == {"optim.lr": "5e-3", "seed": "0", "model.widths": "[16]"}
    ranges = trials.parse(["optim.lr=1e-4..1e-1", "model.depth=2..8"]).ranges
    assert ranges["optim.lr"].log
    assert not ranges["optim.lr"].integer
    assert ranges["model.depth"] == trials.Range(2, 8, True)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["lr"], "give KEY=VALUE"), (["a=1", "a=2"], "given twice"), (["a=1,1"], "one twice"),
        (["a=3:3"], "has no numbers"), (["a=2..1"], "larger than the first"), (["a=x..1"], "two numbers"),
    ],
)  # fmt: skip
def test_bad_values_are_named(over, message):
    with pytest.raises(InputError, match=message):
        trials.parse(over)


def test_names_are_directories_and_differ():
    grid = trials.parse(["a.lr=1,2", "b.lr=1,2", "data.name=text:/x/y.txt,digits"]).grid()
    names = [trials.name(each) for each in grid]
    assert len(set(names)) == 8
    assert not any("/" in name or len(name) > 120 for name in names)


def test_a_configs_own_values_can_be_given_as_flags():
    (settings,) = trials.of_config([{"model.widths": (4, 8), "optim.nesterov": True, "optim.lr": 1e-3}])
    assert settings == {"model.widths": "[4,8]", "optim.nesterov": "true", "optim.lr": "0.001"}


# ---------------------------------------------------------------------------------------------- the price


def test_programs_that_differ_in_numbers_alone_are_compiled_once():
    from bigmodel import config as config_lib

    pricer = price.Pricer(calibrated=False)
    base = ["model.widths=[8]", "batch_size=8", "steps=10"]
    receipts = [
        pricer.receipt(config_lib.load("configs/mlp.py:data=digits", [*base, *more]))
        for more in (["optim.lr=1e-3"], ["optim.lr=3e-2"], ["seed=5"], ["steps=20"])
    ]
    assert pricer.compilations == 1
    flops = [r["total_flops"] for r in receipts]
    assert flops == [flops[0], flops[0], flops[0], 2 * flops[0]]
    wider = pricer.receipt(config_lib.load("configs/mlp.py:data=digits", [*base, "model.widths=[16]"]))
    assert pricer.compilations == 2
    assert wider["total_flops"] > flops[0]


def test_the_cap_is_kept_within_a_trials_price(tmp_path):
    cap = units.cap("35s")  # each is planned at 9 s and takes 10
    made = study(tmp_path, ["x=0:8"])
    made.enqueue(made.space.grid())
    runner = Runner(made, fake(tmp_path), priced, cap=cap)
    runner.run()
    assert len(starts(tmp_path)) == 3
    assert runner.spent()["total_s"] == 30
    assert runner.unpaid == "x=3"
    Runner(made, fake(tmp_path), priced, cap=units.cap("100s")).run()
    assert starts(tmp_path) == [f"x={i}" for i in range(8)]


def test_a_trial_that_goes_on_is_charged_once_and_one_of_another_host_is_charged(tmp_path):
    made = study(tmp_path, ["x=0:2"])
    made.enqueue(made.space.grid())
    runner = Runner(made, fake(tmp_path), priced)
    assert runner.committed("x=0") == {"dollars": 0.9, "total_flops": 1e9, "total_s": 9.0}
    trial = made.next_trial(0)  # as another host would: it runs, and has a part of its ledger
    trial.set_user_attr("owner", {"host": "another", "pid": 1, "time": time.time()})
    (tmp_path / "study" / "x=0").mkdir()
    (tmp_path / "study" / "x=0" / "ledger.json").write_text(json.dumps({"total_s": 4.0, "model_flops": 4e8}))
    assert runner.spent()["total_s"] == 4
    assert runner.committed("x=0")["total_s"] == 9
    assert runner.committed("x=1")["total_s"] == 18


def test_energy_is_counted_as_the_plan_counts_it(tmp_path):
    (tmp_path / "ledger.json").write_text(json.dumps({"total_s": 4.0, "model_flops": 1.0, "joules": 3.6e6}))
    planned = {"total_s": 8.0, "kwh": 5.0, "dollars": 6.0}
    assert price.spent(tmp_path, planned, 1.5) == {
        "total_s": 4.0,
        "total_flops": 1.0,
        "kwh": 1.5,
        "dollars": 3.0,
    }


# A run that starts in 7 s, and whose evaluations take 5 s (the first, which compiles) and 2 s.
PROBED = """
import json, pathlib, signal, sys, time
flags = dict(item.removeprefix("--config.").lstrip("-").split("=", 1) for item in sys.argv[1:])
assert flags["eval.every_steps"] == "1"
directory = pathlib.Path(flags["workdir"])
directory.mkdir()
times = [(1, 100.0, 105.0), (2, 106.0, 108.0)]
rows = [row for step, begun, done in times for row in (
    {"step": step, "time": begun, "perf/step_time_s": 1.0},
    {"step": step, "time": done, "eval/test/loss": 1.0})]
seconds = {"step": 2.0, "input": 0.5, "eval": 7.0}
(directory / "ledger.json").write_text(json.dumps({"total_s": 16.5, "seconds": seconds}))
(directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(flags["code"])))
time.sleep(60)
"""


@pytest.mark.parametrize("code", ["75", "3"])  # stopped by the probe, or diverged meanwhile
def test_what_a_run_takes_beyond_its_steps_is_measured(tmp_path, monkeypatch, code):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "probed.py").write_text(PROBED)
    command = [sys.executable, str(tmp_path / "probed.py"), f"--config.code={code}"]
    found = overhead.measure(command, "key")
    assert found == overhead.Overhead(fixed_s=16.5 - 2.5 - 2 * 2.0, evaluation_s=2.0)
    assert found.of(steps=100, every_steps=40) == 10.0 + 3 * 2.0  # at 40, 80 and the end
    (tmp_path / "probed.py").unlink()
    assert overhead.measure(command, "key") == found  # an hour long it is not measured again


def test_a_probe_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "failing.py").write_text("import sys; print('error: no data'); sys.exit(2)")
    with pytest.raises(InputError, match="exit code 2: error: no data"):
        overhead.measure([sys.executable, str(tmp_path / "failing.py")], "key")


def test_an_overhead_adds_seconds_and_what_is_counted_by_the_second():
    price_of_steps = {"total_s": 10.0, "total_flops": 1e9, "dollars": 2.0, "kwh": 0.5}
    assert overhead.with_overhead(price_of_steps, 5.0) == {
        "total_s": 15.0, "total_flops": 1e9, "dollars": 3.0, "kwh": 0.75,
    }  # fmt: skip
    known = {1.0: overhead.Overhead(10.0, 1.0), 3.0: overhead.Overhead(20.0, 3.0)}
    assert overhead.between(2.0, known) == overhead.Overhead(15.0, 2.0)
    assert overhead.between(9.0, known) == overhead.Overhead(20.0, 3.0)  # not beyond what was measured
    assert overhead.spread([5.0, 1.0, 3.0, 2.0]) == [1, 2, 0]


# ------------------------------------------------------------------------------------------------ the run


def test_a_grid_runs_once_and_a_second_command_runs_nothing(tmp_path):
    made = run(tmp_path, ["x=0,0.25,1"], fake(tmp_path), jobs=2)
    assert {row.name: row.state for row in made.rows()} == dict.fromkeys(("x=0", "x=0.25", "x=1"), "complete")
    assert best(made) == "0.25"
    run(tmp_path, ["x=0,0.25,1"], fake(tmp_path))
    assert sorted(starts(tmp_path)) == ["x=0", "x=0.25", "x=1"]
    run(tmp_path, ["x=0,0.25,1,2"], fake(tmp_path))  # one was added
    assert len(starts(tmp_path)) == 4


def test_runs_that_diverge_or_fail_do_not_end_the_study(tmp_path):
    made = run(tmp_path, ["x=1,85,95"], fake(tmp_path))
    assert {row.settings["x"]: row.state for row in made.rows()} == {
        "1": "complete",
        "85": "failed",
        "95": "diverged",
    }
    assert best(made) == "1"
    assert [value for _, value in made.results()] == [pytest.approx(0.49), math.inf]


def test_a_metric_that_no_run_has_ends_the_study_at_its_first_trial(tmp_path):
    made = Study(tmp_path / "study", Definition("c", (), "eval/test/lost", False), trials.parse(["x=0,1"]))
    made.enqueue(made.space.grid())
    with pytest.raises(InputError, match="x=0 has no eval/test/lost, but eval/test/loss"):
        Runner(made, fake(tmp_path), priced).run()
    assert starts(tmp_path) == ["x=0"]


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.slow)])
def test_a_search_cut_into_pieces_is_the_straight_one(tmp_path, sampler):
    straight = run(tmp_path / "a", ["x=0..1.0"], fake(tmp_path), 6, sampler=sampler)
    for count in (2, 3, 6):
        pieces = run(tmp_path / "b", ["x=0..1.0"], fake(tmp_path), count, sampler=sampler)
    assert [row.settings for row in pieces.rows()] == [row.settings for row in straight.rows()]
    assert [row.value for row in pieces.rows()] == [row.value for row in straight.rows()]
    assert len({row.settings["x"] for row in straight.rows()}) == 6


@pytest.mark.parametrize("prune", ["median", pytest.param("halving", marks=pytest.mark.slow)])
def test_bad_trials_are_stopped_early_and_the_best_is_not(tmp_path, prune):
    command = fake(tmp_path, "--config.evaluations=8", "--config.sleep=0.12")
    made = run(tmp_path, ["x=0.3,0.5,0.4,0.6,5,6,7"], command, prune=prune)
    states = {row.settings["x"]: row.state for row in made.rows()}
    assert states["0.3"] == "complete"
    assert "pruned" in (states["5"], states["6"], states["7"])
    assert best(made) == "0.3"


def test_another_study_in_the_same_directory_is_refused(tmp_path):
    study(tmp_path, ["x=0,1"])
    with pytest.raises(InputError, match="is a study with sampler '', not 'tpe'"):
        study(tmp_path, ["x=0,1"], sampler="tpe")
    study(tmp_path / "b", ["x=0..1.0"], sampler="tpe", space=("x=0..1.0",))
    with pytest.raises(InputError, match="is a study with space"):
        study(tmp_path / "b", ["x=0..2.0"], sampler="tpe", space=("x=0..2.0",))
    with pytest.raises(InputError, match="--prune=nothing is unknown"):
        study(tmp_path, ["x=0,1"], prune="nothing")


HOST = """
import pathlib, sys
from bigmodel.study import order, runner, sweep, trials
path, storage, command = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
space = trials.parse(["x=0:5"])
definition = order.Definition("configs/mlp.py", (), "eval/test/loss", False)
study = sweep.Study(path, definition, space, storage)
study.enqueue(space.grid())
train = lambda settings: [*command, *(f"--config.{key}={value}" for key, value in settings.items())]
runner.Runner(study, train, lambda settings: {"total_s": 1.0}).run()
"""


@pytest.mark.fault
def test_a_study_killed_again_and_again_loses_nothing_and_runs_nothing_twice(tmp_path):
    command = fake(tmp_path, "--config.evaluations=6", "--config.sleep=0.15")
    host = [sys.executable, "-c", HOST, str(tmp_path / "study"), "", *command({})]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(host, env=env, stdout=subprocess.DEVNULL)
        time.sleep(1.5 + rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(host, env=env, check=True, stdout=subprocess.DEVNULL, timeout=60)
    for i in range(5):
        lines = (tmp_path / "study" / f"x={i}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # each evaluation once
    made = study(tmp_path, ["x=0:5"])
    assert [row.value for row in made.rows()] == pytest.approx([(i - 0.3) ** 2 for i in range(5)])
    assert [row.state for row in made.rows()] == ["complete"] * 5


# ---------------------------------------------------------------------------------------------- comparison


def test_seeds_are_one_setting_and_a_difference_needs_its_test():
    rng = np.random.default_rng(1)
    results = [
        ({"lr": lr, "seed": str(s)}, mean + 0.01 * rng.normal())
        for lr, mean in (("1", 1.0), ("2", 1.002), ("3", 1.2))
        for s in range(5)
    ]
    best, near, far = compare.groups(results)
    assert (best.settings, far.settings) in [({"lr": "1"}, {"lr": "3"}), ({"lr": "2"}, {"lr": "3"})]
    assert near.p is not None
    assert far.p is not None
    assert near.p > 0.05 > far.p
    low, high = best.interval
    assert low < best.mean < high
    assert "is not shown to differ" in compare.table([best, near, far], "loss")[2]


def test_a_false_difference_is_rare():
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(200):
        results = [({"lr": str(k), "seed": str(s)}, rng.normal()) for k in range(4) for s in range(4)]
        false += any(g.p is not None and g.p < 0.05 for g in compare.groups(results))
    assert false / 200 < 0.2  # the best of four is picked, so a little above 5 %


def test_diverged_runs_do_not_hide_a_setting():
    found = compare.groups([({"lr": "1"}, 2.0), ({"lr": "9"}, float("inf"))])
    assert [g.settings["lr"] for g in found] == ["1", "9"]


# ---------------------------------------------------------------------------------------------- the command

TOY = [
    "--config=configs/mlp.py:data=digits", "--config.steps=4", "--config.model.widths=[4]",
    "--config.batch_size=8",
]  # fmt: skip


def test_a_dry_run_prices_every_trial_and_starts_none(tmp_path):
    over = ["--over=optim.lr=1e-3,1e-2", "--over=seed=0:2"]
    options = ["--dry_run", "--target=v5e:2x4", "--cap=1e3flop", f"--json={tmp_path / 'plan.json'}"]
    ran = run_script("sweep.py", *TOY, f"--study={tmp_path / 's'}", *over, *options)
    assert ran.code == 0, ran.err
    assert "lr=1e-2,seed=1" in ran.out
    assert "the cap does not pay for it" in ran.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["total"]["total_flops"] == pytest.approx(sum(row["total_flops"] for row in plan["trials"]))
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_study_of_real_runs_goes_on_after_sigterm(tmp_path):
    args = ("sweep.py", *TOY, f"--study={tmp_path / 's'}", "--over=seed=0:3", f"--json={tmp_path / 'r.json'}")
    process = start_script(*args)
    while not list((tmp_path / "s").glob("seed=1/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (0, 75)
    ran = run_script(*args, limit_s=300)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete"] * 3
    assert len(found["groups"][0]["values"]) == 3
    for seed in range(3):
        ledger = json.loads((tmp_path / "s" / f"seed={seed}" / "ledger.json").read_text())
        assert ledger["steps"] == 4
    assert "3 runs, ranked by eval/test/loss" in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--over=optim.lr=1e-4..1e-1"], "is for --search=tpe:40"), (["--search=tpe"], "give tpe:N"),
        (["--over=optim.lr=1,x"], "trial optim.lr=x"), (["--over=seed=0:2", "--cap=5"], "--cap=5"),
        (["--over=seed=0:2", "--metric=eval/tset/loss"], "--metric=eval/tset/loss"),
        (["--over=seed=0:2", "--jobs=0"], "--jobs=0"),
        (["--over=seed=0:2", "--target=v5e:2x4"], "goes with --dry_run"),
    ],
)  # fmt: skip
def test_bad_commands_are_one_line(tmp_path, flags, message):
    ran = run_script("sweep.py", *TOY, f"--study={tmp_path / 's'}", *flags)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
