"""Metrics as sums that add exactly across batches, devices and hosts.

A metric is (sum, weight), two float32 scalars; its value is sum / weight. Under `jax.jit` over a mesh a sum
already spans all devices and hosts; over batches, `Sums` adds in float64 on the host. What is no sum (areas
under curves, gaps between groups) is computed below from the scores and labels of all examples.

Legend: N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Sums:
    """Adds the metrics of many batches; `values` divides once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
        for name, pair in jax.device_get(dict(metrics)).items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

    def values(self) -> dict[str, float]:
        """Raises ValueError for a metric that no example carried weight for: it has no value."""
        empty = [name for name, (_, weight) in self._sums.items() if weight == 0]
        if empty or not self._sums:
            raise ValueError(f"no example counted towards {', '.join(empty) or 'any metric'}")
        return {name: float(total / weight) for name, (total, weight) in self._sums.items()}


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
    seen = (predicted_K + actual_K) > 0
    micro = ratios(right_K.sum(), predicted_K.sum(), actual_K.sum())
    return {
        "per_class": {name: value.tolist() for name, value in each.items()},
        "micro": {name: float(value) for name, value in micro.items()},
        "macro": {name: float(value[seen].mean()) for name, value in each.items()},
    }


def top_k(score_NK: np.ndarray, label_N: np.ndarray, k: int) -> float:
    """The share of labels that fewer than k classes beat."""
    chosen_N1 = np.take_along_axis(score_NK, label_N[:, None], 1)
    return float(((score_NK > chosen_N1).sum(1) < k).mean())


def areas(is_NK: np.ndarray, score_NK: np.ndarray) -> dict[str, Any]:
    """Areas under the ROC and precision-recall curves (average precision), one class against the rest.

    Args:
        is_NK: whether each example is of each class, [N, K].
        score_NK: any score that rises with the belief in it, [N, K].

    -> {"roc_auc": {"macro": .., "per_class": [..]}, "pr_auc": ..}; None for a class that no example, or every
    one, is of. Macro leaves those out.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    out = {}
    for name, function in (("roc_auc", roc_auc_score), ("pr_auc", average_precision_score)):
        values = [
            float(function(yes, score)) if 0 < yes.sum() < len(yes) else None
            for yes, score in zip(is_NK.T, score_NK.T, strict=True)
        ]
        known = [value for value in values if value is not None]
        out[name] = {"macro": float(np.mean(known)) if known else None, "per_class": values}
    return out


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Calibration in bins of equal width: {"count", "confidence", "accuracy"} of each, and their `ece`.

    The expected calibration error is that of Guo et al. 2017, eq. 3.
    """
    at = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    confidence = np.bincount(at, confidence_N, bins) / np.maximum(count, 1)
    accuracy = np.bincount(at, right_N, bins) / np.maximum(count, 1)
    ece = float((count * np.abs(accuracy - confidence)).sum()) / max(int(count.sum()), 1)
    columns = {"count": count, "confidence": confidence, "accuracy": accuracy}
    return {"ece": ece} | {name: column.tolist() for name, column in columns.items()}


def group_gaps(label_NK: np.ndarray, predicted_NK: np.ndarray, group_N: np.ndarray) -> dict[str, Any]:
    """How differently groups are treated, the largest difference between two groups over all classes.

    `demographic_parity` (Dwork et al. 2012): of the rate of being predicted; `equalised_odds` (Hardt et al.
    2016): of that rate among those who are of the class, and among those who are not.
    """
    groups = np.unique(group_N)

    def gap(counted_NK: np.ndarray) -> float:
        rates = np.full((len(groups), label_NK.shape[1]), np.nan)
        for row, group in enumerate(groups):
            inside = (group_N == group)[:, None] & counted_NK
            total = inside.sum(0)
            rates[row, total > 0] = ((predicted_NK & inside).sum(0) / np.maximum(total, 1))[total > 0]
        both = (~np.isnan(rates)).sum(0) > 1
        return float(np.max(np.nanmax(rates[:, both], 0) - np.nanmin(rates[:, both], 0), initial=0.0))

    everyone = np.ones_like(label_NK, bool)
    return {
        "groups": {str(group): int((group_N == group).sum()) for group in groups},
        "demographic_parity": gap(everyone),
        "equalised_odds": max(gap(label_NK.astype(bool)), gap(~label_NK.astype(bool))),
    }


def classification(
    score_NK: np.ndarray, label: np.ndarray, group_N: np.ndarray | None = None, k: int = 5
) -> dict[str, Any]:
    """Everything above, for classifiers.

    Args:
        label: int [N] beside softmax scores, or 0/1 [N, K] beside sigmoid's.
    """
    classes = score_NK.shape[1]
    out: dict[str, Any] = {"examples": len(score_NK)}
    if label.ndim == 1:
        predicted_N = score_NK.argmax(1)
        is_NK, predicted_NK = np.eye(classes, dtype=bool)[label], np.eye(classes, dtype=bool)[predicted_N]
        out["accuracy"] = float((predicted_N == label).mean())
        if k < classes:
            out[f"top{k}"] = top_k(score_NK, label, k)
        out["confusion"] = confusion(label, predicted_N, classes).tolist()
        out["calibration"] = reliability(score_NK.max(1), predicted_N == label)
    else:
        is_NK, predicted_NK = label > 0.5, score_NK > 0.5
        out["accuracy"] = float((is_NK == predicted_NK).mean())
        out["exact_match"] = float((is_NK == predicted_NK).all(1).mean())
        confidence_NK = np.maximum(score_NK, 1 - score_NK)
        out["calibration"] = reliability(confidence_NK.ravel(), (is_NK == predicted_NK).ravel())
    out |= precision_recall_f1((is_NK & predicted_NK).sum(0), predicted_NK.sum(0), is_NK.sum(0))
    out |= areas(is_NK, score_NK)
    if group_N is not None:
        out["gaps"] = group_gaps(is_NK, predicted_NK, group_N)
    return out


def regression(value_NK: np.ndarray, label_NK: np.ndarray) -> dict[str, Any]:
    """Mean squared and absolute error, and R2 averaged over the outputs."""
    error_NK = value_NK.astype(np.float64) - label_NK
    spread = np.square(label_NK - label_NK.mean(0, dtype=np.float64)).sum(0)
    r2 = 1 - np.square(error_NK).sum(0) / np.maximum(spread, 1e-300)
    return {
        "examples": len(value_NK),
        "mse": float(np.square(error_NK).mean()),
        "mae": float(np.abs(error_NK).mean()),
        "r2": float(r2.mean()),
    }


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """The Frechet distance of two sets of features as if each were Gaussian (Heusel et al. 2017, eq. 6),
    in units of the standard deviations of `a`: |m - n|^2 + tr(C + D - 2 (C D)^1/2)."""
    scale = np.maximum(a_ND.std(0, dtype=np.float64), 1e-6)
    (m, c), (n, d) = ((x.mean(0), np.cov(x.T)) for x in (a_ND / scale, b_ND / scale))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
    return float(np.square(m - n).sum() + np.trace(c) + np.trace(d) - 2 * shared)


# ---------------------------------------------------------------------------------------------- detections

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def iou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """Boxes (y0, x0, y1, x1) -> float64 [N, M], intersection over union."""
    a, b = a_N4.astype(np.float64)[:, None], b_M4.astype(np.float64)[None]
    shared = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-300)


def matches(iou_NM: np.ndarray) -> np.ndarray:
    """Detections, the best first, against the true boxes of an image -> bool [10, N], which are right at each
    of `IOUS`. Each takes the free box that it overlaps most; a box is taken once."""
    count, boxes = iou_NM.shape
    free, right = np.ones((len(IOUS), boxes), bool), np.zeros((len(IOUS), count), bool)
    levels = np.arange(len(IOUS))
    for n in range(count if boxes else 0):
        overlap = np.where(free, iou_NM[n], -1.0)
        at = boxes - 1 - overlap[:, ::-1].argmax(1)  # the last of equals, as COCO's evaluator does
        right[:, n] = overlap[levels, at] >= np.minimum(IOUS, 1 - 1e-10)
        free[levels[right[:, n]], at[right[:, n]]] = False
    return right


def average_precision(score_N: np.ndarray, right_LN: np.ndarray, count: int) -> np.ndarray:
    """[L] areas under precision-recall curves, sampled at COCO's 101 recalls; `count` true boxes."""
    order = np.argsort(-score_N, kind="stable")
    hits = right_LN[:, order].cumsum(1)
    recall, precision = hits / count, hits / np.arange(1, len(order) + 1)
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
) -> dict[str, Any]:
    """COCO's mean average precision, over all areas (Lin et al. 2014; the same as pycocotools).

    Args:
        box_NM4, label_NM: the true boxes of N images; label -1: none.
        found_ND4, score_ND, class_ND: detections, the best first; score 0: none.

    -> {"map": over IoU 0.5 to 0.95, "map50", "map75", "per_class": [{"label", "boxes", "ap", "ap50"}]},
    averaged over the classes that are there.
    """
    rows = []
    for label in np.unique(label_NM[label_NM >= 0]).tolist():
        is_NM, is_ND = label_NM == label, (class_ND == label) & (score_ND > 0)
        right = [
            matches(iou(found[mine], boxes[true]))
            for found, mine, boxes, true in zip(found_ND4, is_ND, box_NM4, is_NM, strict=True)
        ]
        ap = average_precision(score_ND[is_ND], np.concatenate(right, 1), int(is_NM.sum()))
        rows.append((int(label), int(is_NM.sum()), ap))
    ap_KL = np.array([ap for *_, ap in rows]).reshape(-1, len(IOUS))
    each = [{"label": k, "boxes": n, "ap": float(ap.mean()), "ap50": float(ap[0])} for k, n, ap in rows]
    mean = ap_KL.mean(0) if rows else np.zeros(len(IOUS))
    return {"map": float(mean.mean()), "map50": float(mean[0]), "map75": float(mean[5]), "per_class": each}
