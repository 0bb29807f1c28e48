"""Where a run's numbers go: metrics.jsonl always, TensorBoard beside it, a live progress line, loss.png.

Only process 0 writes. Every other file of the package logs through `logging.getLogger("bigmodel")`.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line for whoever watches the run; process 0 prints it."""
    if jax.process_index() == 0:
        console.print(line, markup=False)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(
            f"{record.levelname.lower()}: {record.getMessage()}"
            if record.levelno > logging.INFO
            else record.getMessage()
        )


def show_logging() -> None:
    """Sends the package's log records to the console, without disturbing the progress line."""
    logger = logging.getLogger("bigmodel")
    if not logger.handlers:
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Writer:
    """Writes metrics by step. A context manager; one for each run, in every process."""

    def __init__(self, workdir: pathlib.Path, *, first_step: int, tensorboard: bool):
        """Drops the lines past `first_step`: their run went further than the checkpoint it left."""
        self._file, self._tensorboard = None, None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
            path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tb"), purge_step=first_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step`: how many training steps are behind these numbers."""
        if self._file is None:
            return
        # JSON has no NaN or infinity; null says that there was no number.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                if value is not None:  # tensorboardX would complain on stderr
                    self._tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """uint8 [H, W, 3] -> pictures/<name>-<step>.png in the workdir, and TensorBoard."""
        if self._file is None:
            return
        import cv2

        path = pathlib.Path(self._file.name).parent / "pictures" / f"{name}-{step:07}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), image_HWC[..., ::-1])
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image_HWC, step, dataformats="HWC")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Progress:
    """One line that says where the run is: in place on a terminal, elsewhere a line each time."""

    def __init__(self) -> None:
        self._live: Live | None = None
        if jax.process_index() == 0 and console.is_terminal:
            self._live = Live(Text(""), console=console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(Text(line))
        else:
            say(line)
            sys.stdout.flush()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in _lines(path)] if path.exists() else []


def plot_loss(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws training and evaluation loss against steps as loss.png; None when there is nothing to draw."""
    rows = read_metrics(workdir)
    names = sorted({name for row in rows for name in row if name.endswith("/loss")}, reverse=True)
    if not names:
        return None
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, "-" if name.startswith("train/") else "o-", label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats)", title=workdir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _lines(path: pathlib.Path) -> list[str]:
    """Whole lines only: a run that was killed may have left half of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
