"""Metrics over whole splits against scikit-learn, and the pictures drawn of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, random_batch, start, steps, tiny
from sklearn import metrics as sk

from bigmodel import config as config_lib
from bigmodel import metrics, tasks
from bigmodel.config import InputError
from bigmodel.tasks.labels import softmax

N, K = 10_000, 7


@pytest.fixture(scope="module")
def scored():
    """(softmax scores [N, K], labels [N]): right more often than not, classes of uneven size."""
    rng = np.random.default_rng(0)
    label = rng.choice(K, N, p=np.arange(1, K + 1) / np.arange(1, K + 1).sum())
    logits = rng.normal(size=(N, K)) + 1.5 * np.eye(K)[label]
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return score.astype(np.float32), label


def test_classification_is_that_of_scikit_learn(scored):
    score, label = scored
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


def test_a_class_without_examples_has_no_area():
    score = np.full((4, 3), 1 / 3)
    ours = metrics.classification(score, np.array([0, 0, 1, 1]))
    assert ours["roc_auc"]["per_class"] == [0.5, 0.5, None]


def test_confusion_of_parts_adds_up(scored):
    score, label = scored
    predicted = score.argmax(1)
    parts = [metrics.confusion(label[rows], predicted[rows], K) for rows in (slice(0, 99), slice(99, N))]
    np.testing.assert_array_equal(sum(parts), metrics.confusion(label, predicted, K))


# ------------------------------------------------------------------------- ties, NaN, and what has no value


def on_device(logits: np.ndarray, label: np.ndarray, **keys: Any) -> dict[str, float]:
    batch = {"label": jnp.asarray(label), "mask": jnp.ones(len(label))}
    name = "classify" if label.ndim == 1 else "multilabel"
    task = tasks.make(config_lib.from_dict({"model": {"name": "cnn"}, "task": {"name": name, **keys}}))
    terms = jax.jit(lambda x: task.terms({"logits": x}, batch, False))
    return {key: float(total / weight) for key, (total, weight) in terms(jnp.asarray(logits)).items()}


@pytest.mark.parametrize("values", [1, 2, 3, 50])
def test_ties_are_broken_as_argmax_does(values):
    """Logits of few values: the k first of a stable sort, by which the first of equals is the higher."""
    rng = np.random.default_rng(values)
    logits, label = rng.integers(0, values, (400, 9)).astype(np.float32), rng.integers(0, 9, 400)
    order = np.argsort(-logits, 1, kind="stable")
    np.testing.assert_array_equal(order[:, 0], logits.argmax(1))
    np.testing.assert_array_equal(order[:, :3], jax.lax.top_k(logits, 3)[1])
    top3 = (order[:, :3] == label[:, None]).any(1).mean()
    ours = on_device(logits, label, top_k=3)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(label, logits.argmax(1)), abs=1e-6)
    assert ours["top3"] == pytest.approx(top3, abs=1e-6)
    report = metrics.classification(softmax(logits), label, k=3)
    assert (report["accuracy"], report["top3"]) == (pytest.approx(ours["accuracy"]), pytest.approx(top3))
    half = on_device(logits.astype(jnp.bfloat16), label, top_k=3)
    assert half["accuracy"] == ours["accuracy"]


@pytest.mark.parametrize("values", [2, 5, 10_000])
def test_areas_of_an_evaluation_are_those_of_scikit_learn(values):
    """Scores of few values: ties. Of two classes they are of class 1, of labels the mean over these."""
    rng = np.random.default_rng(values)
    label = rng.integers(0, 2, (400, 3))
    logits = (rng.integers(0, values, (400, 3)) / 1024 + label).astype(np.float32)

    def over_all(name: str, output: np.ndarray, label: np.ndarray) -> Any:
        model = {"name": "cnn", "num_classes": output.shape[1]}
        task = tasks.make(config_lib.from_dict({"model": model, "task": {"name": name}}))
        found = task.over_all({"output": output, "label": label})
        assert tuple(found) == task.over_all_names
        return list(found.values())

    functions = (sk.roc_auc_score, sk.average_precision_score)
    expected = [function(label, logits, average="macro") for function in functions]
    assert over_all("multilabel", logits, label.astype(np.float32)) == pytest.approx(expected, abs=1e-9)
    expected = [function(label[:, 0], np.diff(logits[:, :2])) for function in functions]
    assert over_all("classify", logits[:, :2], label[:, 0]) == pytest.approx(expected, abs=1e-9)


def test_an_evaluation_with_focal_loss_also_has_the_plain_log_loss():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    focal = on_device(logits, label, loss="focal", label_smoothing=0.1)
    assert focal["nll"] == pytest.approx(sk.log_loss(label, softmax(logits)), rel=1e-5)
    assert focal["loss"] < focal["nll"]
    assert "nll" not in on_device(logits, label)
    many = np.eye(4, dtype=np.float32)[label]
    assert on_device(logits, many, loss="focal")["nll"] == pytest.approx(on_device(logits, many)["loss"])


def test_words_and_next_sentences_break_ties_alike():
    batch = {"segments": jnp.ones((2, 5), int), "mask": jnp.ones(2), "targets": jnp.arange(10).reshape(2, 5)}
    batch["target_bytes"] = jnp.ones((2, 5), jnp.uint8)
    total, count = tasks.make(config_lib.Config()).terms({"logits": jnp.zeros((2, 5, 10))}, batch, False)[
        "accuracy"
    ]
    assert (float(total), float(count)) == (1, 10)  # only token 0 is the argmax


def test_a_nan_is_never_right():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(60, 6)).astype(np.float32), rng.integers(0, 6, 60)
    bad = rng.random(60) < 0.4
    hurt = logits.copy()
    hurt[bad, rng.integers(0, 6, bad.sum())] = np.nan
    right = (logits.argmax(1) == label) & ~bad
    top5 = (np.argsort(-logits, 1)[:, :5] == label[:, None]).any(1) & ~bad
    ours = on_device(hurt, label)
    report = metrics.classification(softmax(hurt), label)
    for values in (ours, report):
        assert values["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
        assert values["top5"] == pytest.approx(top5.mean(), abs=1e-6)
    assert report["nan_examples"] == bad.sum()
    assert np.sum(report["confusion"]) == (~bad).sum()
    assert report["micro"]["recall"] == pytest.approx(right.mean(), abs=1e-6)
    assert report["roc_auc"] == {"macro": None, "per_class": [None] * 6}
    many = (rng.random((60, 6)) < 0.1).astype(np.float32)
    hurt = np.where(np.isnan(hurt), hurt, -9.0)  # says no to everything
    met = ~np.isnan(hurt) & (many == 0)
    ours, report = (
        on_device(hurt, many),
        metrics.classification(1 / (1 + np.exp(-hurt.astype(np.float64))), many),
    )
    for values in (ours, report):
        assert values["accuracy"] == pytest.approx(met.mean(), abs=1e-6)
        assert values["exact_match"] == pytest.approx(met.all(1).mean(), abs=1e-6)


def test_what_is_sure_beyond_float32_keeps_its_order():
    """Logits far apart have likelihoods that float32 rounds to 0 and 1; areas see their order."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 500)
    margin = rng.normal(18, 4, 500) + 4 * label
    logits = np.stack([0 * margin, margin], 1).astype(np.float32)
    report = metrics.classification(softmax(logits), label)
    assert report["roc_auc"]["per_class"][1] == pytest.approx(sk.roc_auc_score(label, margin), abs=1e-4)
    sure = np.array([[np.inf, 3, np.inf], [-np.inf, 2, 1]])
    np.testing.assert_allclose(softmax(sure)[0], [0.5, 0, 0.5])
    assert softmax(sure)[1, 0] == 0


def test_areas_and_curves_with_ties_are_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    score, label = rng.integers(0, 4, (300, 3)) / 4, rng.integers(0, 3, 300)
    ours = metrics.areas(np.eye(3, dtype=bool)[label], score)
    for k in range(3):
        assert ours["roc_auc"]["per_class"][k] == sk.roc_auc_score(label == k, score[:, k])
        assert ours["pr_auc"]["per_class"][k] == sk.average_precision_score(label == k, score[:, k])


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_r2_of_labels_that_are_all_equal_is_that_of_scikit_learn(shift):
    label = np.array([[3.0, 1.0], [3.0, 2.0], [3.0, 5.0]])
    value = label + np.array([shift, 0.5])
    assert metrics.regression(value, label)["r2"] == pytest.approx(sk.r2_score(label, value))


def test_what_is_not_finite_has_no_value():
    label = np.array([[1.0], [2.0], [4.0]])
    for value in (np.nan, np.inf):
        report = metrics.regression(np.array([[1.0], [value], [3.0]]), label)
        assert (report["mse"], report["mae"], report["r2"]) == (None, None, None)
    assert metrics.regression(label[:1], label[:1])["r2"] is None
    wide = np.random.default_rng(0).normal(size=(9, 3))
    assert metrics.frechet(wide, np.where(wide > 1, np.nan, wide)) is None
    assert metrics.frechet(wide, wide[:1]) is None
    assert metrics.frechet(wide, wide) == pytest.approx(0, abs=1e-9)


def test_a_metric_without_weight_is_left_out_and_a_loss_without_is_refused():
    sums = metrics.Sums()
    zero, one = jnp.float32(0), jnp.float32(1)
    sums.add({"loss": (one, one), "bits_per_byte": (zero, zero)})
    assert sums.values() == {"loss": 1.0}
    for terms in ({"loss": (zero, zero)}, {}):
        empty = metrics.Sums()
        empty.add(terms)
        with pytest.raises(InputError, match=r"no example of the split counts.*data\.eval_split"):
            empty.values()


def test_sums_over_batches_are_exact_beyond_float32():
    sums = metrics.Sums()
    for count in (2**24, 1, 1, 3):
        sums.add(
            {"loss": (jnp.float32(1), jnp.float32(count)), "count": (jnp.float32(count), jnp.float32(1))}
        )
    assert sums.values()["count"] * 4 == 2**24 + 5


def test_a_training_metric_without_weight_is_no_number():
    built = build(tiny("gpt"))
    batch = random_batch(built.config)
    for bytes_each in (0, 1):
        batch["target_bytes"] = np.full_like(batch["target_bytes"], bytes_each)
        _, rows = steps(built, start(built), 1, [batch])
        assert np.isfinite(rows["loss"]).all()
        assert np.isfinite(rows["bits_per_byte"]).all() == bool(bytes_each)
