"""Fits of L(N, D) = E + A N^-alpha + B D^-beta (+ F (D/N)^gamma) to runs.

Hoffmann et al. 2022 (approach 3): Huber's loss of log L, the law as a logsumexp, L-BFGS from a grid of
starts. The sum over runs is minimized, to a tight tolerance: with the mean, L-BFGS stops early (Besiroglu et
al. 2024). A start is exact in E, A and B, in which the law is linear once alpha and beta are chosen (variable
projection: Czech et al. 2026). Starts and resamples are refined all at once, by Gauss-Newton steps that
weight each run by the slope of Huber's loss.

Legend: B problems (starts or resamples), N runs, P free parameters of a form, T terms of the law. `theta` is
(log E, log A, log B, alpha, beta, log F, gamma), with A, B, F at the runs' mean log N and log D.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

DELTA = 1e-3  # of Huber's loss (Hoffmann et al. 2022)
GRID = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3)  # of alpha and beta
POLISHED = 3  # starts that L-BFGS goes on from
ITERATIONS, PATIENCE = 400, 12
# Free parameters -> theta. Gadre et al. 2024: alpha = beta, so that the reducible loss falls with one power
# of compute at any number of tokens for a parameter. Overtrained: a term that grows with that number.
CHINCHILLA = np.eye(7, 5)
GADRE = np.column_stack([*CHINCHILLA[:, :3].T, CHINCHILLA[:, 3] + CHINCHILLA[:, 4]])
FORMS = {"gadre": GADRE, "chinchilla": CHINCHILLA, "overtrained": np.eye(7)}  # the simplest first


@dataclass(frozen=True)
class Points:
    """Runs as centered logarithms, float64 [N]."""

    x: np.ndarray  # log params
    y: np.ndarray  # log tokens
    log_loss: np.ndarray
    center: tuple[float, float]  # what was taken from log params and log tokens

    @classmethod
    def of(cls, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Points:
        x, y = np.log(params), np.log(tokens)
        return cls(x - x.mean(), y - y.mean(), np.log(loss), (float(x.mean()), float(y.mean())))

    def of_runs(self, chosen: np.ndarray) -> Points:
        """Some of the runs, centered as all are."""
        return Points(self.x[chosen], self.y[chosen], self.log_loss[chosen], self.center)


def log_law(theta_B7: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the law -> [B, N], and each term's share of it, [B, N, T]."""
    e, a, b, alpha, beta, f, gamma = theta_B7.T[:, :, None]
    terms = np.stack([e + 0 * x_N, a - alpha * x_N, b - beta * y_N, f + gamma * (y_N - x_N)], -1)
    top = terms.max(-1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(-1, keepdims=True)
    return (top + np.log(total))[..., 0], parts / total


def fit(points: Points, form: str) -> np.ndarray:
    """Fits a form -> theta [7]."""
    from scipy.optimize import minimize

    ones_1N = np.ones((1, len(points.x)))
    start_BP, sum_B = _refine(points, form, _starts(points, form), ones_1N)

    def objective(free_P: np.ndarray) -> tuple[float, np.ndarray]:
        residual, slope = _residuals(points, form, free_P[None])
        return float(_huber(residual).sum()), np.einsum("bn,bnp->p", np.clip(residual, -DELTA, DELTA), slope)

    tight = {"ftol": 1e-15, "gtol": 1e-10, "maxcor": 20, "maxiter": 3000, "maxfun": 6000}
    ends = [
        minimize(objective, start_BP[i], jac=True, method="L-BFGS-B", options=tight)
        for i in np.argsort(sum_B)[:POLISHED]
    ]
    return _theta(form, min(ends, key=lambda end: end.fun).x[None])[0]


def resample(points: Points, form: str, theta_7: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Fits a form again to each resample, rows of `weight_BN` as often as they were drawn -> theta [B, 7]."""
    free_P = np.linalg.lstsq(FORMS[form], np.where(np.isfinite(theta_7), theta_7, 0.0), rcond=None)[0]
    free_P[0] = max(
        free_P[0], points.log_loss.min() + np.log(0.02)
    )  # at E = 0 log E has no slope to leave by
    free_BP, _ = _refine(points, form, np.tile(free_P, (len(weight_BN), 1)), weight_BN)
    return _theta(form, free_BP)


def aicc(points: Points, form: str, theta_B7: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Akaike's criterion with its correction for few runs -> [B]; the lower the better, inf for too few runs.

    Errors are taken as Laplace's, for which Huber's loss with a small delta stands.
    """
    log_BN, _ = log_law(theta_B7, points.x, points.y)
    runs, count = len(points.x), FORMS[form].shape[1] + 1
    if runs <= count + 1:
        return np.full(len(theta_B7), np.inf)
    mean_B = (weight_BN * abs(log_BN - points.log_loss)).sum(-1) / weight_BN.sum(-1)
    penalty = 2 * count + 2 * count * (count + 1) / (runs - count - 1)
    return 2 * runs * np.log(mean_B + 1e-12) + penalty


def _theta(form: str, free_BP: np.ndarray) -> np.ndarray:
    theta_B7 = free_BP @ FORMS[form].T
    if form != "overtrained":
        theta_B7[:, 5] = -np.inf  # F = 0
    return theta_B7


def _residuals(points: Points, form: str, free_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the law minus log of the loss [B, N], and its slope in each free parameter [B, N, P]."""
    log_BN, share = log_law(_theta(form, free_BP), points.x, points.y)
    e, a, b, f = np.moveaxis(share, -1, 0)
    slope = np.stack([e, a, b, -points.x * a, -points.y * b, f, (points.y - points.x) * f], -1)
    return log_BN - points.log_loss, slope @ FORMS[form]


def _huber(residual: np.ndarray) -> np.ndarray:
    size = abs(residual)
    return np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2))


def _starts(points: Points, form: str) -> np.ndarray:
    """Each pair of exponents on the grid with the E, A, B that fit best by least squares -> [B, P]."""
    starts = []
    for alpha, beta in itertools.product(GRID, GRID):
        if form == "gadre" and alpha != beta:
            continue
        basis = np.stack([np.ones_like(points.x), np.exp(-alpha * points.x), np.exp(-beta * points.y)], -1)
        basis = basis / np.exp(points.log_loss)[:, None]
        linear = np.linalg.lstsq(basis, np.ones_like(points.x), rcond=None)[0]
        logs = np.log(np.maximum(linear, 1e-3 * np.exp(points.log_loss.min())))
        starts.append([*logs, alpha, beta, logs[0] - 5, 0.5])
    return np.array(starts)[:, {"gadre": [0, 1, 2, 3], "chinchilla": range(5)}.get(form, range(7))]


def _refine(
    points: Points, form: str, free_BP: np.ndarray, weight_BN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowers the weighted sum of Huber's losses of all problems at once -> parameters [B, P], sums [B].

    A step solves weighted least squares (the weights are Huber's slope over the residual), damped as by
    Levenberg and Marquardt. A step that does not lower the sum is not taken.
    """
    free_BP, weight_BN = free_BP.copy(), np.broadcast_to(weight_BN, (len(free_BP), len(points.x)))
    damping_B, idle_B = np.full(len(free_BP), 1e-2), np.zeros(len(free_BP), int)
    sum_B = (weight_BN * _huber(_residuals(points, form, free_BP)[0])).sum(-1)
    eye = np.eye(free_BP.shape[1])
    for _ in range(ITERATIONS):
        on = np.flatnonzero(idle_B < PATIENCE)
        if not len(on):
            break
        residual, slope = _residuals(points, form, free_BP[on])
        weight = weight_BN[on] / np.maximum(1, abs(residual) / DELTA)
        left = slope.swapaxes(1, 2) * weight[:, None]
        normal = left @ slope
        size = np.einsum("bpp->bp", normal)
        size = size + 1e-9 * size.max(-1, keepdims=True)
        normal = normal + eye * (damping_B[on, None] * size)[:, None]
        trial = free_BP[on] - np.linalg.solve(normal, left @ residual[..., None])[..., 0]
        if form == "overtrained":
            trial[:, 6] = np.maximum(trial[:, 6], 0.05)  # this term may only grow with D/N
        after = (weight_BN[on] * _huber(_residuals(points, form, trial)[0])).sum(-1)
        better = after < sum_B[on]
        idle_B[on] = np.where(after < sum_B[on] * (1 - 1e-7), 0, idle_B[on] + 1)
        damping_B[on] = np.clip(damping_B[on] * np.where(better, 0.2, 4), 1e-10, 1e10)
        free_BP[on[better]], sum_B[on[better]] = trial[better], after[better]
    return free_BP, sum_B
