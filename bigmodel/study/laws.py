"""Scaling laws: fitted to runs, written as law.json, read, and used to predict and to choose a size.

    L(N, D) = E + A N^-alpha + B D^-beta (+ F (D/N)^gamma)

Which form: `fitting.FORMS` from the simplest on; the next one only where both AICc and the error on the
largest quarter of the runs, left out of the fit, say so. Intervals are percentiles over resampled runs, each
of which chooses its form anew by AICc; those of predictions add the runs' own noise.

Legend: R resamples, M points to predict, N runs.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigmodel import disk
from bigmodel.config import InputError
from bigmodel.study import fitting, isoflop
from bigmodel.study.fitting import FORMS, Points
from bigmodel.study.points import FLOPS_PER_PARAMETER_AND_TOKEN, Run

NAMES = ("E", "A", "B", "alpha", "beta", "F", "gamma")  # as in `theta`, where E, A, B and F are logarithms
LOGARITHMS = np.array([True, True, True, False, False, True, False])
CHOSEN_BY = 2.0  # AICc: a smaller gain is none (Burnham & Anderson 2002)
OVERTRAINED = 100.0  # tokens a parameter, 5 times Chinchilla's: from here on the term for it is tried
FAR = 5.0  # robust standard deviations: such runs are named
SOURCES = {
    "method": "Hoffmann et al. 2022, arXiv 2203.15556, approach 3: Huber loss of log loss, delta 1e-3",
    "corrections": "Besiroglu et al. 2024, arXiv 2404.10102: sums, tight tolerance, resampled intervals",
    "alpha = beta": "Gadre et al. 2024, arXiv 2403.08540: over-training",
    "parabolas": "Hoffmann et al. 2022, approach 2; their bias: Czech et al. 2026, arXiv 2603.22339",
}


@dataclass(frozen=True)
class Settings:
    """Choices of a fit."""

    form: str = "auto"
    below: float = math.inf  # FLOPs: larger runs are predicted, not fitted
    level: float = 0.9
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Law:
    """One law with its uncertainty; `about` is what law.json says of it besides."""

    theta: np.ndarray  # [7], `NAMES`
    resamples: np.ndarray = field(default_factory=lambda: np.zeros((0, 7)))  # [R, 7]
    noise: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of log loss, [N]
    level: float = 0.9
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def coefficients(self) -> dict[str, float]:
        return {name: float(x) for name, x in zip(NAMES, _values(self.theta), strict=True)}

    @property
    def intervals(self) -> dict[str, list[float]]:
        ends = _interval(_values(self.resamples), self.level)
        return {name: [float(low), float(high)] for name, low, high in zip(NAMES, *ends, strict=True)}


@dataclass(frozen=True)
class Optimum:
    """The size that a budget is best spent on."""

    params: float
    tokens: float
    loss: float
    low: float  # NaN for a law without resamples
    high: float


def _law(e: float, a: float, b: float, alpha: float, beta: float, source: str) -> Law:
    about = {"source": source, "units": {"loss": "nats a token", "params": "parameters", "tokens": "tokens"}}
    return Law(np.array([*np.log([e, a, b]), alpha, beta, -np.inf, 0.0]), about=about)


# Of Hoffmann et al.'s runs on MassiveText. Losses depend on data and tokenizer; exponents carry over better.
PUBLISHED = {
    "hoffmann2022": _law(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, equation 10 (rounded)"),
    "besiroglu2024": _law(
        1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, refit of the same runs"
    ),
}


def fit(runs: Sequence[Run], left_out: Sequence[dict[str, str]], settings: Settings) -> Law:
    """Fits a law to runs of one group.

    Raises:
        InputError: too few runs, or runs that cannot tell A from B.
    """
    inside = [run for run in runs if run.flops < settings.below]
    params, tokens, loss, flops = _arrays(inside)
    _check(inside, left_out, params, tokens)
    points = Points.of(params, tokens, loss)
    if settings.form == "auto":
        tried = [form for form in FORMS if form != "overtrained" or (tokens / params).max() > OVERTRAINED]
        fits = {form: fitting.fit(points, form) for form in tried}
        form, why = _choose(points, fits, flops)
        if form != "overtrained":  # nor does a resample have the term then
            fits.pop("overtrained", None)
    else:
        form, why = settings.form, "as --form says"
        fits = {form: fitting.fit(points, form)}
    theta = fits[form]
    noise = points.log_loss - fitting.log_law(theta[None], points.x, points.y)[0][0]
    weights = np.random.default_rng(settings.seed).multinomial(
        len(inside), np.full(len(inside), 1 / len(inside)), size=settings.resamples
    )
    resampled = _resample(points, fits, weights)
    free, per = FORMS[form].shape[1], float(np.median(flops / params / tokens))
    law = Law(
        theta=_uncentered(theta[None], points.center)[0],
        resamples=_uncentered(resampled, points.center),
        noise=noise * math.sqrt(len(inside) / max(len(inside) - free, 1)),
        level=settings.level,
    )
    about = {
        "form": form,
        "chosen": why,
        "runs": len(inside),
        "flops": [float(flops.min()), float(flops.max())],
        "flops_per": per,
        "mean_error": float(abs(np.expm1(-noise)).mean()),
        "outliers": _outliers(inside, noise),
        "left_out": list(left_out),
        "isoflop": isoflop.estimate(params, tokens, loss, flops, lambda n, d: predict(law, n, d)[0]),
        "frontier": _frontier(law, flops, per),
        "predicted": _held_out(law, [run for run in runs if run.flops >= settings.below]),
    }
    law.about.update(about)
    return law


def predict(law: Law, params: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns losses [M], and the ends of the interval in which a run's loss lies with `law.level`.

    The interval has the uncertainty of the law and the noise of a run. Without resamples it is NaN.
    """
    x, y = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))
    loss = np.exp(fitting.log_law(law.theta[None], x, y)[0][0])
    if not len(law.resamples):
        return loss, np.full_like(loss, np.nan), np.full_like(loss, np.nan)
    draws = np.random.default_rng(0).choice(law.noise, (len(law.resamples), 1))
    ends = []
    for part in np.array_split(np.arange(len(x)), len(x) // 500 + 1):
        sampled = fitting.log_law(law.resamples, x[part], y[part])[0] + draws
        ends.append(_interval(np.exp(sampled), law.level))
    low, high = np.concatenate(ends, axis=1)
    return loss, low, high


def optimal(law: Law, flops: float, per: float | None = None) -> Optimum:
    """The parameters and tokens with the lowest loss for so many FLOPs = per x params x tokens.

    Args:
        per: by default as in the runs that the law was fitted to; 6 for published laws.
    """
    per = per or law.about.get("flops_per", FLOPS_PER_PARAMETER_AND_TOKEN)
    params = float(best_params(law.theta[None], flops, per)[0])
    tokens = flops / per / params
    loss, low, high = (float(x[0]) for x in predict(law, np.array([params]), np.array([tokens])))
    return Optimum(params, tokens, loss, low, high)


def write(path: pathlib.Path, laws: dict[str, Law], about: dict[str, Any]) -> None:
    """Writes law.json: one law's values at the top, or those of each group under `laws`."""
    plain = {group: _plain(law) for group, law in laws.items()}
    head = about | {"law": "L(N, D) = E + A N^-alpha + B D^-beta + F (D/N)^gamma", "sources": SOURCES}
    disk.write_json(path, disk.without_nan(head | (plain[""] if set(plain) == {""} else {"laws": plain})))


def read(name: str) -> tuple[dict[str, Law], dict[str, str]]:
    """Reads law.json, or takes published coefficients by their name.

    Returns:
        Laws by group, "" where there are none; and the names of the columns that they were fitted to.

    Raises:
        InputError: it is neither.
    """
    if name in PUBLISHED:
        return {"": PUBLISHED[name]}, {"loss": "", "by": "", "params": "params"}
    try:
        tree = disk.read_json(pathlib.Path(name))
        found = {group: _from_plain(each) for group, each in tree.get("laws", {"": tree}).items()}
        return found, {key: str(tree[key]) for key in ("loss", "by", "params")}
    except FileNotFoundError as error:
        names = ", ".join(PUBLISHED)
        raise InputError(
            f"{name} does not exist; give a law.json of scripts/laws.py fit, or {names}"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name} is no law of scripts/laws.py fit ({error!r}); fit it again") from error


def predict_rows(known: dict[str, Law], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns each run's row with `predicted_loss`, `low` and `high`.

    Raises:
        InputError: a run's group has no law.
    """
    out: list[dict[str, Any]] = [{} for _ in runs]
    for group in dict.fromkeys(run.group for run in runs):
        if group not in known:
            raise InputError(
                f"no law of {group!r}; the laws are of {', '.join(map(repr, known))}: fit one, or mend it"
            )
        mine = [i for i, run in enumerate(runs) if run.group == group]
        params, tokens, _, _ = _arrays([runs[i] for i in mine])
        for i, loss, low, high in zip(mine, *predict(known[group], params, tokens), strict=True):
            out[i] = runs[i].row | {"predicted_loss": float(loss), "low": float(low), "high": float(high)}
    return out


def lines(group: str, law: Law) -> list[str]:
    """Says in lines of text what a fit found."""
    about, ends = law.about, law.intervals
    value = law.coefficients
    names = [name for name in NAMES if name not in ("F", "gamma") or about["form"] == "overtrained"]
    out = [
        f"{group or 'law'}: {about['form']}, {about['runs']} runs, mean error {about['mean_error']:.2%}",
        f"  form    {about['chosen']}",
        *(f"  {name:7} {value[name]:.4g} ({ends[name][0]:.4g} to {ends[name][1]:.4g})" for name in names),
    ]
    if value["E"] < fitting.DELTA:
        out.append("  E is 0 within these runs: larger ones, or more tokens, would show a loss that remains")
    frontier = about["frontier"]
    for what in ("params", "tokens"):
        power, (low, high) = frontier[f"{what}_exponent"], frontier[f"{what}_exponent_interval"]
        out.append(f"  optimal {what} grow as FLOPs^{power:.3f} ({low:.3f} to {high:.3f})")
    out += [f"  IsoFLOP {line}" for line in isoflop.lines(about["isoflop"])]
    if known := about["predicted"]:
        out.append(
            f"  larger  {known['runs']} runs kept aside: mean error {known['mean_error']:.2%}, "
            f"{known['inside']} inside the {law.level:.0%} interval"
        )
    out += [f"  far     {x['run']}: {x['error']:+.1%} of the law; it counts" for x in about["outliers"]]
    return out + [f"  without {x['run']}: {x['why']}" for x in about["left_out"]]


def _arrays(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    table = np.array([(run.params, run.tokens, run.loss, run.flops) for run in runs], float).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _check(
    runs: Sequence[Run], left_out: Sequence[dict[str, str]], params: np.ndarray, tokens: np.ndarray
) -> None:
    least = FORMS["gadre"].shape[1] + 3
    where = f" of {runs[0].group}" if runs and runs[0].group else ""
    if len(runs) < least:
        without = (
            f" ({len(left_out)} left out; {left_out[0]['run']}: {left_out[0]['why']})" if left_out else ""
        )
        raise InputError(
            f"{len(runs)} usable runs{where}{without}; a law needs {least}: train or give more runs"
        )
    if len(set(params)) < 3 or len(np.unique(np.round(np.log(tokens / params), 2))) < 2:
        raise InputError(
            f"the runs{where} have too few sizes: give 3 or more numbers of parameters, and for some of them "
            "different tokens for a parameter"
        )


def _choose(points: Points, fits: dict[str, np.ndarray], flops: np.ndarray) -> tuple[str, str]:
    """Chooses among fits -> the form's name, and why."""
    order = np.argsort(flops)
    smaller, larger = np.split(order, [round(0.75 * len(order))])
    ones = np.ones((1, len(order)))
    score: dict[str, tuple[float, float]] = {}
    for form, theta in fits.items():
        error = math.inf
        if len(smaller) > FORMS[form].shape[1] + 1:
            part = fitting.fit(points.of_runs(smaller), form)
            log = fitting.log_law(part[None], points.x[larger], points.y[larger])[0][0]
            error = float(abs(np.expm1(log - points.log_loss[larger])).mean())
        score[form] = float(fitting.aicc(points, form, theta[None], ones)[0]), error
    best = next(iter(score))
    for form in score:
        if score[form][0] < score[best][0] - CHOSEN_BY and score[form][1] < score[best][1]:
            best = form
    scores = ", ".join(f"{form} {aicc:.1f} and {min(error, 1):.2%}" for form, (aicc, error) in score.items())
    return best, f"by AICc and the error on the largest quarter of the runs: {scores}"


def _resample(points: Points, fits: dict[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Fits each resample, in the form that AICc chooses for it -> [R, 7]."""
    best, criterion = np.zeros((len(weights), 7)), np.full(len(weights), np.inf)
    for form, start in fits.items():
        theta = fitting.resample(points, form, start, weights)
        each = fitting.aicc(points, form, theta, weights)
        better = (each < criterion - CHOSEN_BY) | (form == next(iter(fits)))
        best, criterion = np.where(better[:, None], theta, best), np.where(better, each, criterion)
    return best


def _uncentered(theta: np.ndarray, center: tuple[float, float]) -> np.ndarray:
    """Moves log A, log B and log F from the runs' mean to one parameter and one token."""
    x, y = center
    e, a, b, alpha, beta, f, gamma = theta.T
    return np.stack([e, a + alpha * x, b + beta * y, alpha, beta, f - gamma * (y - x), gamma], -1)


def _values(theta: np.ndarray) -> np.ndarray:
    return np.where(LOGARITHMS, np.exp(np.where(LOGARITHMS, np.minimum(theta, 700), 0)), theta)


def _interval(values: np.ndarray, level: float) -> np.ndarray:
    """Percentiles over the first axis -> [2, ...]."""
    if not len(values):
        return np.full((2, *values.shape[1:]), np.nan)
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _outliers(runs: Sequence[Run], noise: np.ndarray) -> list[dict[str, Any]]:
    spread = 1.4826 * np.median(abs(noise - np.median(noise)))  # of a normal distribution its deviation
    far = abs(noise) > max(FAR * spread, fitting.DELTA)
    return [
        {"run": run.name, "error": math.expm1(x)}
        for run, x, is_far in zip(runs, noise, far, strict=True)
        if is_far
    ]


def _held_out(law: Law, runs: Sequence[Run]) -> dict[str, Any]:
    if not runs:
        return {}
    params, tokens, measured, _ = _arrays(runs)
    loss, low, high = predict(law, params, tokens)
    return {
        "runs": len(runs),
        "mean_error": float(abs(loss / measured - 1).mean()),
        "inside": int(((low <= measured) & (measured <= high)).sum()),
        "of": [[run.name, float(x / y - 1)] for run, x, y in zip(runs, loss, measured, strict=True)],
    }


def best_params(theta: np.ndarray, flops: float, per: float) -> np.ndarray:
    """Parameters with the lowest loss on FLOPs = per x params x tokens, for each of [R, 7] -> [R].

    Along that line log of the loss is convex in log params, so thirds of the range are cut off.
    """
    total = math.log(flops / per)
    low, high = np.zeros((len(theta), 1)), np.full((len(theta), 1), total)
    for _ in range(90):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        falls = (
            fitting.log_law(theta, left, total - left)[0] > fitting.log_law(theta, right, total - right)[0]
        )
        low, high = np.where(falls, left, low), np.where(falls, high, right)
    return np.exp((low + high)[:, 0] / 2)


def _frontier(law: Law, flops: np.ndarray, per: float) -> dict[str, Any]:
    """Compute-optimal sizes from the smallest run to 1,000 times the largest, and how they grow."""
    budgets = np.geomspace(flops.min(), 1000 * flops.max(), 13)
    growth = [
        np.log(best_params(theta, 10 * flops.max(), per) / best_params(theta, flops.max(), per))
        / math.log(10)
        for theta in (law.theta[None], law.resamples)
    ]
    low, high = (float(x) for x in _interval(growth[1], law.level))
    power = float(growth[0][0])
    return {
        "params_exponent": power,
        "params_exponent_interval": [low, high],
        "tokens_exponent": 1 - power,
        "tokens_exponent_interval": [1 - high, 1 - low],
        "optimal": [{"flops": float(c), **vars(optimal(law, float(c), per))} for c in budgets],
    }


def _plain(law: Law) -> dict[str, Any]:
    return {
        **law.coefficients,
        "intervals": law.intervals,
        "level": law.level,
        **law.about,
        "noise": [float(f"{x:.5g}") for x in law.noise],
        "theta": [None if math.isinf(x) else float(x) for x in law.theta],  # log E, log A, log B, alpha, ...
        "resamples": [[None if math.isinf(x) else float(f"{x:.9g}") for x in row] for row in law.resamples],
    }


def _from_plain(tree: dict[str, Any]) -> Law:
    def array(rows: Any) -> np.ndarray:
        found = np.array(json.loads(json.dumps(rows)), float)
        return np.where(np.isnan(found), -np.inf, found)

    about = {k: v for k, v in tree.items() if k not in (*NAMES, "intervals", "noise", "theta", "resamples")}
    return Law(
        theta=array(tree["theta"]).reshape(7),
        resamples=array(tree["resamples"]).reshape(-1, 7),
        noise=array(tree["noise"]),
        level=float(tree["level"]),
        about=about,
    )
