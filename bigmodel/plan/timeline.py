"""One step as a timeline: a trace for Perfetto or Chrome, and a picture."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bigmodel.plan.schedule import Schedule

COLORS = {
    "matmul": "#4269d0", "attention": "#6cc5b0", "memory": "#efb118", "optimizer": "#a463f2",
    "all-gather": "#ff725c", "all-reduce": "#e15759", "reduce-scatter": "#9c6b4e", "all-to-all": "#97bbf5",
    "collective-permute": "#ff8ab7", "copy": "#cccccc", "offload": "#888888",
}  # fmt: skip


def write(steps: Schedule, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes `step.trace.json` and `step.png`; a loop's body is there once, with its number of rounds."""
    directory.mkdir(parents=True, exist_ok=True)
    trace, picture = directory / "step.trace.json", directory / "step.png"
    trace.write_text(json.dumps({"traceEvents": _trace(steps), "displayTimeUnit": "ms"}) + "\n")
    _draw(steps, picture)
    return [trace, picture]


def _streams(steps: Schedule) -> list[str]:
    names = dict.fromkeys(e.stream for e in steps.events)
    return sorted(names, key=lambda name: (not name.startswith("compute"), name))


def _trace(steps: Schedule) -> list[dict[str, object]]:
    """Chrome's trace events, in microseconds: ui.perfetto.dev opens them."""
    rows = {name: index for index, name in enumerate(_streams(steps))}
    named: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": name}}
        for name, row in rows.items()
    ]
    return named + [
        {
            "ph": "X", "pid": 0, "tid": rows[e.stream], "ts": e.start_s * 1e6, "dur": e.duration_s * 1e6,
            "name": e.kind if e.times == 1 else f"{e.kind} (x {e.times})", "cat": e.kind,
            "args": {"instruction": e.name, "where": e.where, "bytes": e.bytes, "flops": e.flops,
                     "exposed_us": e.exposed_s * 1e6, "times": e.times},
        }
        for e in steps.events
    ]  # fmt: skip


def _draw(steps: Schedule, path: pathlib.Path) -> None:
    """Above, the step's seconds by kind; below, one round of each stream, to scale."""
    streams = _streams(steps)
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(12, 2.6 + 0.5 * len(streams)), height_ratios=[1, len(streams)], layout="constrained"
    )
    left = 0.0
    for kind, seconds in sorted(steps.breakdown().items(), key=lambda kv: -kv[1]):
        color = COLORS.get(kind, COLORS["all-gather"])
        top.barh(0, seconds, left=left, color=color, label=f"{kind} {seconds / steps.total_s:.0%}")
        left += seconds
    top.set(yticks=[], xlim=(0, steps.total_s), title=f"One step: {steps.total_s:.4g} s")
    top.legend(ncols=6, loc="upper left", bbox_to_anchor=(0, -0.35), frameon=False)
    at, end_s = _squeezed(steps)
    for row, stream in enumerate(streams):
        for kind, color in COLORS.items():
            chosen = [e for e in steps.events if e.stream == stream and e.kind == kind]
            bars = [(at(e.start_s), at(e.start_s + e.duration_s) - at(e.start_s)) for e in chosen]
            below.broken_barh(bars, (row - 0.4, 0.8), color=color, linewidth=0)
    loops = " (of every loop one round: the rest is cut out)" if end_s < 0.99 * steps.total_s else ""
    below.set(yticks=range(len(streams)), yticklabels=streams, xlabel=f"seconds{loops}", xlim=(0, end_s))
    below.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _squeezed(steps: Schedule) -> tuple[Callable[[float], float], float]:
    """A map of the step's time that leaves out where no event is (a loop's other rounds), and its end."""
    edges: list[list[float]] = []
    for e in sorted(steps.events, key=lambda e: e.start_s):
        if edges and e.start_s <= edges[-1][1]:
            edges[-1][1] = max(edges[-1][1], e.start_s + e.duration_s)
        else:
            edges.append([e.start_s, e.start_s + e.duration_s])
    points, length = [], 0.0
    for begin, end in edges:
        points += [(begin, length), (end, length + end - begin)]
        length += end - begin
    xs, ys = zip(*points, strict=True)
    return lambda t: float(np.interp(t, xs, ys)), length
