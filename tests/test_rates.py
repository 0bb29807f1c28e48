"""Rates of classifiers and their intervals: calibration, cuts, groups, the pictures drawn of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from bigmodel import config as config_lib
from bigmodel import tasks
from bigmodel.tasks import rates
from bigmodel.tasks.base import ReportTo


def test_calibration_error_by_hand():
    bins = rates.reliability(np.array([0.55, 0.58, 0.95, 0.95, 1.0]), np.array([1, 0, 1, 1, 0]), bins=10)
    assert bins["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert bins["ece"] == pytest.approx((abs(1.0 - 1.13) + abs(2 - 2.9)) / 5)
    assert rates.reliability(np.array([0.5, np.nan]), np.array([1, 1]))["ece"] is None


@pytest.mark.parametrize("bins", [3, 10, 15, 20])
def test_a_bin_of_calibration_holds_its_upper_edge(bins):
    edges = np.linspace(0, 1, bins + 1)
    confidence = np.concatenate([edges, edges[1:] - 1e-9, np.random.default_rng(0).random(99)])
    right = np.arange(len(confidence)) % 3 > 0
    ece, counts = 0.0, []
    for low, high in itertools.pairwise(edges):  # as Guo et al.'s own code
        inside = (confidence > low) & (confidence <= high) | (low == 0) & (confidence == 0)
        counts.append(inside.sum())
        ece += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean() if inside.any() else 0
    ours = rates.reliability(confidence, right, bins)
    assert ours["count"] == counts
    assert ours["ece"] == pytest.approx(ece, abs=1e-12)


def test_intervals_of_rates_are_those_of_brown_cai_and_dasgupta():
    """0 of 20 and 1 of 2 as statsmodels' proportion_confint(method="wilson") has them; the ends solve
    |p - x| = z sqrt(p (1 - p) / n), the definition."""
    low, high = rates.wilson(np.array([0, 1, 0]), np.array([20, 2, 0]))
    assert (low[0], high[0]) == (0, pytest.approx(0.161125, abs=1e-6))
    assert (low[1], high[1]) == (pytest.approx(0.094531, abs=1e-6), pytest.approx(0.905469, abs=1e-6))
    assert (low[2], high[2]) == (0, 1)
    one = rates.rate(np.arange(50) < 7)
    assert one is not None
    for end in (one["low"], one["high"]):
        assert abs(end - one["value"]) == pytest.approx(rates.Z * np.sqrt(end * (1 - end) / 50), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_intervals_of_areas_hold_the_true_area(shift):
    """They hold it in some 95 % of 400 samples of 12 and 30 normal scores, and always sklearn's area."""
    rng, truth = np.random.default_rng(0), 0.5 + math.erf(shift / 2) / 2
    hits, is_1 = 0, np.arange(42) < 12
    for _ in range(400):
        score = rng.normal(size=42) + shift * is_1
        one = rates.area(is_1, score)
        assert one is not None
        assert one["low"] <= one["value"] <= one["high"]
        assert one["value"] == pytest.approx(sk.roc_auc_score(is_1, score))
        hits += one["low"] <= truth <= one["high"]
    assert hits / 400 > 0.92
    apart = rates.area(is_1, is_1 + 0.0)
    assert apart is not None
    assert apart["low"] < 0.95 < apart["value"] == apart["high"] == 1
    assert rates.area(np.ones(3, bool), np.ones(3)) is None


def test_cuts_are_what_a_plain_count_gives():
    rng = np.random.default_rng(1)
    score, is_1 = rng.integers(0, 40, 500) / 40, rng.random(500) < 0.1  # ties
    rows = rates.cuts(is_1, np.append(score, np.nan)[:500])
    assert [row["threshold"] for row in rows] == sorted({row["threshold"] for row in rows}, reverse=True)
    assert 0.5 in {row["threshold"] for row in rows}
    for row in rows:
        chosen = score >= row["threshold"]
        assert (row["selected"], row["share"]) == (chosen.sum(), pytest.approx(chosen.mean()))
        assert row["precision"] == pytest.approx(is_1[chosen].mean())
        assert row["recall"] == pytest.approx(chosen[is_1].mean())
        assert row["lift"] == pytest.approx(is_1[chosen].mean() / is_1.mean())
    for share in rates.SHARES:  # the least cut that selects as many
        cut = max(row["threshold"] for row in rows if row["share"] >= share)
        assert (score > cut).mean() < share or cut == 0.5
    none = rates.cuts(np.zeros(3, bool), np.array([0.1, np.nan, 0.2]))
    assert none[0] == {
        "threshold": 0.5, "selected": 0, "share": 0.0, "precision": None, "recall": None, "lift": None,
    }  # fmt: skip


def test_gaps_between_groups_by_hand():
    label = np.array([1, 1, 0, 0, 1, 1, 0, 0, 0])[:, None].astype(bool)
    chosen = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1])[:, None].astype(bool)
    group = np.array([0] * 4 + [1] * 4 + [2])
    found = rates.compare(label, chosen, chosen + 0.0, group, ["a", "b"], least=2)
    assert found["demographic_parity"] == 0.5  # 3 of 4 against 1 of 4; the group of one does not count
    assert found["equalised_odds"] == 0.5  # true positives 1 against 1/2, false positives 1/2 against 0
    assert found["between"]["demographic_parity"] == {
        "rate": "selection_rate", "class": 0, "highest": "a", "lowest": "b",
    }  # fmt: skip
    rows = found["groups"]
    assert [(row["group"], row["count"]) for row in rows] == [("a", 4), ("b", 4), ("unknown to training", 1)]
    (a,) = rows[0]["classes"]
    assert [a[key]["value"] for key in ("base_rate", "selection_rate", "tpr", "fpr")] == [0.5, 0.75, 1, 0.5]
    assert a["tpr"]["count"] == 2
    assert a["roc_auc"]["value"] == 0.75
    assert rows[2]["classes"][0]["tpr"] is None
    fewer = rates.compare(label, chosen, chosen + 0.0, group, [], least=3)
    assert (fewer["demographic_parity"], fewer["equalised_odds"]) == (0.5, None)  # no rate of 3 labels
    assert fewer["between"]["equalised_odds"] is None


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", ["classify", "multilabel"])
def test_a_report_is_drawn_also_where_outputs_are_nan(name, classes, tmp_path):
    rng = np.random.default_rng(classes)
    model = {"name": "cnn", "num_classes": classes}
    task = tasks.make(config_lib.from_dict({"model": model, "task": {"name": name, "least_group": 5}}))
    output = rng.normal(size=(60, classes)).astype(np.float32)
    output[::7] = np.nan
    label: Any = rng.integers(0, classes, 60)
    label = label if name == "classify" else (rng.random((60, classes)) < 0.3).astype(np.float32)
    group = np.append(rng.integers(0, 2, 58), [2, 2])
    examples = {"output": output, "label": label, "group": group, "index": np.arange(60) * 3}
    images = rng.normal(size=(180, 8, 8, 1)).astype(np.float32)
    to = ReportTo(tmp_path, groups=["x", "y"], read=lambda at: {"image": images[at]}, about="a run")
    report = task.report(examples, to)
    drawn = {"roc", "pr", "calibration", "groups", "mistakes"}
    drawn |= {"confusion"} if name == "classify" else set()
    assert {path.stem for path in tmp_path.iterdir()} == drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    sure = [row["probability"] for row in report["mistakes"]]
    assert len(sure) == rates.MISTAKES
    assert np.isfinite(sure).all()
    for row in report["mistakes"]:
        n = row["index"] // 3
        if name == "classify":
            assert str(label[n]) == row["label"] != row["prediction"] == str(output[n].argmax())
        else:
            k = int(row["class"])
            assert bool(label[n, k]) == row["label"] == (row["probability"] < 0.5) == (output[n, k] < 0)
    if name == "classify":
        assert sure == sorted(sure, reverse=True)
    assert report["calibration"]["ece"] is None
    assert ("cuts" in report) == (name == "classify" and classes == 2)
    assert rates.lines(report)
