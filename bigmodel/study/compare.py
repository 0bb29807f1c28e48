"""Comparison of a study's settings over seeds: means, intervals, and the test that calls two different.

Legend: n seeds of a setting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bigmodel.study.trials import Settings

LEVEL = 0.95  # of intervals; two settings differ where p < 1 - LEVEL


@dataclass(frozen=True)
class Group:
    """One setting's values over its seeds."""

    settings: Settings  # without the seed
    values: tuple[float, ...]
    mean: float
    deviation: float | None  # of a sample; None for one seed
    interval: tuple[float, float] | None  # of the mean, by Student's t
    p: float | None = None  # against the best group: Welch's t-test, by Holm's correction


def groups(results: Sequence[tuple[Settings, float]], maximize: bool = False) -> list[Group]:
    """Settings that differ in `seed` alone as one group, the best first.

    Each group but the best has the p-value of Welch's unequal-variances t-test against the best (Welch 1947),
    corrected for the number of tests (Holm 1979); None where a group has one seed, or all are equal.
    """
    by_settings: defaultdict[tuple[tuple[str, str], ...], list[float]] = defaultdict(list)
    for settings, value in results:
        by_settings[tuple((k, v) for k, v in settings.items() if k != "seed")].append(value)
    found = [_group(dict(key), values) for key, values in by_settings.items()]
    found.sort(key=lambda g: (-g.mean if maximize else g.mean) if np.isfinite(g.mean) else np.inf)
    return _tested(found)


def _group(settings: Settings, values: Sequence[float]) -> Group:
    n, mean = len(values), float(np.mean(values))
    if n < 2 or not np.isfinite(mean):
        return Group(settings, tuple(values), mean, None, None)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / n**0.5
    return Group(settings, tuple(values), mean, deviation, (mean - half, mean + half))


def _tested(found: list[Group]) -> list[Group]:
    if not found or not found[0].deviation:
        return found
    best, out = found[0], [found[0]]
    raw = [
        float(stats.ttest_ind(best.values, g.values, equal_var=False).pvalue)
        if g.deviation is not None and (g.deviation or best.deviation)
        else None
        for g in found[1:]
    ]
    order = sorted((p, index) for index, p in enumerate(raw) if p is not None)
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    for index, group in enumerate(found[1:]):
        out.append(Group(**{**vars(group), "p": corrected.get(index)}))
    return out


def table(found: Sequence[Group], metric: str) -> list[str]:
    """Lines for people: a row a group."""
    lines = [f"settings, by the mean {metric} over seeds:"]
    for g in found:
        name = ", ".join(f"{key}={value}" for key, value in g.settings.items()) or "as the config is"
        text = f"  {g.mean:.6g}  {name}  ({len(g.values)} {'run' if len(g.values) == 1 else 'runs'}"
        if g.deviation is not None and g.interval is not None:
            low, high = g.interval
            text += f", sd {g.deviation:.3g}, {LEVEL:.0%} of the mean {low:.6g} to {high:.6g}"
        if g.p is not None:
            different = "differs from" if g.p < 1 - LEVEL else "is not shown to differ from"
            text += f"; {different} the best, p = {g.p:.2g}"
        lines.append(text + ")")
    return lines
