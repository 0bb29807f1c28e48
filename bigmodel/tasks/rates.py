"""Rates of classifiers with their intervals: calibration, cuts of a score, groups of examples, mistakes.

Intervals are of 95 %. Those of rates are Wilson's (1927; Brown, Cai and DasGupta 2001, section 3.1.1); those
of areas under ROC curves are method 5 of Newcombe (2006, part 2), which are none too narrow near 1 or for few
examples. A score that is NaN predicts nothing. What has no value is None.

Legend: N examples, K classes, G groups, C cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Z = 1.959964  # of a normal deviate: 95 % lie within
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the examples, that a cut selects
MISTAKES = 16


def wilson(hits: Any, counts: Any) -> tuple[np.ndarray, np.ndarray]:
    """The interval of each rate hits / counts, numbers or arrays; 0 to 1 for a count of 0."""
    n, z2 = np.maximum(counts, 1e-300), Z * Z
    middle = (hits + z2 / 2) / (n + z2)
    half = Z / (n + z2) * np.sqrt(hits * (1 - hits / n) + z2 / 4)
    none = counts == 0
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half, 1)
    return np.where(none, 0, low), np.where(none, 1, high)


def rate(right_N: np.ndarray) -> dict[str, Any] | None:
    """A share and its interval: {"value", "low", "high", "count"}."""
    if not len(right_N):
        return None
    low, high = wilson(right_N.sum(), len(right_N))
    return {
        "value": float(right_N.mean()), "low": float(low), "high": float(high), "count": len(right_N),
    }  # fmt: skip


def area(is_N: np.ndarray, score_N: np.ndarray) -> dict[str, Any] | None:
    """The area under the ROC curve and its interval, as `rate`; its ends are the areas that are `Z` of their
    own deviations (Hanley and McNeil 1982, eq. 2, for exponential scores) away."""
    from sklearn.metrics import roc_auc_score

    yes, no = int(is_N.sum()), int((~is_N).sum())
    if not yes or not no or np.isnan(score_N).any():
        return None
    value = float(roc_auc_score(is_N, score_N))

    def end(far: float) -> float:
        near = value
        for _ in range(60):  # bisection
            at = (near + far) / 2
            other = (yes + no) / 2 - 1
            variance = at * (1 - at) * (1 + other * ((1 - at) / (2 - at) + at / (1 + at))) / (yes * no)
            near, far = (near, at) if abs(at - value) > Z * variance**0.5 else (at, far)
        return near

    return {"value": value, "low": end(0.0), "high": end(1.0), "count": len(is_N)}


def reliability(score_N: np.ndarray, right_N: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Calibration in bins of equal width: `count`, mean score `predicted`, share `observed` with its interval
    `low` and `high`, of each; and their `ece`.

    The expected calibration error is that of Guo et al. 2017, eq. 3: a bin holds its upper edge. It is None
    where a score is NaN; the bins leave those out.
    """
    clear_N = ~np.isnan(score_N)
    score_N, right_N = score_N[clear_N].astype(np.float64), right_N[clear_N]
    at = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], score_N, side="left")
    count, hits = np.bincount(at, minlength=bins), np.bincount(at, right_N, bins)
    predicted, observed = (np.bincount(at, x, bins) / np.maximum(count, 1) for x in (score_N, right_N))
    ece = float((count * np.abs(observed - predicted)).sum()) / max(int(count.sum()), 1)
    low, high = wilson(hits, count)
    columns = {"count": count, "predicted": predicted, "observed": observed, "low": low, "high": high}
    return {"ece": ece if clear_N.all() else None} | {name: x.tolist() for name, x in columns.items()}


def cuts(is_N: np.ndarray, score_N: np.ndarray) -> list[dict[str, Any]]:
    """The examples selected by score >= `threshold`: their number and share, precision, recall, and lift
    (precision over the base rate), the highest threshold first.

    Thresholds are 0.5 and those that select `SHARES` of the examples, or more where scores are equal.
    """
    score_N = np.where(np.isnan(score_N), -np.inf, score_N.astype(np.float64))
    order = np.argsort(-score_N, kind="stable")
    falling_N, hits_N = score_N[order], is_N[order].cumsum()
    firsts = [falling_N[int(np.ceil(share * len(order))) - 1] for share in SHARES] if len(order) else []
    threshold_C = np.unique([x for x in (*firsts, 0.5) if x > -np.inf])[::-1]
    rows = []
    for threshold, count in zip(threshold_C, np.searchsorted(-falling_N, -threshold_C, "right"), strict=True):
        hits, positives = int(hits_N[count - 1]) if count else 0, int(is_N.sum())
        precision = hits / count if count else None
        lift = precision * len(is_N) / positives if positives and precision is not None else None
        rows.append({
            "threshold": float(threshold), "selected": int(count), "share": float(count / max(len(is_N), 1)),
            "precision": precision, "recall": hits / positives if positives else None, "lift": lift,
        })  # fmt: skip
    return rows


def compare(
    is_NK: np.ndarray,
    predicted_NK: np.ndarray,
    score_NK: np.ndarray,
    group_N: np.ndarray,
    names: Sequence[str],
    least: int,
) -> dict[str, Any]:
    """Groups of examples, and the largest gaps between two of them over all classes; of two classes, class 1.

    `groups` has for each its `count` and, by class, `base_rate` (of the label), `selection_rate` (of the
    prediction), `tpr`, `fpr` and `roc_auc`, each with its interval. `demographic_parity` (Dwork et al. 2012)
    is the gap in selection rates, `equalised_odds` (Hardt et al. 2016) that in true or false positive rates;
    `between` says which rate of which class, and the groups with the highest and the lowest one.

    Args:
        names: of the groups; an id beyond these is of a group that training did not have.
        least: a gap is between rates that are of as many examples or more; others are only listed.
    """
    classes = [1] if is_NK.shape[1] == 2 else list(range(is_NK.shape[1]))
    rows = []
    for group in np.unique(group_N).tolist():
        inside_N = group_N == group
        each = []
        for k in classes:
            yes, chosen = is_NK[inside_N, k].astype(bool), predicted_NK[inside_N, k]
            each.append({
                "class": k, "base_rate": rate(yes), "selection_rate": rate(chosen), "tpr": rate(chosen[yes]),
                "fpr": rate(chosen[~yes]), "roc_auc": area(yes, score_NK[inside_N, k]),
            })  # fmt: skip
        unknown = "unknown to training" if names else str(group)
        name = names[group] if group < len(names) else unknown
        rows.append({"group": name, "count": int(inside_N.sum()), "classes": each})
    parity, odds = (_widest(rows, kinds, least) for kinds in (("selection_rate",), ("tpr", "fpr")))
    return {
        "least_group": least,
        "demographic_parity": parity and parity.pop("gap"),
        "equalised_odds": odds and odds.pop("gap"),
        "between": {"demographic_parity": parity, "equalised_odds": odds},
        "groups": rows,
    }


def _widest(rows: Sequence[dict[str, Any]], kinds: Sequence[str], least: int) -> dict[str, Any] | None:
    """The largest gap between two groups in one of these rates of one class; None without two groups."""
    found = []
    for kind in kinds:
        for at, label in enumerate([each["class"] for each in rows[0]["classes"]] if rows else ()):
            values = [(row["classes"][at][kind], row["group"]) for row in rows]
            firm = [(one["value"], group) for one, group in values if one and one["count"] >= least]
            ranked = sorted(firm, key=lambda pair: pair[0])
            if len(ranked) > 1:
                (low, lowest), (high, highest) = ranked[0], ranked[-1]
                found.append({
                    "gap": high - low, "rate": kind, "class": label, "highest": highest, "lowest": lowest,
                })  # fmt: skip
    return max(found, key=lambda row: row["gap"], default=None)


def surest_mistakes(wrong: np.ndarray, sureness: np.ndarray) -> list[tuple[int, ...]]:
    """The places in `wrong`, bool of any shape, of the `MISTAKES` that are the surest, these first."""
    at = np.argwhere(wrong)
    order = np.argsort(-sureness[wrong], kind="stable")[:MISTAKES]
    return [tuple(row) for row in at[order].tolist()]


def lines(report: dict[str, Any]) -> list[str]:
    """Returns lines of text on the cuts and gaps of a report."""
    out = []
    for row in report.get("cuts", ()):
        values = (row[key] for key in ("precision", "recall", "lift"))
        precision, recall, lift = ("-" if x is None else f"{x:.3f}" for x in values)
        out.append(
            f"cut       score >= {row['threshold']:.4f} selects {row['selected']:,} ({row['share']:.1%}): "
            f"precision {precision}, recall {recall}, lift {lift}"
        )
    for name, pair in report.get("gaps", {}).get("between", {}).items():
        if pair and report["gaps"][name]:
            out.append(
                f"gap       {name} {report['gaps'][name]:.4f}: {pair['rate']} of class {pair['class']}, "
                f"highest in {pair['highest']}, lowest in {pair['lowest']}"
            )
    return out
