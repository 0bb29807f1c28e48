"""The best step of a run by `checkpoint.best`, from its log of evaluations: nothing else is stored."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigmodel import log
from bigmodel.config import InputError


class Best:
    """The best evaluation so far by a metric, and how many came since.

    Args:
        choice: `checkpoint.best`: a metric, with a minus where lower is better.
    """

    def __init__(self, choice: str) -> None:
        self.metric, self._sign = choice.removeprefix("-"), -1.0 if choice.startswith("-") else 1.0
        self.step: int | None = None
        self.value, self.since = math.nan, 0

    def improves(self, value: float | None) -> bool:
        """True for a better value than the best so far; a NaN never is one."""
        return value is not None and not (math.isnan(value) or self._sign * value <= self._sign * self.value)

    def add(self, step: int, value: float | None) -> bool:
        """Counts an evaluation. Returns true where it is the best one."""
        if value is None or not self.improves(value):
            self.since += 1
            return False
        self.step, self.value, self.since = step, value, 0
        return True

    def check(self, names: Collection[str]) -> None:
        """Raises InputError where the metric is none of an evaluation's."""
        if self.metric not in names:
            raise InputError(
                f"checkpoint.best={self.metric} is no metric of this run; choose {', '.join(names)}"
            )


def resumed(choice: str, path: pathlib.Path, first_step: int, steps: Collection[int]) -> Best:
    """The best evaluation up to `first_step` whose checkpoint is among `steps`, on every host alike."""
    best = Best(choice)
    rows: list[dict[str, Any]] = log.read_metrics(path) if first_step and jax.process_index() == 0 else []
    for row in rows:
        if best.metric not in row or row["step"] > first_step:
            continue
        if row["step"] in steps or not best.improves(row[best.metric]):
            best.add(row["step"], row[best.metric])
    if jax.process_count() > 1:
        mine = (
            np.int32(-1 if best.step is None else best.step),
            np.float32(best.value),
            np.int32(best.since),
        )
        step, value, since = multihost_utils.broadcast_one_to_all(mine)
        best.step = None if step < 0 else int(step)
        best.value, best.since = float(value), int(since)
    return best
