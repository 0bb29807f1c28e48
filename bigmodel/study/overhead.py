"""The seconds that a run takes beyond its training steps on this machine: starting, compiling, evaluating.

They are measured, once a program: a run of it is started, and ended after its second evaluation.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bigmodel import disk, log
from bigmodel.config import InputError
from bigmodel.machines.processes import die_with_parent
from bigmodel.study.price import Price

EVALUATIONS = 2  # of a probe: the first compiles
POLL_S = 0.05
FRESH_S = 3600.0  # a measurement is used again: this machine may have been busy
ENDED = (0, 3, 75)  # done, diverged, stopped by us: the ledger is sound
MOST = 3  # programs of a study that are probed; for the others the seconds are interpolated


@dataclass(frozen=True)
class Overhead:
    """Seconds of a run beyond its training steps."""

    fixed_s: float  # once: starting, reading data, compiling, making the first state, saving
    evaluation_s: float  # each time that the run evaluates

    def of(self, steps: int, every_steps: int) -> float:
        """Seconds of a run of `steps` that evaluates every so many steps, and at its end."""
        return self.fixed_s + self.evaluation_s * -(-steps // every_steps)


def with_overhead(price: Price, seconds: float) -> Price:
    """The price of steps alone -> that of a run; dollars and energy are counted by the second."""
    share = 1 + seconds / max(price["total_s"], 1e-12)
    return {key: value if key == "total_flops" else value * share for key, value in price.items()}


def measure(command: Sequence[str], key: str) -> Overhead:
    """Starts a run and ends it after its second evaluation.

    Args:
        command: trains; flags are added to it.
        key: of the program, which the measurement is cached by.

    Raises:
        InputError: the run ended by an error.
    """
    digest = hashlib.sha256(f"{key} {' '.join(command[2:])}".encode()).hexdigest()[:32]
    cached = disk.cache_dir() / "overheads" / f"{digest}.json"
    with contextlib.suppress(FileNotFoundError, InputError, TypeError):
        if time.time() - cached.stat().st_mtime < FRESH_S:
            return Overhead(**disk.read_json(cached))
    with tempfile.TemporaryDirectory(prefix="bigmodel-probe-") as folder:
        found = _probe(command, pathlib.Path(folder) / "run")
    with disk.writing(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(cached, asdict(found))
    return found


def _probe(command: Sequence[str], directory: pathlib.Path) -> Overhead:
    flags = ("--config.eval.every_steps=1", "--config.log.every_steps=1", f"--workdir={directory}")
    output = directory.with_name("output.txt")
    with output.open("wb") as file:
        process = subprocess.Popen(
            die_with_parent([*command, *flags]), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        while process.poll() is None and len(_evaluations(_rows(directory))) < EVALUATIONS:
            time.sleep(POLL_S)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in ENDED:
        last = output.read_text(errors="replace").strip().rpartition("\n")[2]
        raise InputError(f"measuring a run's overhead failed with exit code {code}: {last}")
    return _of_run(_rows(directory), disk.read_json(directory / "ledger.json"))


def _of_run(rows: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any]) -> Overhead:
    evaluations = _evaluations(rows)
    evaluation_s = evaluations[-1] if evaluations else 0.0
    seconds = ledger["seconds"]
    beyond = ledger["total_s"] - seconds.get("step", 0.0) - seconds.get("input", 0.0)
    return Overhead(max(beyond - len(evaluations) * evaluation_s, 0.0), evaluation_s)


def _rows(directory: pathlib.Path) -> list[dict[str, Any]]:
    return log.read_metrics(directory) if (directory / "metrics.jsonl").exists() else []


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of each evaluation: from the line of its step's training metrics to its own last line."""
    trained = {row["step"]: row["time"] for row in rows if "perf/step_time_s" in row}
    done = {row["step"]: row["time"] for row in rows if any(key.startswith("eval/") for key in row)}
    return [done[step] - trained[step] for step in sorted(done) if step in trained]


def spread(steps_s: Sequence[float]) -> list[int]:
    """Indices of the programs to probe: the quickest, the slowest and one between them."""
    order = sorted(range(len(steps_s)), key=steps_s.__getitem__)
    chosen = np.linspace(0, len(order) - 1, min(MOST, len(order)))
    return [order[round(each)] for each in chosen]


def between(step_s: float, known: Mapping[float, Overhead]) -> Overhead:
    """The overhead of a program, by the seconds of its step, from those that were measured."""
    at = sorted(known)
    return Overhead(
        float(np.interp(step_s, at, [known[each].fixed_s for each in at])),
        float(np.interp(step_s, at, [known[each].evaluation_s for each in at])),
    )
