"""Tasks with one output for each example, whatever it is: classify, multilabel, regress.

| name | shape | dtype | meaning |
|---|---|---|---|
| image | [B, H, W, C] | float32 | images, normalized |
| tokens, segments, positions | [B, L] | int32 | texts; segments 0: padding |
| numeric | [B, N] | float32 | numbers of a table's row, standardised |
| categorical | [B, C] | int32 | its categories |
| label | [B] | int32 | classify: the class |
| label | [B, V] | float32 | multilabel: 0 or 1 for each class; regress: numbers |
| label_other, label_share | as label, [B] | float32 | mixup, cutmix: the other label, the first one's share |
| label_scale | [B, 2] | float32 | regress on tables: mean and deviation of the label |
| weight | [B] | float32 | task.class_weights: of the loss |
| group | [B] | int32 | data.group |
| mask | [B] | float32 | 0: the row fills up the batch, or was skipped |

Legend: B batch, V classes or numbers, N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmodel import config as keys
from bigmodel import metrics, pictures
from bigmodel.data import labeled, tables, texts
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.data.sizes import Size, Sizes
from bigmodel.metrics import Metrics
from bigmodel.tasks import rates
from bigmodel.tasks.base import (
    Batch,
    Examples,
    K,
    ReportTo,
    Row,
    Task,
    cross_entropy,
    focal,
    is_among,
    is_likeliest,
    with_losses,
)

Counted = Callable[[jax.Array], jax.Array]
AREAS = ("roc_auc", "average_precision")
MOST_AREAS = 100  # labels; evaluations of more have no areas, which take a sort for each label


class LabelTask(Task[K]):
    """A task with one output for each example."""

    reports: ClassVar[bool] = True
    class_feature: ClassVar[str] = "label"

    def shapes(self, facts: Facts) -> Shapes:
        return labeled.shapes(self.config, facts)

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        return labeled.examples(self.config, split, facts, train)

    def sizes(self, facts: Facts) -> Sizes:
        def rows() -> Size:
            is_table = labeled.kind_of(self.config, facts) == "table"
            return tables.rows(self.config, facts) if is_table else Size(0, "no table")

        return {
            "num_classes": lambda: labeled.classes(self.config, facts),
            "vocab_size": lambda: texts.vocabulary(self.config, facts, texts.special_ids(self.config)),
            "rows": rows,
        }

    def weight(self, batch: Batch) -> jax.Array:
        return example_weight(batch).sum()


def example_weight(batch: Batch) -> jax.Array:
    """Returns how much each example's loss counts, [B]: 0 for padding, else its class's weight, or 1."""
    return batch["mask"] * batch["weight"] if "weight" in batch else batch["mask"]


class Classify(LabelTask[keys.Classify]):
    """One class for each example."""

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Logits [B, V]; those of auxiliary classifiers, if there are any, count `aux_weight` times each."""
        logits_BV = outputs["logits"]
        aux = outputs.get("aux_logits", ())
        weight_B, mask_B, top_k = example_weight(batch), batch["mask"], self.keys.top_k
        nats_B = self._loss(logits_BV, batch, train)
        nats_B += sum((self.keys.aux_weight * self._loss(x, batch, train) for x in aux), jnp.float32(0))
        found = {"loss": ((nats_B * weight_B).sum(), weight_B.sum())}
        if self.keys.loss == "focal" and not train:
            nll_B = cross_entropy(logits_BV, batch["label"])
            found["nll"] = ((nll_B * mask_B).sum(), mask_B.sum())

        def count(is_right: Counted) -> tuple[jax.Array, jax.Array]:
            right_B = over_labels(batch, lambda label: is_right(label).astype(jnp.float32))
            return (right_B * mask_B).sum(), mask_B.sum()

        found["accuracy"] = count(lambda label: is_likeliest(logits_BV, label))
        if 1 < top_k < logits_BV.shape[-1]:
            found[f"top{top_k}"] = count(lambda label: is_among(logits_BV, label, top_k))
        return with_losses(found, outputs.get("losses", {}), weight_B, train)

    def _loss(self, logits_BV: jax.Array, batch: Batch, train: bool) -> jax.Array:
        def nats(label: jax.Array) -> jax.Array:
            nll = cross_entropy(logits_BV, label, self.keys.label_smoothing * train)
            return focal(nll, self.keys.focal_gamma) if self.keys.loss == "focal" else nll

        return over_labels(batch, nats)

    @property
    def over_all_names(self) -> tuple[str, ...]:
        return AREAS if self.config.model.num_classes == 2 else ()

    def over_all(self, examples: Examples) -> Mapping[str, float | None]:
        """Areas under the curves of class 1, of two classes."""
        return metrics.mean_areas(examples["label"][:, None] == 1, softmax(examples["output"])[:, 1:])

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        return _report(self, softmax(examples["output"]), examples, to)

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        share_V = np.exp(out["output"] - out["output"].max())
        share_V = share_V / share_V.sum()
        best = np.argsort(-share_V, kind="stable")[:5]  # of equals the first, as in evaluation
        titles = [title(names, i) for i in best]
        top = {name: round(float(share_V[i]), 6) for name, i in zip(titles, best, strict=True)}
        return {"label": int(best[0]), "name": titles[0], "probability": float(share_V[best[0]]), "top": top}


def over_labels(batch: Batch, value: Counted) -> jax.Array:
    """Returns `value` of the label, or of both labels of a mixed example by their shares."""
    labels: list[tuple[jax.Array, jax.Array | float]] = [(batch["label"], 1.0)]
    if "label_other" in batch:  # of mixup or CutMix
        share_B = batch["label_share"]
        labels = [(batch["label"], share_B), (batch["label_other"], 1 - share_B)]
    return sum((share * value(label) for label, share in labels), jnp.float32(0))


class Multilabel(LabelTask[keys.Multilabel]):
    """Any number of classes for each example."""

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Binary cross-entropy for each class, averaged over the classes; `label` is 0 or 1, [B, V]."""
        logits_BV, label_BV = outputs["logits"].astype(jnp.float32), batch["label"]
        smoothing = self.keys.label_smoothing * train
        if "label_other" in batch:
            share_B1 = batch["label_share"][:, None]
            label_BV = share_B1 * label_BV + (1 - share_B1) * batch["label_other"]
        target_BV = label_BV * (1 - smoothing) + smoothing / 2
        nll_BV = optax.sigmoid_binary_cross_entropy(logits_BV, target_BV)
        if self.keys.loss == "focal":
            on, off = jax.nn.softplus(-logits_BV), jax.nn.softplus(logits_BV)
            gamma = self.keys.focal_gamma
            nats_BV = target_BV * focal(on, gamma) + (1 - target_BV) * focal(off, gamma)
        else:
            nats_BV = nll_BV
        mask_B, weight_B = batch["mask"], example_weight(batch)
        right_BV = ((logits_BV > 0) == (label_BV > 0.5)) & ~jnp.isnan(logits_BV)  # a NaN predicts nothing
        exact_B = right_BV.all(-1).astype(jnp.float32)
        found = {
            "loss": ((nats_BV.mean(-1) * weight_B).sum(), weight_B.sum()),
            "accuracy": ((right_BV.astype(jnp.float32).mean(-1) * mask_B).sum(), mask_B.sum()),
            "exact_match": ((exact_B * mask_B).sum(), mask_B.sum()),
        }
        if self.keys.loss == "focal" and not train:
            found["nll"] = ((nll_BV.mean(-1) * mask_B).sum(), mask_B.sum())
        return with_losses(found, outputs.get("losses", {}), weight_B, train)

    @property
    def over_all_names(self) -> tuple[str, ...]:
        return AREAS if self.config.model.num_classes <= MOST_AREAS else ()

    def over_all(self, examples: Examples) -> Mapping[str, float | None]:
        """Areas under the curves, averaged over the labels."""
        return metrics.mean_areas(examples["label"] > 0.5, sigmoid(examples["output"]))

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        return _report(self, sigmoid(examples["output"]), examples, to)

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        share_V = 1 / (1 + np.exp(-out["output"]))
        found = np.flatnonzero(share_V > 0.5).tolist()
        titles = [title(names, label) for label in found]
        return {"labels": found, "names": titles, "probabilities": share_V.tolist()}


class Regress(LabelTask[keys.Regress]):
    """Numbers for each example."""

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        return {"rmse": values["mse"] ** 0.5}

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Squared error, or Huber's (1964), averaged over the outputs; `label` [B, V]."""
        error_BV, huber_delta = outputs["logits"].astype(jnp.float32) - batch["label"], self.keys.huber_delta
        square_BV, distance_BV = jnp.square(error_BV), jnp.abs(error_BV)
        loss_BV = square_BV
        if huber_delta:
            near_BV = jnp.minimum(distance_BV, huber_delta)
            loss_BV = near_BV * (distance_BV - 0.5 * near_BV)
        mask_B, weight_B = batch["mask"], example_weight(batch)
        weight = mask_B.sum()
        found = {
            "loss": ((loss_BV.mean(-1) * weight_B).sum(), weight_B.sum()),
            "mse": ((square_BV.mean(-1) * mask_B).sum(), weight),
            "mae": ((distance_BV.mean(-1) * mask_B).sum(), weight),
        }
        return with_losses(found, outputs.get("losses", {}), weight_B, train)

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        value_NK, label_NK = examples["output"], examples["label"]
        distance_N = np.abs(value_NK - label_NK).sum(1)
        rows = [
            {
                **_place(examples, n, to),
                "label": label_NK[n].tolist(),
                "prediction": value_NK[n].tolist(),
            }
            for (n,) in rates.surest_mistakes(distance_N > 0, distance_N)
        ]
        return metrics.regression(value_NK, label_NK) | {"mistakes": rows}

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        """Numbers in the label's own units, which training standardized."""
        mean, deviation = columns.label_scale if columns else (0.0, 1.0)
        return {"value": (out["output"].astype(np.float64) * deviation + mean).tolist()}


def sigmoid(output_NK: np.ndarray) -> np.ndarray:
    """Logits -> sigmoid's scores in float64."""
    with np.errstate(invalid="ignore"):  # a NaN stays one
        return np.exp(-np.logaddexp(0, -output_NK.astype(np.float64)))


def softmax(output_NK: np.ndarray) -> np.ndarray:
    """Logits -> softmax's scores in float64: sure ones do not become equal.

    Logits that are infinite share all the likelihood, so that the argmax is theirs.
    """
    x_NK = output_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a NaN stays one
        most_N1 = x_NK.max(1, keepdims=True)
        share_NK = np.exp(np.where(x_NK == most_N1, 0.0, x_NK - most_N1))
    return share_NK / share_NK.sum(1, keepdims=True)


def _report(
    task: Classify | Multilabel, score_NK: np.ndarray, examples: Examples, to: ReportTo
) -> dict[str, Any]:
    """Returns a classifier's metrics, calibration, cuts, groups and mistakes, and draws their pictures."""
    label, classes = examples["label"], score_NK.shape[1]
    titles = [*to.names, *map(str, range(len(to.names), classes))]
    one = label.ndim == 1
    clear_NK = ~np.isnan(score_NK)
    if one:
        clear_NK = np.broadcast_to(clear_NK.all(1, keepdims=True), score_NK.shape)
        is_NK, predicted_NK = (np.eye(classes, dtype=bool)[k_N] for k_N in (label, score_NK.argmax(1)))
    else:
        is_NK, predicted_NK = label > 0.5, score_NK > 0.5
    out = metrics.classification(score_NK, label, task.keys.top_k)
    if not one:
        calibrated = "each label", score_NK.ravel(), is_NK.ravel()
    elif classes == 2:
        calibrated = f"P({titles[1]})", score_NK[:, 1], is_NK[:, 1]
        out["cuts"] = rates.cuts(is_NK[:, 1], score_NK[:, 1])
    else:
        calibrated = "the likeliest class", score_NK.max(1), (is_NK & predicted_NK).any(1)
    out["calibration"] = {"of": calibrated[0], **rates.reliability(*calibrated[1:])}
    if "group" in examples:
        out["gaps"] = rates.compare(
            is_NK, predicted_NK & clear_NK, score_NK, examples["group"], to.groups, task.keys.least_group
        )
    wrong_NK = (predicted_NK != is_NK) & clear_NK & (predicted_NK | (not one))
    at = rates.surest_mistakes(wrong_NK, np.abs(score_NK - 0.5) if not one else score_NK)
    out["mistakes"] = [
        {
            **_place(examples, n, to),
            "label": titles[label[n]] if one else bool(is_NK[n, k]),
            "prediction" if one else "class": titles[k],
            "probability": float(score_NK[n, k]),
        }
        for n, k in at
    ]
    figures = pictures.of_classes(is_NK, score_NK, out, titles)
    rows = to.read(np.array([row["index"] for row in out["mistakes"]])) if at and to.read else {}
    if "image" in rows:
        image_NHWC = pictures.pixels(task.config, rows["image"])
        figures["mistakes"] = pictures.mistakes(image_NHWC, out["mistakes"])
    return out | {"pictures": pictures.write(to.directory, figures, to.about)}


def _place(examples: Examples, n: int, to: ReportTo) -> dict[str, Any]:
    index = int(examples["index"][n])
    return {"index": index} | ({"where": to.where(index)} if to.where else {})


def title(names: Sequence[str], label: int) -> str:
    """Returns a class's name, or its number where it has none."""
    return names[label] if label < len(names) else str(label)
