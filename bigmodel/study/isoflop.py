"""IsoFLOP parabolas (Hoffmann et al. 2022, approach 2): the best size of each budget, and how it grows.

A parabola only approximates the loss around its minimum. The estimate is biased, even without noise, where
alpha differs from beta, or where the sizes of a budget reach far or lie to one side of the minimum (Czech et
al. 2026). So the same parabolas are put through the law's own losses, whose minima are known: the difference
is the bias of this set of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigmodel.units import quantity

ALIKE = 0.1  # relative: FLOPs of one budget
LEAST, ENOUGH = 3, 5  # sizes of a budget
BIASED, BIASED_SIZE = 0.01, 0.1  # of the exponent, and of the best size: worth a warning
FURTHER = 10
LossOf = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (params, tokens) -> loss


def estimate(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray, law: LossOf
) -> dict[str, Any]:
    """Plain values for law.json: `budgets` with their minima, the exponents, the bias, warnings."""
    chosen = [each for each in _budgets(flops) if len(set(params[each])) >= LEAST]
    budgets = [_parabola(params[i], tokens[i], loss[i], flops[i]) for i in chosen]
    good = [each for each in budgets if each["inside"]]
    if len(good) < 2:
        return {
            "budgets": budgets,
            "warnings": [
                f"no exponent: {len(good)} budgets have {LEAST} or more sizes, FLOPs within {ALIKE:.0%}, "
                "and the minimum between them; 2 are needed"
            ],
        }
    ideal = [_parabola(params[i], tokens[i], law(params[i], tokens[i]), flops[i]) for i in chosen]
    ideal = [each for each, real in zip(ideal, budgets, strict=True) if real["inside"]]
    (power, _), (truth, best) = _line(good), _line([each | {"params": _minimum(each, law)} for each in good])
    biased, reached = _line(ideal)
    bias = {"params_exponent": biased - truth, "params": math.exp(reached - best) - 1}
    return {
        "budgets": budgets,
        "params_exponent": power,
        "tokens_exponent": 1 - power,
        "bias": bias,  # `params` at FURTHER times the largest budget, relative
        "warnings": _warnings(budgets, bias),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Says in lines of text what was found."""
    out = []
    if "params_exponent" in found:
        out.append(
            f"parabolas of {len(found['budgets'])} budgets: FLOPs^{found['params_exponent']:.3f} for params"
        )
    return out + [f"warning: {text}" for text in found["warnings"]]


def _budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Indices of runs whose FLOPs are alike."""
    order, out = np.argsort(flops), []
    while len(order):
        alike = flops[order] <= flops[order[0]] * (1 + ALIKE)
        out.append(order[alike])
        order = order[~alike]
    return out


def _parabola(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray) -> dict[str, Any]:
    x = np.log(params)
    middle = x.mean()
    curvature, slope, level = np.polyfit(x - middle, loss, 2)
    at = float(middle - slope / (2 * curvature)) if curvature > 0 else math.nan
    budget = float(f"{np.exp(np.log(flops).mean()):.6g}")
    return {
        "flops": budget,
        "per": float(np.median(flops / params / tokens)),
        "points": len(set(params)),
        "inside": bool(x.min() < at < x.max()),
        "params": math.exp(at) if abs(at) < 700 else math.nan,
        "loss": float(level - slope**2 / (4 * curvature)) if curvature > 0 else math.nan,
        "from": float(params.min()),
        "to": float(params.max()),
        "polynomial": [
            float(curvature),
            float(slope),
            float(level),
            float(middle),
        ],  # in log params - the last
    }


def _minimum(budget: dict[str, Any], law: LossOf) -> float:
    """Params with the law's lowest loss, on a fine grid around the budget's sizes."""
    grid = np.geomspace(budget["from"] / 30, budget["to"] * 30, 20001)
    return float(grid[np.argmin(law(grid, budget["flops"] / budget["per"] / grid))])


def _line(budgets: list[dict[str, Any]]) -> tuple[float, float]:
    """Log params against log FLOPs -> its slope, and its value at `FURTHER` times the largest budget."""
    flops = np.log([each["flops"] for each in budgets])
    slope, level = np.polyfit(flops - flops.max(), np.log([each["params"] for each in budgets]), 1)
    return float(slope), float(level + slope * math.log(FURTHER))


def _warnings(budgets: list[dict[str, Any]], bias: dict[str, float]) -> list[str]:
    out = []
    for each in budgets:
        name = f"{quantity(each['flops'])}FLOP"
        if each["points"] < ENOUGH:
            out.append(
                f"{name}: {each['points']} sizes leave a parabola little to average over; {ENOUGH} do better"
            )
        if not each["inside"]:
            out.append(
                f"{name}: the minimum is not between the sizes, and is left out; add smaller or larger ones"
            )
            continue
        off = abs(math.log(each["params"] ** 2 / each["from"] / each["to"])) / math.log(
            each["to"] / each["from"]
        )
        if off > 0.5:
            out.append(
                f"{name}: the sizes lie to one side of the minimum, which shifts it (Czech et al. 2026)"
            )
    power, size = bias["params_exponent"], bias["params"]
    if not (abs(power) < BIASED and abs(size) < BIASED_SIZE):
        out.append(
            f"biased: on the law's own losses the exponent is off by {power:+.3f}, and the size at {FURTHER} "
            f"times the largest budget by {size:+.0%}: use the law's"
        )
    return out
