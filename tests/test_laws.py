"""Scaling laws: known ones are found again, intervals hold as often as they say, real runs are predicted."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
from conftest import ROOT, run_script, tiny

from bigmodel import workdir
from bigmodel.config import InputError
from bigmodel.study import curves, isoflop, laws, points
from bigmodel.study.laws import PUBLISHED, Law, Settings
from bigmodel.study.points import Columns, Run

REAL = ROOT / "tests" / "data" / "scaling_runs.csv"  # its first line has the source
NAMES = ("E", "A", "B", "alpha", "beta")
QUICK = Settings(resamples=200)


def grid(sizes: int = 5, ratios: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Params 1e7 to 1e9, and 5 to 320 tokens for each."""
    params, ratio = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(5, 320, ratios))
    return params.ravel(), (params * ratio).ravel()


def runs_of(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> list[Run]:
    rows = enumerate(zip(params, tokens, loss, strict=True))
    return [Run(f"run {i}", n, d, value, 6 * n * d, "", {}) for i, (n, d, value) in rows]


def made_by(law: Law, noise: float = 0.0, seed: int = 0) -> list[Run]:
    params, tokens = grid()
    loss = laws.predict(law, params, tokens)[0]
    return runs_of(
        params, tokens, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_law_is_found_again_from_its_own_points(name):
    law, truth = laws.fit(made_by(PUBLISHED[name]), [], QUICK), PUBLISHED[name].coefficients
    assert law.about["form"] == "chinchilla"
    for key in NAMES:
        assert law.coefficients[key] == pytest.approx(truth[key], rel=1e-3)
    assert law.about["frontier"]["params_exponent"] == pytest.approx(
        truth["beta"] / (truth["alpha"] + truth["beta"]), abs=1e-4
    )


def test_units_and_order_do_not_change_a_fit():
    runs = made_by(PUBLISHED["hoffmann2022"], noise=0.01)
    settings = Settings(form="chinchilla", resamples=100)
    one = laws.fit(runs, [], settings).coefficients
    millions = [Run(r.name, r.params / 1e6, r.tokens, r.loss, r.flops, "", {}) for r in reversed(runs)]
    other = laws.fit(millions, [], settings).coefficients
    other["A"] *= 1e6 ** other["alpha"]
    for key in NAMES:
        assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_a_few_wrong_runs_move_a_law_little_and_are_named():
    runs = made_by(PUBLISHED["hoffmann2022"], noise=0.002)
    wrong = [Run("broken", 1e8, 2e9, 2 * runs[0].loss, 1.2e18, "", {})]
    law = laws.fit(runs + wrong, [], Settings(form="chinchilla", resamples=100))
    assert law.coefficients["alpha"] == pytest.approx(0.34, abs=0.03)
    assert [each["run"] for each in law.about["outliers"]] == ["broken"]
    assert law.about["runs"] == len(runs) + 1  # it is named, not dropped


def test_equal_exponents_and_overtraining_are_found_where_they_are():
    equal = laws.fit(made_by(PUBLISHED["besiroglu2024"], noise=0.01), [], QUICK)
    assert equal.about["form"] == "gadre"  # 0.348 and 0.366 are one to 35 such runs
    assert equal.coefficients["alpha"] == equal.coefficients["beta"]
    theta = PUBLISHED["hoffmann2022"].theta.copy()
    theta[5:] = math.log(0.02), 0.6
    over = laws.fit(made_by(Law(theta), noise=0.002), [], QUICK)
    assert over.about["form"] == "overtrained"
    assert over.intervals["gamma"][0] < 0.6 < over.intervals["gamma"][1]
    assert over.coefficients["F"] == pytest.approx(0.02, rel=0.5)
    assert laws.optimal(over, 1e21).tokens < laws.optimal(PUBLISHED["hoffmann2022"], 1e21).tokens


def test_runs_that_show_no_remaining_loss_say_so():
    theta = np.array([-40.0, math.log(30), math.log(60), 0.2, 0.2, -np.inf, 0.0])
    law = laws.fit(made_by(Law(theta), noise=0.002, seed=4), [], Settings(form="gadre", resamples=100))
    assert any("E is 0" in line for line in laws.lines("", law))
    low, high = law.intervals["E"]
    assert low < 1e-3  # the truth, 0, is not ruled out
    assert 1e-3 < high < 0.1  # nor is a little more
    assert not any(
        "E is 0" in line for line in laws.lines("", laws.fit(made_by(PUBLISHED["hoffmann2022"]), [], QUICK))
    )


def test_the_best_size_is_that_of_the_closed_form():
    for law in PUBLISHED.values():
        c = law.coefficients
        for flops in (1e18, 5.76e23):
            power = 1 / (c["alpha"] + c["beta"])
            by_hand = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** power * (flops / 6) ** (
                c["beta"] * power
            )
            best = laws.optimal(law, flops)
            assert best.params == pytest.approx(by_hand, rel=1e-5)
            assert 6 * best.params * best.tokens == pytest.approx(flops)
            assert math.isnan(best.low)  # no runs, no interval
    # Besiroglu et al.: about 20 tokens a parameter, as Chinchilla had; Hoffmann et al.'s own give more.
    ratios = {name: laws.optimal(law, 5.76e23) for name, law in PUBLISHED.items()}
    assert 15 < ratios["besiroglu2024"].tokens / ratios["besiroglu2024"].params < 25
    assert ratios["hoffmann2022"].tokens / ratios["hoffmann2022"].params > 60


def coverage(seeds: int, settings: Settings, name: str, noise: float) -> dict[str, float]:
    """Shares of the seeds in which the truth, and the loss of a run 10 times larger, lie in the interval."""
    truth, large = PUBLISHED[name], (np.array([1e10]), np.array([2e11]))
    inside = dict.fromkeys((*NAMES, "loss"), 0.0)
    for seed in range(seeds):
        law = laws.fit(made_by(truth, noise, seed), [], settings)
        for key in NAMES:
            low, high = law.intervals[key]
            inside[key] += (low <= truth.coefficients[key] <= high) / seeds
        _, low, high = laws.predict(law, *large)
        draw = math.exp(noise * np.random.default_rng(seeds + seed).standard_normal())
        inside["loss"] += float(low[0] <= laws.predict(truth, *large)[0][0] * draw <= high[0]) / seeds
    return inside


@pytest.mark.slow
def test_an_interval_of_90_percent_holds_in_about_90_of_100():
    found = coverage(100, Settings(form="chinchilla", resamples=200), "hoffmann2022", 0.01)
    assert all(0.8 <= share <= 0.98 for share in found.values()), found
    assert 0.8 <= coverage(100, QUICK, "besiroglu2024", 0.005)["loss"] <= 0.99  # chooses the form, too


def test_intervals_hold_for_a_few_seeds():
    found = coverage(6, Settings(form="chinchilla", resamples=200), "hoffmann2022", 0.01)
    assert min(found.values()) >= 0.5, found


def test_parabolas_are_exact_where_they_should_be_and_say_their_bias():
    symmetric = Law(np.array([math.log(1.7), math.log(400), math.log(400), 0.3, 0.3, -np.inf, 0.0]))
    budgets = np.geomspace(1e18, 1e21, 4).repeat(7)

    def through(law: Law, shift: float) -> dict[str, object]:
        best = np.array([laws.optimal(law, c).params for c in budgets])
        params = best * np.tile(np.geomspace(1 / 8, 8, 7), 4) * (budgets / 1e18) ** shift
        loss = laws.predict(law, params, budgets / 6 / params)[0]
        return isoflop.estimate(
            params, budgets / 6 / params, loss, budgets, lambda n, d: laws.predict(law, n, d)[0]
        )

    wide = through(PUBLISHED["hoffmann2022"], 0.0)  # alpha is not beta: even centered sizes shift the minimum
    assert wide["bias"]["params_exponent"] == pytest.approx(0.0, abs=1e-3)
    assert abs(wide["bias"]["params"]) > 0.02
    exact = through(symmetric, 0.0)
    assert exact["bias"]["params"] == pytest.approx(0.0, abs=2e-3)
    assert exact["params_exponent"] == pytest.approx(0.5, abs=1e-6)
    assert exact["warnings"] == []
    slanted = Law(np.array([math.log(1.7), math.log(4e4), math.log(100), 0.6, 0.2, -np.inf, 0.0]))
    drifting = through(slanted, 0.2)  # and the sizes lie ever more to the right of the minimum
    assert any(text.startswith("biased") for text in drifting["warnings"]), drifting["warnings"]
    assert any("one side" in text for text in drifting["warnings"])
    few = isoflop.estimate(*(np.ones(3) * x for x in (1e7, 1e9, 3.0, 6e16)), lambda n, d: n)
    assert few["warnings"][0].startswith("no exponent")


def test_workdirs_are_read_and_those_left_out_are_named(tmp_path):
    law = PUBLISHED["hoffmann2022"]
    config = tiny("gpt", steps=100)
    per_step, sizes = config.batch_size * config.seq_len, [10**5, 10**6, 10**7]
    for index, (size, scale) in enumerate([(n, k) for n in sizes for k in (1, 4, 16)]):
        loss = float(laws.predict(law, np.array([size]), np.array([100 * per_step * scale]))[0][0])
        directory = tmp_path / f"{index}"
        directory.mkdir()
        workdir.write_config(directory, config)
        plan = {
            "active_parameters": size,
            "tokens_per_step": per_step * scale,
            "model_flops_per_step": 1e9 * scale,
        }
        (directory / "plan.json").write_text(json.dumps(plan))
        rows = [{"step": 50, "eval/test/loss": 9.0}, {"step": 100, "eval/test/loss": loss}, {"step": 100}]
        rows = {7: rows[:1], 8: [{"step": 100, "eval/test/loss": None}]}.get(index, rows)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs, loss_name = points.read([str(tmp_path), str(tmp_path / "0")], Columns(by="data.name"))
    assert loss_name == "eval/test/loss"
    assert runs[1].params == 10**5
    assert runs[1].tokens == 400 * per_step
    assert runs[1].flops == 4e11
    assert {run.group for run in runs} == {config.data.name}
    chosen, left_out = points.usable(runs)
    assert len(chosen) == 7
    assert [each["why"] for each in left_out] == [
        "unfinished: step 50 of 100", "its loss is not finite", f"a duplicate of {tmp_path / '0'}",
    ]  # fmt: skip
    fitted = laws.fit(chosen, left_out, Settings(form="gadre", resamples=100))
    assert fitted.about["left_out"] == left_out
    assert len(laws.lines("", fitted)) > 5


GOOD = "params,tokens,loss\n" + "".join(f"{n},{n * m},{3 + 1 / n}\n" for n in (10, 20, 40) for m in (1, 2, 3))
BAD = {  # name: (content, what the error names)
    "no column": (GOOD.replace("tokens", "token"), ["'tokens'", "params, token, loss"]),
    "no loss": (GOOD.replace("loss", "accuracy"), ["choose by --loss", "accuracy"]),
    "two losses": ("params,tokens,loss_a,loss_b\n1,2,3,4\n", ["2 columns of losses", "--loss"]),
    "negative loss": (GOOD + "80,80,-3\n", ["line 11", "loss is -3", "above 0"]),
    "no number": (GOOD + "80,many,3\n", ["line 11", "tokens is 'many'"]),
    "short line": ("# a comment\n" + GOOD + "80,80\n", ["line 12", "2 cells"]),
    "two rows": ("params,tokens,loss\n1e6,1e7,3\n1e7,1e8,2\n", ["2 usable runs", "needs 7"]),
    "one size": (GOOD.replace("20,", "10,").replace("40,", "10,"), ["too few sizes"]),
    "empty": ("", ["columns are none"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_an_error_that_names_the_fix(case, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(BAD[case][0])
    with pytest.raises(InputError) as error:
        laws.fit(*points.usable(points.read([str(path)], Columns())[0]), QUICK)
    assert all(part in str(error.value) for part in BAD[case][1]), error.value
    assert "\n" not in str(error.value)


def test_empty_losses_are_left_out_and_no_law_is_no_law(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(GOOD + "80,80,nan\n80,160,\n10,10,3.2\n10,10,3.2\n")
    chosen, left_out = points.usable(points.read([str(path)], Columns())[0])
    assert len(chosen) == 10
    assert [each["why"].split(" of ")[0] for each in left_out] == ["its loss is not finite"] * 2 + [
        "a duplicate"
    ]
    for content in ("{}", '{"theta": 3}', "[1]"):
        path.write_text(content)
        with pytest.raises(InputError):
            laws.read(str(path))
    with pytest.raises(InputError, match="besiroglu2024"):
        laws.read("no.json")


def test_equal_numbers_of_two_groups_are_two_runs_and_two_losses_do_not_mix(tmp_path):
    (tmp_path / "a.csv").write_text(
        "params,tokens,data,loss_c4\n1e6,1e8,x,3.5\n1e6,1e8,y,3.5\n1e6,1e8,x,3.5\n"
    )
    runs, _ = points.read([str(tmp_path / "a.csv")], Columns(by="data"))
    kept_runs, left_out = points.usable(runs)
    assert [run.group for run in kept_runs] == ["x", "y"]
    assert len(left_out) == 1
    (tmp_path / "b.csv").write_text("params,tokens,loss\n1e6,1e8,2.5\n")
    with pytest.raises(InputError, match="choose one by --loss"):
        points.read([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], Columns())


@pytest.mark.slow
def test_real_runs_are_predicted_from_smaller_ones(tmp_path):
    """The proof on 96 language models: below 1e20 FLOPs the law is fitted, above it predicts within 1 %."""
    law = str(tmp_path / "law.json")
    about = ["--loss=loss_c4", "--by=train_data"]
    fitted = run_script(
        "laws.py", "fit", str(REAL), *about, "--below=1e20", "--resamples=200", f"--out={law}"
    )
    assert fitted.code == 0, fitted.err
    assert "without" not in fitted.out
    tree = json.loads(pathlib.Path(law).read_text())
    for name in ("c4_original", "rpj", "rw_original"):
        found = tree["laws"][name]
        assert found["runs"] == 29
        assert found["predicted"]["runs"] == 3
        assert found["predicted"]["mean_error"] < 0.01
        assert found["intervals"]["E"][0] < found["E"] < found["intervals"]["E"][1]
        assert (tmp_path / f"law-{name}.png").stat().st_size > 50_000
    out = tmp_path / "predicted.json"
    ran = run_script("laws.py", "predict", law, str(REAL), f"--json={out}")
    assert ran.code == 0, ran.err
    rows = json.loads(out.read_text())
    large = [row for row in rows if 6 * row["params"] * row["tokens"] >= 1e20]
    assert len(rows) == 96
    assert len(large) == 9
    assert np.mean([abs(row["predicted_loss"] / row["loss_c4"] - 1) for row in large]) < 0.01
    assert sum(row["low"] <= row["loss_c4"] <= row["high"] for row in large) >= 7
    bad = run_script("laws.py", "fit", str(REAL), "--loss=loss_c5", f"--out={tmp_path / 'bad.json'}")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "loss_c5" in bad.err
    assert not (tmp_path / "bad.json").exists()


def test_a_law_is_read_as_it_was_written(tmp_path):
    runs = made_by(PUBLISHED["hoffmann2022"], noise=0.01)
    law = laws.fit(runs, [], Settings(resamples=100, below=1e20))
    laws.write(tmp_path / "law.json", {"": law}, {"loss": "loss", "by": "", "params": "params"})
    tree = json.loads((tmp_path / "law.json").read_text())
    assert tree["E"] == law.coefficients["E"]  # one law: at the top
    again, names = laws.read(str(tmp_path / "law.json"))
    assert names == {"loss": "loss", "by": "", "params": "params"}
    one, other = (laws.optimal(each, 1e21) for each in (law, again[""]))
    assert vars(one) == pytest.approx(vars(other), rel=1e-6)
    assert curves.draw("title", again[""], runs, 1e20) is not None
    with pytest.raises(InputError, match="no law of 'x'"):
        laws.predict_rows(again, [Run("r", 1e8, 1e9, 3.0, 6e17, "x", {})])
