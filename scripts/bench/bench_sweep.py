"""Compares the samplers and pruners of scripts/sweep.py on a task whose best settings are known.

    python scripts/bench/bench_sweep.py --seeds=5 --trials=40

The task: gradient descent with momentum on a quadratic function of 20 dimensions and condition number 100,
100 steps from the same start. Its metric is log10 of the last value; the best learning rate and momentum are
found by trying 160,000 of them. Printed: how far the best found is from that after the same steps of training
for every method, the mean over seeds and the worst, and how many trials that were.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigmodel.study import trials
from bigmodel.study.order import Definition
from bigmodel.study.sweep import Study

CURVATURES = np.logspace(0, 2, 20)
STEPS, RUNGS = 100, (10, 20, 40, 100)  # evaluations are at the rungs
OVER = ("lr=1e-4..1e-1", "momentum=0..0.99")
METHODS = {
    "grid": ("", "none"),
    "random": ("random", "none"),
    "tpe": ("tpe", "none"),
    "random, halving": ("random", "halving"),
    "tpe, halving": ("tpe", "halving"),
}


def losses(lr: Any, momentum: Any) -> Iterator[tuple[int, Any]]:
    """Step and log10 of the value at each rung, for arrays of settings."""
    lr, momentum = np.asarray(lr)[..., None], np.asarray(momentum)[..., None]
    x, velocity = np.ones(CURVATURES.size) + 0 * lr, 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, STEPS + 1):
            velocity = momentum * velocity - lr * CURVATURES * x
            x = x + velocity
            if step in RUNGS:
                yield step, np.log10(np.sum(CURVATURES * x * x, -1) / 2 + 1e-30)


def optimum() -> float:
    """The lowest last value over 400 x 400 settings."""
    lr, momentum = np.meshgrid(np.logspace(-4, -1, 400), np.linspace(0, 0.99, 400))
    *_, (_, last) = losses(lr, momentum)
    return float(np.nanmin(last))


def search(method: str, count: int, seed: int, directory: pathlib.Path) -> list[tuple[int, float]]:
    """Steps trained so far and the best last value, after each trial; in all the steps of `count` trials."""
    sampler, prune = METHODS[method]
    space = trials.parse(OVER if sampler else _grid(count))
    study = Study(directory, Definition("task", (), "eval/loss", False, sampler, OVER, prune, seed), space)
    study.enqueue([] if sampler else _shuffled(space.grid(), seed)[:count])
    out, steps, best = [], 0, math.inf
    while steps < count * STEPS and (trial := study.next_trial(count * STEPS)) is not None:
        settings, state, value = trial.user_attrs["settings"], "complete", math.inf
        for step, found in losses(float(settings["lr"]), float(settings["momentum"])):
            value = float(found) if math.isfinite(found) else 99.0
            trial.report(value, step)
            if trial.should_prune() and step < STEPS:
                state = "pruned"
                break
        study.end(trial, state, value)
        steps, best = steps + step, min(best, value if state == "complete" else math.inf)
        out.append((steps, best))
    return out


def _grid(count: int) -> list[str]:
    side = math.ceil(count**0.5)
    rates = ",".join(f"{x:.6g}" for x in np.logspace(-4, -1, side))
    return [f"lr={rates}", "momentum=" + ",".join(f"{x:.6g}" for x in np.linspace(0, 0.99, side))]


def _shuffled(grid: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    order = np.random.default_rng(seed).permutation(len(grid))
    return [grid[index] for index in order]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--trials", type=int, default=40)
    args = flags.parse_args()
    best, after = optimum(), [k for k in (10, 20, 40, 80) if k <= args.trials]
    print(f"best possible {best:.3f}; distance of the best found, mean (worst) of {args.seeds} seeds")
    print(f"{'':16}" + "".join(f"{f'{k * STEPS:,} steps':>18}" for k in after) + f"{'trials':>9}")
    for method in METHODS:
        rows = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(search(method, args.trials, seed, pathlib.Path(folder) / "study"))
        cells = [[min(x for steps, x in row if steps <= k * STEPS) - best for row in rows] for k in after]
        line = "".join(f"{f'{statistics.mean(c):.2f} ({max(c):.2f})':>18}" for c in cells)
        print(f"{method:16}{line}{statistics.mean(map(len, rows)):>9.0f}", flush=True)


if __name__ == "__main__":
    main()
