"""Pictures of a run's curves: loss.png and metrics.png."""

from __future__ import annotations

import io
import pathlib
import re
from typing import Any

from bigmodel import disk, log
from bigmodel.config import Config

UNPLOTTED = r"grad_norm|lr(_\w+)?|loss_scale|skipped|perplexity"  # settings, and exp(loss)
PANELS = 12  # at most


def plot(directory: pathlib.Path, config: Config) -> list[pathlib.Path]:
    """Draws loss.png, and metrics.png of the task's own metrics, against steps. Returns what was drawn.

    Raises:
        InputError: they cannot be written.
    """
    rows = log.read_metrics(directory)
    curves: dict[str, list[str]] = {}  # "loss": ["train/loss", "eval/test/loss"]
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith(("train/", "eval/"))):
        leaf = name.rpartition("/")[2]
        if not re.fullmatch(UNPLOTTED, leaf):
            curves.setdefault(leaf, []).append(name)
    if not curves:
        return []
    last = max(row["step"] for row in rows)
    data = config.data.name if len(config.data.name) < 50 else f"{config.data.name[:47]}..."
    title = f"{directory.resolve().name}: {config.model.name} on {data}, step {last:,}"
    unit = "" if config.distill.teacher else config.task.loss_unit
    losses = [leaf for leaf in curves if leaf == "loss"] + [leaf for leaf in curves if leaf.endswith("_loss")]
    parts = {leaf: curves.pop(leaf) for leaf in losses}
    paths = [_draw(directory / "loss.png", title, rows, parts, f" ({unit})" if unit else "")]
    return paths + ([_draw(directory / "metrics.png", title, rows, curves)] if curves else [])


def _draw(
    path: pathlib.Path, title: str, rows: list[dict[str, Any]], curves: dict[str, list[str]], unit: str = ""
) -> pathlib.Path:
    """One panel for each metric, with a curve for training and one for each evaluation set."""
    import matplotlib.figure

    names = list(curves)[:PANELS]
    across = 1 if len(names) == 1 else 2 if len(names) <= 4 else 3
    down = -(-len(names) // across)
    figure = matplotlib.figure.Figure(figsize=(max(7, 4 * across), max(4, 2.8 * down)), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, leaf in zip(grid, names, strict=False):
        for name in curves[leaf]:
            points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if points:
                steps, values = zip(*points, strict=True)
                style = "-" if name.startswith("train/") else "o-"
                axes.plot(steps, values, style, label=name.rpartition("/")[0], linewidth=1.2, markersize=4)
        axes.set(xlabel="step", ylabel=leaf + (unit if leaf == "loss" else ""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    disk.write_atomically(path, lambda file: file.write(png.getvalue()), "make room")
    return path
