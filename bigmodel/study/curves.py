"""Pictures of a scaling law: IsoFLOP curves, the fit against its runs, and the compute-optimal frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmodel.pictures import FAINT, INK
from bigmodel.study import laws
from bigmodel.study.laws import PUBLISHED, Law
from bigmodel.study.points import Run
from bigmodel.units import quantity

ASIDE = "#c8553d"
CURVES = 7  # budgets whose curves are drawn


def draw(title: str, law: Law, runs: Sequence[Run], below: float) -> Any:
    """Draws a law with the runs that it was fitted to, and those above `below` FLOPs in another color."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.2), layout="constrained")
    (isoflop, frontier), (fit, sizes) = figure.subplots(2, 2)
    values = np.array([(run.params, run.tokens, run.loss, run.flops) for run in runs]).T
    aside = values[3] >= below
    _isoflop(figure, isoflop, law, values)
    _frontier(frontier, law, values, aside)
    _errors(fit, law, values, aside)
    _sizes(sizes, law)
    for axes in (isoflop, frontier, fit, sizes):
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=11)
    return figure


def _isoflop(figure: Any, axes: Any, law: Law, values: np.ndarray) -> None:
    """Loss against parameters, a curve for each of some budgets, runs in the color of their FLOPs."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    params, _, loss, flops = values
    norm, colors = LogNorm(flops.min(), flops.max()), colormaps["viridis"]
    grid = np.geomspace(params.min() / 3, params.max() * 3, 300)
    for budget in np.geomspace(flops.min(), flops.max(), CURVES):
        curve = laws.predict(law, grid, budget / law.about["flops_per"] / grid)[0]
        drawn = curve < 1.15 * loss.max()
        axes.plot(grid[drawn], curve[drawn], color=colors(norm(budget)), linewidth=1)
        best = laws.optimal(law, float(budget))
        axes.plot(best.params, best.loss, "*", color=colors(norm(budget)), markersize=9,
                  markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
    points = axes.scatter(
        params, loss, c=flops, norm=norm, cmap="viridis", s=22, edgecolor="black", linewidth=0.4
    )
    for each in law.about["isoflop"]["budgets"]:
        *polynomial, middle = each["polynomial"]
        near = np.geomspace(each["from"], each["to"], 60)
        axes.plot(near, np.polyval(polynomial, np.log(near) - middle), "--", color="black", linewidth=0.8)
    figure.colorbar(points, ax=axes, label="FLOPs")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="loss")
    parabolas = "; dashed: parabolas" if law.about["isoflop"]["budgets"] else ""
    axes.set_title(f"Curves of equal FLOPs; stars: best size{parabolas}", fontsize=9)
    _plain_ticks(axes)


def _frontier(axes: Any, law: Law, values: np.ndarray, aside: np.ndarray) -> None:
    """Loss against FLOPs: the runs, and the best that each budget can buy."""
    _, _, loss, flops = values
    rows = law.about["frontier"]["optimal"]
    budget = [row["flops"] for row in rows]
    axes.fill_between(budget, [r["low"] for r in rows], [r["high"] for r in rows], color=INK, alpha=0.15,
                      linewidth=0, label=f"{law.level:.0%} of runs")  # fmt: skip
    axes.plot(budget, [row["loss"] for row in rows], color=INK, label="best size of each budget")
    axes.axhline(law.coefficients["E"], color=FAINT, linestyle=":", label=f"E = {law.coefficients['E']:.3g}")
    _scatter(axes, flops, loss, aside)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="loss", title="Compute-optimal frontier")
    _plain_ticks(axes)
    axes.legend(fontsize=8)


def _errors(axes: Any, law: Law, values: np.ndarray, aside: np.ndarray) -> None:
    """Each run's distance from the law, in percent, with its own interval."""
    params, tokens, loss, flops = values
    predicted, low, high = laws.predict(law, params, tokens)
    order = np.argsort(flops)
    band = 100 * np.stack([low / predicted - 1, high / predicted - 1])[:, order]
    axes.fill_between(
        flops[order], *band, color=INK, alpha=0.12, linewidth=0, label=f"{law.level:.0%} interval"
    )
    axes.axhline(0, color=INK, linewidth=1)
    _scatter(axes, flops, 100 * (loss / predicted - 1), aside)
    axes.set(xscale="log", xlabel="FLOPs", ylabel="measured above the law (%)", title="Fit against its runs")
    axes.legend(fontsize=8)


def _sizes(axes: Any, law: Law) -> None:
    """The best parameters and tokens for each budget, with those of published laws."""
    rows = law.about["frontier"]["optimal"]
    budget = np.array([row["flops"] for row in rows])
    per = law.about["flops_per"]
    resampled = np.stack([laws.best_params(law.resamples, c, per) for c in budget], 1)
    for name, color in (("params", INK), ("tokens", ASIDE)):
        found = resampled if name == "params" else budget / per / resampled
        low, high = np.quantile(found, [(1 - law.level) / 2, (1 + law.level) / 2], axis=0)
        axes.fill_between(budget, low, high, color=color, alpha=0.15, linewidth=0)
        power = law.about["frontier"][f"{name}_exponent"]
        axes.plot(budget, [row[name] for row in rows], color=color, label=f"{name}: FLOPs^{power:.2f}")
    for style, (name, published) in zip((":", "--"), PUBLISHED.items(), strict=True):
        sizes = [laws.optimal(published, float(c)).params for c in budget]
        axes.plot(budget, sizes, style, color="gray", linewidth=1, label=f"params, {name}")
    last = rows[-1]
    text = f"{quantity(last['params'])} parameters, {quantity(last['tokens'])} tokens"
    axes.text(
        0.98, 0.03, f"{quantity(last['flops'])}FLOP: {text}", transform=axes.transAxes, fontsize=8, ha="right"
    )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="count", title="Best size of a budget")
    axes.legend(fontsize=8)


def _scatter(axes: Any, x: np.ndarray, y: np.ndarray, aside: np.ndarray) -> None:
    axes.scatter(x[~aside], y[~aside], color=INK, s=16, label="fitted runs")
    if aside.any():
        axes.scatter(x[aside], y[aside], color=ASIDE, marker="D", s=26, label="larger runs, kept aside")


def _plain_ticks(axes: Any) -> None:
    """Losses as 2, 3, 4 on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
