"""Metrics as sums that add exactly across batches, devices and hosts.

A metric is (sum, weight), two float32 scalars; its value is sum / weight. Under `jax.jit` over a mesh a sum
already spans all devices and hosts; over batches, `Sums` adds in float64 on the host. What is no sum (areas
under curves) is computed below from the scores and labels of all examples.

A score that is NaN predicts nothing, so its example counts as wrong. What has no value is None.

Legend: N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmodel.config.parsing import InputError

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Sums:
    """Adds the metrics of many batches or steps; `values` divides once, at the end."""

    def __init__(self, pairs: Mapping[str, Sequence[float]] | None = None) -> None:
        """`pairs`: where to go on from, as another's `pairs`."""
        self.pairs = {
            name: list(pair) for name, pair in (pairs or {}).items()
        }  # name: [sum, weight], for JSON

    def add(self, metrics: Metrics) -> None:
        """Adds one batch's metrics, (sum, weight) by name; waits for the device."""
        self.add_read(jax.device_get(dict(metrics)))

    def add_read(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Adds metrics that are on the host already."""
        for name, (total, weight) in metrics.items():
            pair = self.pairs.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(weight)

    def means(self) -> dict[str, float]:
        """{name: value}; a metric without weight is left out, but a loss is then 0: it has no gradient."""
        weighed = {name: pair for name, pair in self.pairs.items() if pair[1] or name == "loss"}
        return {name: total / (weight or 1.0) for name, (total, weight) in weighed.items()}

    def values(self) -> dict[str, float]:
        """See `means`.

        Raises:
            InputError: no example counts towards the loss.
        """
        if not self.pairs.get("loss", (0.0, 0.0))[1]:
            raise InputError(
                "no example of the split counts towards the loss: it is empty, or nothing in it is to be "
                "predicted; choose another data.split or data.eval_split"
            )
        return self.means()


# ------------------------------------------------------------------------------- from all examples at once


def confusion(label_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: row the label, column the prediction. Those of parts of a split add up."""
    cells = np.bincount(label_N * classes + predicted_N, minlength=classes * classes)
    return cells.reshape(classes, classes)


def precision_recall_f1(right_K: np.ndarray, predicted_K: np.ndarray, actual_K: np.ndarray) -> dict[str, Any]:
    """From counts for each class: right predictions, predictions, examples.

    -> {"per_class": {"precision": [K], ...}, "micro": {...}, "macro": {...}}. 0 / 0 is 0. Macro averages over
    the classes that are predicted or present, micro over examples, both as scikit-learn does.
    """

    def ratios(right: Any, predicted: Any, actual: Any) -> dict[str, Any]:
        return {
            "precision": right / np.maximum(predicted, 1),
            "recall": right / np.maximum(actual, 1),
            "f1": 2 * right / np.maximum(predicted + actual, 1),
        }

    each = ratios(right_K, predicted_K, actual_K)
    there_K = (predicted_K + actual_K) > 0
    micro = ratios(right_K.sum(), predicted_K.sum(), actual_K.sum())
    return {
        "per_class": {name: value.tolist() for name, value in each.items()},
        "micro": {name: float(value) for name, value in micro.items()},
        "macro": {name: _mean(value[there_K].tolist()) for name, value in each.items()},
    }


def top_k(score_NK: np.ndarray, label_N: np.ndarray, k: int) -> float:
    """The share of labels among the k highest scores; of equal scores the first class is the higher, as in
    argmax. An example with a NaN counts as wrong."""
    chosen_N1 = np.take_along_axis(score_NK, label_N[:, None], 1)
    earlier_NK = (score_NK == chosen_N1) & (np.arange(score_NK.shape[1]) < label_N[:, None])
    before_N = ((score_NK > chosen_N1) | earlier_NK).sum(1)
    return float(((before_N < k) & ~np.isnan(score_NK).any(1)).mean())


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def areas(is_NK: np.ndarray, score_NK: np.ndarray) -> dict[str, Any]:
    """Areas under the ROC and precision-recall curves (average precision), one class against the rest.

    Args:
        is_NK: whether each example is of each class, [N, K].
        score_NK: any score that rises with the belief in it, [N, K].

    -> {"roc_auc": {"macro": .., "per_class": [..]}, "pr_auc": ..}; None for a class that no example, or every
    one, is of, or one of whose scores is NaN. Macro leaves those out.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    out = {}
    for name, function in (("roc_auc", roc_auc_score), ("pr_auc", average_precision_score)):
        values = [
            float(function(yes, score)) if 0 < yes.sum() < len(yes) and not np.isnan(score).any() else None
            for yes, score in zip(is_NK.T, score_NK.T, strict=True)
        ]
        out[name] = {"macro": _mean(values), "per_class": values}
    return out


def mean_areas(is_NK: np.ndarray, score_NK: np.ndarray) -> dict[str, float | None]:
    """`roc_auc` and `average_precision`: the means over the classes of `areas`."""
    found = areas(is_NK, score_NK)
    return {"roc_auc": found["roc_auc"]["macro"], "average_precision": found["pr_auc"]["macro"]}


def classification(score_NK: np.ndarray, label: np.ndarray, k: int = 5) -> dict[str, Any]:
    """Everything above, for classifiers.

    Args:
        label: int [N] beside softmax scores, or 0/1 [N, K] beside sigmoid's.

    Where scores are NaN, `nan_examples` says of how many examples: they have no prediction, so the confusion
    matrix leaves them out, and every rate counts them as wrong.
    """
    classes = score_NK.shape[1]
    out: dict[str, Any] = {"examples": len(score_NK)}
    clear_NK = ~np.isnan(score_NK)
    clear_N = clear_NK.all(1)
    if not clear_N.all():
        out["nan_examples"] = int((~clear_N).sum())
    if label.ndim == 1:
        predicted_N, one_hot = score_NK.argmax(1), np.eye(classes, dtype=bool)
        is_NK, predicted_NK = one_hot[label], one_hot[predicted_N] & clear_N[:, None]
        out["accuracy"] = float(((predicted_N == label) & clear_N).mean())
        if k < classes:
            out[f"top{k}"] = top_k(score_NK, label, k)
        out["confusion"] = confusion(label[clear_N], predicted_N[clear_N], classes).tolist()
    else:
        is_NK, predicted_NK = label > 0.5, score_NK > 0.5
        right_NK = (is_NK == predicted_NK) & clear_NK
        out["accuracy"] = float(right_NK.mean())
        out["exact_match"] = float(right_NK.all(1).mean())
    out |= precision_recall_f1((is_NK & predicted_NK).sum(0), predicted_NK.sum(0), is_NK.sum(0))
    return out | areas(is_NK, score_NK)


def regression(value_NK: np.ndarray, label_NK: np.ndarray) -> dict[str, Any]:
    """Mean squared error, its root, mean absolute error, R2 averaged over the outputs; None if not finite.

    R2 of an output whose labels are all equal is 1 where all are met, else 0, as in scikit-learn; of one
    example it is None.
    """
    label_NK = label_NK.astype(np.float64)
    error_NK = value_NK.astype(np.float64) - label_NK
    miss_K, spread_K = (np.square(x).sum(0) for x in (error_NK, label_NK - label_NK.mean(0)))
    r2_K = np.where(spread_K > 0, 1 - miss_K / np.where(spread_K > 0, spread_K, 1), miss_K == 0)
    mse = np.square(error_NK).mean()
    return {
        "examples": len(value_NK),
        "mse": _finite(mse),
        "rmse": _finite(mse**0.5),
        "mae": _finite(np.abs(error_NK).mean()),
        "r2": _finite(np.where(np.isnan(miss_K), np.nan, r2_K).mean()) if len(value_NK) > 1 else None,
    }


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float | None:
    """The Frechet distance of two sets of features as if each were Gaussian (Heusel et al. 2017, eq. 6),
    in units of the standard deviations of `a`: |m - n|^2 + tr(C + D - 2 (C D)^1/2).

    None where a set has fewer than two members, or a feature is not finite.
    """
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    if min(len(a_ND), len(b_ND)) < 2 or not (np.isfinite(a_ND).all() and np.isfinite(b_ND).all()):
        return None
    scale_D = np.maximum(a_ND.std(0), 1e-6)
    (m, c), (n, d) = ((x.mean(0), np.atleast_2d(np.cov(x.T))) for x in (a_ND / scale_D, b_ND / scale_D))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
    return float(np.square(m - n).sum() + np.trace(c) + np.trace(d) - 2 * shared)


# ---------------------------------------------------------------------------------------------- detections

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of an image and class that count, the best ones: COCO's maxDets


def iou(a_N4: np.ndarray, b_M4: np.ndarray, crowd_M: np.ndarray | None = None) -> np.ndarray:
    """Boxes (y0, x0, y1, x1) -> float64 [N, M], intersection over union; over `a` where `b` is a crowd."""
    a, b = a_N4.astype(np.float64)[:, None], b_M4.astype(np.float64)[None]
    shared = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    total = areas[0] + areas[1] - shared
    if crowd_M is not None:
        total = np.where(crowd_M, areas[0], total)
    return shared / np.maximum(total, 1e-300)


def matches(iou_NM: np.ndarray, crowd_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Detections, the best first, against the true boxes of an image -> bool [10, N] twice: which are right
    at each of `IOUS`, and which are of a crowd, so that they count for nothing.

    Each takes the free box that it overlaps most; a box is taken once. What finds none and lies in a crowd is
    of that crowd, which is never used up.
    """
    count, boxes = len(iou_NM), int((~crowd_M).sum())
    levels, least = np.arange(len(IOUS)), np.minimum(IOUS, 1 - 1e-10)
    free, right = np.ones((len(IOUS), boxes), bool), np.zeros((len(IOUS), count), bool)
    for n in range(count if boxes else 0):
        overlap = np.where(free, iou_NM[n, ~crowd_M], -1.0)
        at = boxes - 1 - overlap[:, ::-1].argmax(1)  # the last of equals, as COCO's evaluator does
        right[:, n] = overlap[levels, at] >= least
        free[levels[right[:, n]], at[right[:, n]]] = False
    inside_N = iou_NM[:, crowd_M].max(1, initial=0.0)
    return right, ~right & (inside_N >= least[:, None])


def average_precision(
    score_N: np.ndarray, right_LN: np.ndarray, ignored_LN: np.ndarray, count: int
) -> np.ndarray:
    """[L] areas under precision-recall curves, sampled at COCO's 101 recalls; `count` true boxes."""
    order = np.argsort(-score_N, kind="stable")
    hits = (right_LN & ~ignored_LN)[:, order].cumsum(1)
    counted = (~ignored_LN)[:, order].cumsum(1)
    recall, precision = hits / count, hits / np.maximum(counted, 1)
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    out = np.zeros(len(right_LN))
    for level in range(len(right_LN)):
        at = np.searchsorted(recall[level], RECALLS, side="left")
        out[level] = best[level][at[at < len(order)]].sum() / len(RECALLS)
    return out


def detections(
    box_NM4: np.ndarray,
    label_NM: np.ndarray,
    found_ND4: np.ndarray,
    score_ND: np.ndarray,
    class_ND: np.ndarray,
    crowd_NM: np.ndarray | None = None,
) -> dict[str, Any]:
    """COCO's mean average precision, over all areas (Lin et al. 2014; the same as pycocotools).

    Args:
        box_NM4, label_NM: the true boxes of N images; label -1: none.
        found_ND4, score_ND, class_ND: detections, the best first; score 0 or NaN: none.
        crowd_NM: which true boxes stand for a crowd (COCO's `iscrowd`): there is none to be found, and
            detections inside are neither right nor wrong.

    -> {"map": over IoU 0.5 to 0.95, "map50", "map75", "per_class": [{"label", "boxes", "ap", "ap50"}]},
    averaged over the classes that have a box which is no crowd; None where none has.
    """
    crowd_NM = np.zeros(label_NM.shape, bool) if crowd_NM is None else crowd_NM.astype(bool)
    rows = []
    for label in np.unique(label_NM[(label_NM >= 0) & ~crowd_NM]).tolist():
        is_NM, is_ND = label_NM == label, (class_ND == label) & (score_ND > 0)
        is_ND &= is_ND.cumsum(1) <= MOST
        of_images = [
            matches(iou(found[mine], boxes[true], crowd[true]), crowd[true])
            for found, mine, boxes, true, crowd in zip(
                found_ND4, is_ND, box_NM4, is_NM, crowd_NM, strict=True
            )
        ]
        right_LN, ignored_LN = (np.concatenate(parts, 1) for parts in zip(*of_images, strict=True))
        count = int((is_NM & ~crowd_NM).sum())
        rows.append((int(label), count, average_precision(score_ND[is_ND], right_LN, ignored_LN, count)))
    each = [{"label": k, "boxes": n, "ap": float(ap.mean()), "ap50": float(ap[0])} for k, n, ap in rows]
    mean = np.array([ap for *_, ap in rows]).mean(0) if rows else None
    values = (None, None, None) if mean is None else (float(mean.mean()), float(mean[0]), float(mean[5]))
    return {**dict(zip(("map", "map50", "map75"), values, strict=True)), "per_class": each}
