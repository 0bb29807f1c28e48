"""Reports quality and cost of each stage of a recipe: measured where possible, else labeled as modeled."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from bigmodel import evaluate, log
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.compress import trained
from bigmodel.compress.trained import Trained
from bigmodel.machines import energy
from bigmodel.plan import flops
from bigmodel.units import quantity, size

BATCHES = (1, 32)  # examples whose latency is measured
# Rounds are interleaved over the stages, so that a busy moment of the machine hits all of them. Slow models
# get fewer rounds, but at least three.
ROUNDS, ROUND_S, ENOUGH_S = 7, 0.15, 20.0
Row = dict[str, Any]


def describe(name: str, model: Trained) -> Row:
    """Returns a stage's row without its timings, which `time_all` adds.

    Without held-out data it has no metrics; the first row (`dense`) says so.
    """
    state = {"params": model.params, "rest": model.rest}
    held_out = trained.held_out(model, say=name == "dense")
    values = evaluate.run(model.program, state, held_out) if held_out is not None else {}
    weights, spec = _weights(model), model.program.model.plain_spec
    return {
        "stage": name,
        "metrics": values,
        "params": sum(x.size for x in jax.tree.leaves(spec)),
        "nonzero_params": _nonzero(model),
        "disk_bytes": _disk_bytes(weights),
        "memory_bytes": sum(x.nbytes for x in jax.tree.leaves(weights)),
        "flops_per_example": flops.forward_flops(model.program) / model.config.batch_size,
    }


def _weights(model: Trained) -> dict[str, Any]:
    """Returns the arrays that inference needs."""
    return {"params": model.params, "rest": model.rest}


def _nonzero(model: Trained) -> int:
    """Counts parameters that are not zero; quantized ones after dequantization."""

    @jax.jit
    def count(params: Any, rest: Any) -> Any:
        unpacked, _ = model.program.model.unpacked(params, rest)
        leaves = jax.tree.leaves(unpacked, is_leaf=lambda x: hasattr(x, "astype"))
        return [(w.astype(np.float32) != 0).sum() for w in leaves]

    return sum(int(n) for n in count(model.params, model.rest))


def _disk_bytes(weights: Any) -> int:
    """Writes a checkpoint of the parameters and the rest to measure its size."""
    with tempfile.TemporaryDirectory() as directory:
        with Checkpoints(directory, async_save=False) as checkpoints:
            checkpoints.save(0, weights, {})
        return sum(path.stat().st_size for path in pathlib.Path(directory).rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------- timing


def time_all(rows: Sequence[Row], models: Sequence[Trained]) -> None:
    """Adds latency, throughput and energy to the rows: a forward pass on one device for each batch size."""
    device = jax.devices()[0]
    meter = energy.Meter([device])
    for row in rows:
        row |= {"latency_s": {}, "examples_per_s": {}, "joules_per_example": {}, "peak_bytes": {}}
    for n in BATCHES:
        calls = [_forward(m, n, device, bool(row["metrics"])) for m, row in zip(models, rows, strict=True)]
        seconds, joules = _interleaved([call for call, _ in calls], meter)
        for row, (_, peak), s, used in zip(rows, calls, seconds, joules, strict=True):
            row["latency_s"][str(n)], row["examples_per_s"][str(n)] = s, n / s
            row["peak_bytes"][str(n)] = peak
            watts, why = energy.watts([device])
            row["joules_per_example"][str(n)] = s * watts / n if used is None else used / n
            row["joules_from"] = f"modelled: latency x {why}" if used is None else f"measured: {meter.source}"
            row["latency_from"] = f"measured: median of interleaved rounds, one {device.device_kind} device"


def _forward(model: Trained, n: int, device: jax.Device, has_data: bool) -> tuple[Callable[[], Any], int]:
    """Returns a call that runs `n` held-out examples (or zeros) to the end, and its peak bytes."""
    if has_data:
        first = trained.eval_data(model)[0]
    else:
        first = {name: np.zeros(s.shape, s.dtype) for name, s in model.program.batch_spec.items()}
        first["mask"] = np.ones_like(first["mask"])
    rows = np.arange(n) % max(int(first["mask"].sum()), 1)
    batch = jax.device_put({name: x[rows] for name, x in first.items()}, device)
    params, rest = jax.device_put((model.params, model.rest), device)

    def forward(params: Any, rest: Any, batch: Any) -> Any:
        return model.program.model.apply(params, rest, batch, key=None, train=False)[0]

    compiled = jax.jit(forward).lower(params, rest, batch).compile(dict(model.config.compiler_options))
    memory: Any = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (lambda: jax.block_until_ready(compiled(params, rest, batch))), int(peak)


def _interleaved(
    calls: Sequence[Callable[[], Any]], meter: energy.Meter
) -> tuple[list[float], list[float | None]]:
    """Returns medians over the rounds: seconds a call, and joules a call if there is a counter."""
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    joules: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() - start > ENOUGH_S:
            break
        for index, call in enumerate(calls):
            before, began, count = meter.joules(), time.perf_counter(), 0
            while time.perf_counter() - began < ROUND_S or not count:
                call()
                count += 1
            seconds[index].append((time.perf_counter() - began) / count)
            after = meter.joules()
            if before is not None and after is not None:
                joules[index].append((after - before) / count)
    return (
        [statistics.median(times) for times in seconds],
        [statistics.median(used) if used else None for used in joules],
    )


# ----------------------------------------------------------------------------------------------- printing


def table(rows: Sequence[Row]) -> list[str]:
    """Returns the rows as a table for a terminal, dense first."""
    names = main_metrics(rows[0]["metrics"])
    head = ["stage", *names, "params", "nonzero", "disk", "memory", "FLOP/ex", *(f"ms b{n}" for n in BATCHES)]
    head += [f"ex/s b{BATCHES[-1]}", f"mJ/ex b{BATCHES[-1]}"]
    lines = [head]
    for row in rows:
        last = str(BATCHES[-1])
        lines.append([
            row["stage"], *(f"{row['metrics'][name]:.4f}" for name in names), quantity(row["params"]),
            quantity(row["nonzero_params"]), size(row["disk_bytes"]), size(row["memory_bytes"]),
            quantity(row["flops_per_example"]), *(f"{1e3 * row['latency_s'][str(n)]:.3g}" for n in BATCHES),
            f"{row['examples_per_s'][last]:.3g}", f"{1e3 * row['joules_per_example'][last]:.3g}",
        ])  # fmt: skip
    wide = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = [str.ljust, *[str.rjust] * len(wide)]  # the first column is text, the others are numbers
    text = ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, wide, strict=False)) for line in lines]
    return [*text, f"latency {rows[0]['latency_from']}; joules {rows[0]['joules_from']}", *notes(rows)]


def main_metrics(metrics: Iterable[str]) -> list[str]:
    """Returns the one or two metrics that people read first."""
    known, metrics = ("bits_per_byte", "accuracy", "exact_match", "mae", "r2"), set(metrics)
    return [name for name in known if name in metrics][:2] or sorted(metrics)[:2]


def notes(rows: Sequence[Row]) -> list[str]:
    """Says which stages did not make the model faster here, and why."""
    dense, lines = rows[0], []
    for row in rows[1:]:
        gains = [dense["latency_s"][str(n)] / row["latency_s"][str(n)] for n in BATCHES]
        if max(gains) >= 1.05:
            continue
        sparse = row["nonzero_params"] < 0.95 * row["params"]
        why = "it does the same work"
        if row["memory_bytes"] < 0.9 * dense["memory_bytes"]:
            why = "its products run on floats that are dequantized first, which saves bytes, not time"
        elif sparse:
            why = "a dense unit multiplies zeros like any other number"
        lines.append(
            f"{row['stage']}: not faster than dense here ({', '.join(f'{g:.2f}x' for g in gains)}): {why}"
        )
    return lines


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draws quality against bytes and against latency, one numbered dot a stage.

    A dark dot is a stage that no other stage dominates (smaller or faster, and no worse); a line joins them.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    name = main_metrics(rows[0]["metrics"])[0]
    up = name in ("accuracy", "exact_match", "r2")
    figure = Figure(figsize=(10, 4 + 0.22 * len(rows)), layout="constrained")
    quality = [row["metrics"][name] for row in rows]
    last = str(BATCHES[-1])
    costs = {
        "memory (MiB)": [row["memory_bytes"] / 2**20 for row in rows],
        f"latency of {last} examples (ms)": [1e3 * row["latency_s"][last] for row in rows],
    }
    for axes, (label, cost) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        front = sorted(pareto(cost, [-q if up else q for q in quality]), key=lambda i: cost[i])
        axes.plot([cost[i] for i in front], [quality[i] for i in front], color=GREY, zorder=1)
        colors = [DARK if i in front else GREY for i in range(len(rows))]
        axes.scatter(cost, quality, s=190, color=colors, zorder=2)
        for i in range(len(rows)):
            axes.annotate(
                str(i), (cost[i], quality[i]), ha="center", va="center", color="white", fontsize=9, zorder=3
            )
        axes.set_xlabel(label)
        axes.margins(0.15)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"{name} ({'higher' if up else 'lower'} is better)")
    dots = {DARK: "no other stage is better in both", GREY: "another stage is"}
    handles = [Line2D([], [], marker="o", ls="", ms=9, color=c, label=text) for c, text in dots.items()]
    stages = [
        Line2D([], [], marker=f"${i}$", ls="", ms=7, color="black", label=row["stage"])
        for i, row in enumerate(rows)
    ]
    figure.legend(handles=[*stages, *handles], loc="outside lower left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


DARK, GREY = "#1f4e79", "#a3abb5"


def pareto(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Returns the indices of points that no other point dominates."""
    points = list(zip(cost, loss, strict=True))
    return [
        i for i, (c, q) in enumerate(points)
        if not any(d <= c and r <= q and (d, r) != (c, q) for d, r in points)
    ]  # fmt: skip


def say(lines: Sequence[str]) -> None:
    for line in lines:
        log.say(line)


# ------------------------------------------------------------------------------------------- several seeds


def spread(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Summarizes the rows of several seeds: for each stage and metric the values, their mean and deviation.

    `gain` is the mean difference from the stage before, seed by seed; `p` is that of a two-sided paired
    t-test (None if all differences are equal).
    """
    out: list[Row] = []
    for index, stage in enumerate(runs[0]):
        metrics = {}
        for name in stage["metrics"]:
            values = [run[index]["metrics"][name] for run in runs]
            metrics[name] = {"values": values, "mean": float(np.mean(values)), "sd": _deviation(values)}
            if index:
                differences = [a - b for a, b in zip(values, out[-1]["metrics"][name]["values"], strict=True)]
                metrics[name] |= {"gain": float(np.mean(differences)), "p": paired_t(differences)}
        out.append({"stage": stage["stage"], "metrics": metrics})
    return out


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_t(differences: Sequence[float]) -> float | None:
    """Returns the p-value of a mean this far from 0 under the null hypothesis (Student 1908)."""
    count, deviation = len(differences), _deviation(differences)
    if not deviation:
        return None
    t, free = float(np.mean(differences)) / (deviation / count**0.5), count - 1
    return float(jax.scipy.special.betainc(free / 2, 0.5, free / (free + t * t)))


def spread_table(rows: Sequence[Row]) -> list[str]:
    """Returns the rows of `spread` as lines for a terminal."""
    lines = []
    for row in rows:
        for name in main_metrics(row["metrics"]):
            m = row["metrics"][name]
            line = f"{row['stage']}: {name} {m['mean']:.4f}, sd {m['sd']:.4f} of {len(m['values'])} seeds"
            if "gain" in m:
                chance = "no spread" if m["p"] is None else f"p = {m['p']:.2g}, paired t"
                line += f"; {m['gain']:+.4f} from the stage before ({chance})"
            lines.append(line)
    return lines
