"""Metrics over whole splits against scikit-learn, and the pictures drawn of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from bigmodel import metrics, pictures

N, K = 10_000, 7


@pytest.fixture(scope="module")
def scored():
    """(softmax scores [N, K], labels [N], groups [N]): right more often than not, classes of uneven size."""
    rng = np.random.default_rng(0)
    label = rng.choice(K, N, p=np.arange(1, K + 1) / np.arange(1, K + 1).sum())
    logits = rng.normal(size=(N, K)) + 1.5 * np.eye(K)[label]
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return score.astype(np.float32), label, rng.integers(0, 3, N)


def test_classification_is_that_of_scikit_learn(scored):
    score, label, _ = scored
    predicted = score.argmax(1)
    ours = metrics.classification(score, label, k=3)
    close = pytest.approx
    assert ours["examples"] == N
    assert ours["accuracy"] == close(sk.accuracy_score(label, predicted), abs=1e-6)
    assert ours["top3"] == close(sk.top_k_accuracy_score(label, score, k=3, labels=range(K)), abs=1e-6)
    np.testing.assert_array_equal(ours["confusion"], sk.confusion_matrix(label, predicted))
    for average in ("micro", "macro"):
        expected = sk.precision_recall_fscore_support(label, predicted, average=average)[:3]
        assert list(ours[average].values()) == close(expected, abs=1e-6)
    each = sk.precision_recall_fscore_support(label, predicted)[:3]
    np.testing.assert_allclose(list(ours["per_class"].values()), each, atol=1e-6)
    roc = sk.roc_auc_score(label, score / score.sum(1, keepdims=True, dtype=np.float64), multi_class="ovr")
    assert ours["roc_auc"]["macro"] == close(roc, abs=1e-6)
    assert ours["pr_auc"]["macro"] == close(sk.average_precision_score(np.eye(K)[label], score), abs=1e-6)


def test_multilabel_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    label = (rng.random((N, 4)) < [0.05, 0.2, 0.5, 0.9]).astype(np.float32)
    score = 1 / (1 + np.exp(-(rng.normal(size=(N, 4)) + 2 * label - 1)))
    ours, predicted = metrics.classification(score, label), score > 0.5
    assert ours["exact_match"] == pytest.approx(sk.accuracy_score(label, predicted), abs=1e-6)
    for average in ("micro", "macro"):
        expected = sk.precision_recall_fscore_support(label, predicted, average=average)[:3]
        assert list(ours[average].values()) == pytest.approx(expected, abs=1e-6)
    assert ours["roc_auc"]["macro"] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-6)


def test_regression_is_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    label = rng.normal(5, 2, (N, 2)).astype(np.float32)
    value = label + rng.normal(size=label.shape).astype(np.float32)
    ours = metrics.regression(value, label)
    assert ours["mse"] == pytest.approx(sk.mean_squared_error(label, value), rel=1e-6)
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(label, value), rel=1e-6)
    assert ours["r2"] == pytest.approx(sk.r2_score(label, value), abs=1e-6)


def test_calibration_error_by_hand():
    confidence = np.array([0.55, 0.58, 0.95, 0.95, 1.0])
    bins = metrics.reliability(confidence, np.array([1, 0, 1, 1, 0]), bins=10)
    assert bins["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert bins["ece"] == pytest.approx((abs(1.0 - 1.13) + abs(2 - 2.9)) / 5)


def test_gaps_between_groups_by_hand():
    label = np.array([1, 1, 0, 0, 1, 1, 0, 0])[:, None].astype(bool)
    predicted = np.array([1, 1, 1, 0, 1, 0, 0, 0])[:, None].astype(bool)
    group = np.array([0] * 4 + [1] * 4)
    gaps = metrics.group_gaps(label, predicted, group)
    assert gaps["groups"] == {"0": 4, "1": 4}
    assert gaps["demographic_parity"] == 0.5  # 3 of 4 against 1 of 4
    assert gaps["equalised_odds"] == 0.5  # true positives 1 against 1/2, false positives 1/2 against 0
    assert metrics.group_gaps(label, predicted, np.zeros(8, int))["demographic_parity"] == 0


def test_a_class_without_examples_has_no_area():
    score = np.full((4, 3), 1 / 3)
    ours = metrics.classification(score, np.array([0, 0, 1, 1]))
    assert ours["roc_auc"]["per_class"] == [0.5, 0.5, None]


def test_confusion_of_parts_adds_up(scored):
    score, label, _ = scored
    predicted = score.argmax(1)
    parts = [metrics.confusion(label[rows], predicted[rows], K) for rows in (slice(0, 99), slice(99, N))]
    np.testing.assert_array_equal(sum(parts), metrics.confusion(label, predicted, K))


def test_pictures_are_drawn(scored, tmp_path):
    score, label, group = scored
    report = metrics.classification(score, label, group)
    paths = pictures.draw(tmp_path, np.eye(K, dtype=bool)[label], score, report, [str(k) for k in range(K)])
    assert sorted(path.name for path in paths) == ["calibration.png", "confusion.png", "pr.png", "roc.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
