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
from bigmodel.units import seconds, time_unit

COLORS = {
    "matmul": "#4269d0", "attention": "#6cc5b0", "memory": "#efb118", "optimizer": "#a463f2",
    "communication": "#ff725c", "all-gather": "#ff725c", "all-reduce": "#e15759",
    "reduce-scatter": "#9c6b4e", "all-to-all": "#97bbf5", "collective-permute": "#ff8ab7",
    "copy": "#cccccc", "offload": "#888888",
}  # fmt: skip


PHASES = {"forward": "#9ecae9", "backward": "#f2a87b", "optimizer": "#a463f2", "other": "#dddddd"}


def phase(where: str) -> str:
    """The part of a training step that an instruction belongs to, by the traced program's name for it."""
    if "optimizer" in where:
        return "optimizer"
    if "transpose(" in where:  # recomputed activations too
        return "backward"
    return "forward" if "jvp(" in where else "other"


def write(steps: Schedule, directory: pathlib.Path, title: str) -> list[pathlib.Path]:
    """Writes `step.trace.json` and `step.png`; a loop's body is there once, with its number of rounds.

    Args:
        title: names the config, the target and the mesh.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trace, picture = directory / "step.trace.json", directory / "step.png"
    trace.write_text(json.dumps({"traceEvents": _trace(steps, title), "displayTimeUnit": "ms"}) + "\n")
    _draw(steps, picture, title)
    return [trace, picture]


def _streams(steps: Schedule) -> list[str]:
    names = dict.fromkeys(e.stream for e in steps.events)
    return sorted(names, key=lambda name: (not name.startswith("compute"), name))


def _phases(steps: Schedule) -> list[tuple[str, float, float]]:
    """(phase, start, end) along the compute stream, neighbors of one phase as one.

    An instruction that the traced program does not name belongs to the phase before it.
    """
    spans: list[tuple[str, float, float]] = []
    for e in sorted(steps.events, key=lambda e: e.start_s):
        found = phase(e.where)
        if e.stream != "compute" or e.duration_s == 0 or (found == "other" and spans):
            continue
        if spans and spans[-1][0] in (found, "other"):
            spans[-1] = (found, spans[-1][1], e.start_s + e.duration_s)
        else:
            spans.append((found, e.start_s, e.start_s + e.duration_s))
    return spans


def _trace(steps: Schedule, title: str) -> list[dict[str, object]]:
    """Chrome's trace events, in microseconds: ui.perfetto.dev opens them."""
    rows = {name: index for index, name in enumerate(["phase", *_streams(steps)])}
    names: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}},
        *(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": name}}
            for name, row in rows.items()
        ),
    ]
    names += [
        {"ph": "X", "pid": 0, "tid": 0, "ts": start * 1e6, "dur": (end - start) * 1e6, "name": found}
        for found, start, end in _phases(steps)
    ]
    return names + [
        {
            "ph": "X", "pid": 0, "tid": rows[e.stream], "ts": e.start_s * 1e6, "dur": e.duration_s * 1e6,
            "name": e.kind if e.times == 1 else f"{e.kind} (x {e.times})", "cat": e.kind,
            "args": {"instruction": e.name, "where": e.where, "bytes": e.bytes, "flops": e.flops,
                     "exposed_us": e.exposed_s * 1e6, "times": e.times},
        }
        for e in steps.events
    ]  # fmt: skip


def _draw(steps: Schedule, path: pathlib.Path, title: str) -> None:
    """Above, the step's time by kind; below, one round of each stream, to scale, under its phases."""
    streams = _streams(steps)
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(12, 3.2 + 0.5 * len(streams)), height_ratios=[1, len(streams) + 1],
        layout="constrained",
    )  # fmt: skip
    left, (per_s, unit) = 0.0, time_unit(steps.total_s)
    for kind, seconds_of_kind in sorted(steps.breakdown().items(), key=lambda kv: -kv[1]):
        label = f"{kind} {seconds_of_kind / steps.total_s:.0%}"
        top.barh(0, per_s * seconds_of_kind, left=left, color=_color(kind), label=label)
        left += per_s * seconds_of_kind
    top.set(yticks=[], xlim=(0, per_s * steps.total_s), title=f"{title}\none step: {seconds(steps.total_s)}")
    top.legend(ncols=6, loc="upper left", bbox_to_anchor=(0, -0.35), frameon=False)
    at, end_s = _squeezed(steps)
    per_s, unit = time_unit(end_s)
    for found, start, end in _phases(steps):
        below.broken_barh(
            [(per_s * at(start), per_s * (at(end) - at(start)))], (-0.4, 0.8), color=PHASES[found],
            linewidth=0,
        )  # fmt: skip
    for found in [found for found in PHASES if found in {each[0] for each in _phases(steps)}]:
        below.bar(0, 0, color=PHASES[found], label=found)
    for row, stream in enumerate(streams, 1):
        for kind in dict.fromkeys(e.kind for e in steps.events if e.stream == stream):
            chosen = [e for e in steps.events if e.stream == stream and e.kind == kind]
            bars = [
                (per_s * at(e.start_s), per_s * (at(e.start_s + e.duration_s) - at(e.start_s)))
                for e in chosen
            ]
            below.broken_barh(bars, (row - 0.4, 0.8), color=_color(kind), linewidth=0)
    loops = " (one round of each loop: its other rounds are cut out)" if end_s < 0.99 * steps.total_s else ""
    below.set(
        yticks=range(len(streams) + 1), yticklabels=["phase", *streams], xlabel=f"{unit}{loops}",
        xlim=(0, per_s * end_s),
    )  # fmt: skip
    below.invert_yaxis()
    below.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _color(kind: str) -> str:
    """A kind's color; all that only waits for others has one."""
    return COLORS.get(kind, COLORS["communication"])


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
