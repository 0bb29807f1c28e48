"""Draws the diagrams of docs/: the Program, a request's path through the server, a model's layout, and muP's
coordinate check (which trains small models for four steps each).

    python scripts/draw.py --out=docs

Pictures of runs come from the runs: plan.py --timeline, train.py (loss.png), compress.py (report.png).
"""

from __future__ import annotations

import pathlib
from typing import Any

import cli
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from bigmodel import trees, units
from bigmodel.config import InputError

PAPER, INK, FAINT = "#ffffff", "#1c2733", "#5d6b7a"  # opaque, so that a dark page shows them too
BLUE, GREEN, SAND, GREY = "#e3edf9", "#e2f3ea", "#fbf0d9", "#eef1f4"
EDGES = {BLUE: "#2f6db5", GREEN: "#2e8b57", SAND: "#b7791f", GREY: "#8793a0"}
CLEAR = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # behind text that a line crosses
AXES = {"fsdp": "#a9c8ec", "tensor": "#f3c98b"}


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"), help="a directory")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: this script reads no config; see --help")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("program", program), ("request", request), ("layout", layout), ("mup", mup)):
        path = args.out / f"{name}.png"
        figure = draw()
        figure.savefig(path, dpi=144, facecolor=PAPER)
        plt.close(figure)
        print(f"wrote     {path}")
    return 0


def canvas(width: float, height: float) -> tuple[Any, Axes]:
    """A figure of `width` x `height` inches whose one axes is measured in inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, at: tuple[float, float, float, float], title: str, text: str = "", fill: str = GREY
) -> None:
    """A box at (left, bottom, width, height) with a bold title and lines under it."""
    left, bottom, width, height = at
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=fill, edgecolor=EDGES[fill], linewidth=1.2,
        )
    )  # fmt: skip
    middle = left + width / 2
    if not text:
        axes.text(middle, bottom + height / 2, title, ha="center", va="center", weight="bold", color=INK)
        return
    axes.text(middle, bottom + height - 0.11, title, ha="center", va="top", weight="bold", color=INK)
    axes.text(
        middle, bottom + height - 0.42, text, ha="center", va="top", fontsize=8.5, color=INK, linespacing=1.45
    )


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    style = {"arrowstyle": "-|>", "color": FAINT, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=begin, arrowprops=style)
    if label:
        middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + 0.06)
        axes.text(*middle, label, ha="center", va="bottom", fontsize=8, color=FAINT, bbox=CLEAR)


USES = (
    ("plan", "compiles it for chips that need not be\nthere: time, memory, energy, dollars"),
    ("train", "runs the very same compiled step"),
    ("checkpoint", "restores into its specs, on any mesh"),
    ("evaluate", "runs its eval_step on held-out data"),
    ("compress", "maps it and its state to a smaller one"),
    ("infer", "builds one that holds parameters only:\ngenerate, serve, export"),
)


def program() -> Any:
    """Config -> Program -> what uses it."""
    figure, axes = canvas(9.6, 3.9)
    box(axes, (0.15, 2.55, 1.75, 0.95), "config", "one Python file\nand flags", BLUE)
    box(axes, (0.15, 0.45, 1.75, 0.95), "mesh", "data x fsdp x tensor\nx expert", BLUE)
    box(
        axes, (2.75, 0.45, 2.35, 3.05), "Program",
        "what a run is, before\nany array exists\n\n"
        "state_spec, batch_spec:\nshape, dtype, sharding\n\n"
        "init, train_step,\neval_step, predict\n\nlower(), compile()",
        GREEN,
    )  # fmt: skip
    arrow(axes, (1.9, 3.02), (2.75, 2.6))
    arrow(axes, (1.9, 0.92), (2.75, 1.4))
    for row, (name, text) in enumerate(USES):
        y = 3.48 - 0.61 * row
        box(axes, (6.0, y - 0.25, 1.1, 0.44), name, fill=SAND)
        axes.text(7.2, y - 0.03, text, va="center", fontsize=8.5, color=INK)
        arrow(axes, (5.1, 1.97 + (y - 1.97) * 0.75), (6.0, y - 0.03))
    return figure


LANES = (("clients", GREY), ("event loop", BLUE), ("engine thread", GREEN), ("text thread", SAND))


def request() -> Any:
    """A request from its arrival to its answer, through the server's threads."""
    figure, axes = canvas(9.6, 4.3)
    step = 2.4
    for lane, (name, fill) in enumerate(LANES):
        axes.text(0.15 + step * lane + 0.9, 4.05, name, ha="center", color=EDGES[fill], weight="bold")
        if lane:
            x = step * lane - 0.15
            axes.plot([x, x], [0.3, 4.15], color="#d5dbe1", linewidth=1, linestyle=(0, (4, 4)))
    at = [0.15 + step * lane for lane in range(4)]
    box(axes, (at[0], 3.0, 1.8, 0.75), "request", "HTTP, JSON", GREY)
    box(axes, (at[1], 2.75, 1.8, 1.0), "check", "key, limits, tokens;\nor 4xx, one line", BLUE)
    box(axes, (at[2], 2.75, 1.8, 1.0), "admit", "clients take turns;\nfree slot and pages", GREEN)
    box(axes, (at[2], 1.55, 1.8, 0.85), "prefill", "prompts, in chunks", GREEN)
    box(axes, (at[2], 0.35, 1.8, 0.85), "decode", "all slots, 4 ids a call", GREEN)
    box(axes, (at[3], 0.35, 1.8, 0.85), "detokenize", "ids to text,\nstop strings", SAND)
    box(axes, (at[1], 0.35, 1.8, 0.85), "stream", "server-sent events,\nor one JSON", BLUE)
    box(axes, (at[0], 0.35, 1.8, 0.85), "answer", "text, piece by piece", GREY)
    arrow(axes, (at[0] + 1.8, 3.35), (at[1], 3.35))
    arrow(axes, (at[1] + 1.8, 3.25), (at[2], 3.25), "queue")
    arrow(axes, (at[2] + 0.9, 2.75), (at[2] + 0.9, 2.4))
    arrow(axes, (at[2] + 0.9, 1.55), (at[2] + 0.9, 1.2))
    arrow(axes, (at[2] + 1.8, 0.77), (at[3], 0.77), "queue")
    # Back over the engine's lane, below its box: the engine waits for nobody who reads.
    low = 0.17
    axes.plot([at[3] + 0.9, at[3] + 0.9, at[1] + 0.9], [0.35, low, low], color=FAINT, linewidth=1.3)
    arrow(axes, (at[1] + 0.9, low), (at[1] + 0.9, 0.35))
    arrow(axes, (at[1], 0.77), (at[0] + 1.8, 0.77))
    # The decode loop.
    edge = at[2] + 1.8
    axes.plot([edge, edge + 0.15, edge + 0.15], [1.05, 1.05, 3.25], color=FAINT, linewidth=1.3)
    arrow(axes, (edge + 0.15, 3.25), (edge, 3.25))
    axes.text(edge + 0.22, 2.0, "next\nstep", va="center", fontsize=8, color=FAINT, bbox=CLEAR)
    return figure


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def layout() -> Any:
    """The parameters of GPT-2 124M on data=2, fsdp=2, tensor=2: which axis cuts which dimension."""
    import jax

    from bigmodel import config as config_lib
    from bigmodel import mesh, tasks
    from bigmodel import program as program_lib

    jax.config.update("jax_num_cpu_devices", 8)
    overrides = {f"mesh.{axis}": size for axis, size in MESH.items()}
    config = config_lib.load("configs/gpt.py:size=124m,seq_len=1024", overrides)
    built = program_lib.build(config, mesh.make_mesh(config, jax.devices("cpu")), tasks.batch_spec(config))
    params = {k: v for k, v in trees.by_path(built.state_spec["params"]).items() if v.size > 100_000}
    figure, axes = canvas(9.6, 0.85 + 0.36 * len(params))
    top = 0.36 * len(params) + 0.1
    heads = {0.15: "parameter", 3.0: "shape, and the mesh axis that cuts it", 7.2: "bytes", 8.2: "a device"}
    for x, name in heads.items():
        axes.text(x, top + 0.33, name, weight="bold", fontsize=9, color=INK)
    for row, (name, spec) in enumerate(params.items()):
        y = top - 0.36 * row
        axes.text(0.15, y, name, va="center", fontsize=9, color=INK, family="monospace")
        cuts = (*spec.sharding.spec, *[None] * len(spec.shape))
        for index, (size, cut) in enumerate(zip(spec.shape, cuts, strict=False)):
            axis = " x ".join(cut) if isinstance(cut, tuple) else cut
            left = 3.0 + 1.0 * index
            color = AXES.get(axis or "", GREY)
            axes.add_patch(plt.Rectangle((left, y - 0.14), 0.94, 0.28, facecolor=color, edgecolor="none"))
            label = f"{size:,} {axis}" if axis else f"{size:,}"
            axes.text(left + 0.47, y, label, ha="center", va="center", fontsize=7.5, color=INK)
        total = spec.size * spec.dtype.itemsize
        share = (
            total * int(jax.numpy.prod(jax.numpy.array(spec.sharding.shard_shape(spec.shape)))) // spec.size
        )
        axes.text(7.2, y, units.size(total), va="center", fontsize=9, color=INK)
        axes.text(8.2, y, units.size(share), va="center", fontsize=9, color=INK)
    return figure


def mup() -> Any:
    """Changes of logits and scores in four steps at widths 64 to 512, in both parametrizations."""
    import jax

    from bigmodel import config as config_lib
    from bigmodel import mesh, tasks
    from bigmodel import program as program_lib
    from bigmodel.study import coordinates

    found: dict[str, dict[int, Any]] = {}
    for title, base in (("standard", 0), ("muP, base width 64", 64)):
        keys = {"model.width": 64, "model.heads": 2, "model.mup_base_width": base, "optim.name": "adamw"}
        keys |= {"optim.lr": 3e-3, "optim.warmup_steps": 0, "optim.schedule": "constant", "batch_size": 8}
        config = tasks.sized(config_lib.load("configs/gpt.py:seq_len=64", keys))
        batch = tasks.make_pipeline(config, "train")[0]
        for width in (64, 128, 256, 512):
            wide = coordinates.of_width(config, width)
            devices = jax.devices("cpu")[:1]
            built = program_lib.build(wide, mesh.make_mesh(wide, devices), tasks.batch_spec(wide))
            found.setdefault(title, {})[width] = coordinates.changes(built, batch, 4)
    return coordinates.draw(found)


if __name__ == "__main__":
    cli.run(main)
