"""Events and results of a run, for its caller."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bigmodel.program import Program, State


class NotFinite(RuntimeError):
    """The loss or the gradient became NaN or infinite. Nothing of that step was saved."""


@dataclass
class Result:
    """The end of a run."""

    exit_code: int
    step: int
    metrics: dict[str, float]  # of the last evaluation, "eval/<set>/<metric>"
    workdir: pathlib.Path
    program: Program = field(repr=False)
    state: State = field(repr=False)
    best_step: int | None = None  # by checkpoint.best


@dataclass(frozen=True)
class Event:
    """An argument of a callback: a line of the log, an evaluation or a checkpoint of a run."""

    kind: Literal["log", "eval", "save"]
    step: int
    metrics: Mapping[str, float]  # as in metrics.jsonl; of a checkpoint none
    program: Program = field(repr=False)
    # After `step`; the next step reuses its memory. None in "log": the device is a step ahead by then.
    state: State | None = field(default=None, repr=False)


Callback = Callable[[Event], bool | None]  # True ends the run after this step; on all hosts alike
