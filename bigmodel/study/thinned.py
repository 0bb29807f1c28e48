"""Curves of a run's log with fewer points: each a mean, with the lowest and the highest line it stands for.

Legend: n lines that have a metric, p points drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMED = 20  # steps whose value is not finite are named up to so many


def curves(rows: Sequence[Mapping[str, Any]], most: int) -> dict[str, dict[str, Any]]:
    """Metrics of log lines as curves, by name -> `at` [p], indices of rows, `y` [p], None where not finite.

    A metric of more than `most` lines has `low` and `high` [p] too: `y` is then the mean of `lines_per_point`
    lines, the last of which is at `at`. The first and the last line stay points of their own.
    """
    at: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, bool):
                continue
            if value is None or isinstance(value, int | float):
                at.setdefault(name, []).append(index)
                values.setdefault(name, []).append(_number(value))
    found = {name: _curve(np.array(at[name]), np.array(values[name]), most) for name in at}
    steps = [row["step"] for row in rows]
    for name, curve in found.items():
        bad = [steps[i] for i, y in zip(at[name], values[name], strict=True) if not math.isfinite(y)]
        curve |= {"lines": len(at[name]), "not_finite": len(bad), "not_finite_at": bad[:NAMED]}
    return found


def _number(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf


def _curve(at_n: np.ndarray, y_n: np.ndarray, most: int) -> dict[str, Any]:
    if len(at_n) <= most:
        return {"at": at_n.tolist(), "y": _plain(y_n)}
    parts = [y_n[:1], *np.array_split(y_n[1:-1], most - 2), y_n[-1:]]
    ends = np.cumsum([len(part) for part in parts]) - 1
    finite = [part[np.isfinite(part)] for part in parts]
    return {
        "at": at_n[ends].tolist(),
        "y": _plain([_mean(part) for part in finite]),
        "low": _plain([part.min() if len(part) else math.nan for part in finite]),
        "high": _plain([part.max() if len(part) else math.nan for part in finite]),
        "lines_per_point": len(parts[1]),
    }


def _mean(part: np.ndarray) -> float:
    """The mean, within the values' range also where the sum rounds or overflows; NaN for none."""
    if not len(part):
        return math.nan
    scale = max(float(abs(part).max()), 1.0)
    return float(np.clip((part / scale).mean() * scale, part.min(), part.max()))


def _plain(values: Any) -> list[float | None]:
    return [float(y) if math.isfinite(y) else None for y in values]


def rows_used(found: dict[str, dict[str, Any]]) -> list[int]:
    """Indices of the rows at which some curve has a point; the curves' `at` become indices into this list."""
    used = sorted({index for curve in found.values() for index in curve["at"]})
    place = {index: n for n, index in enumerate(used)}
    for curve in found.values():
        curve["at"] = [place[index] for index in curve["at"]]
    return used
