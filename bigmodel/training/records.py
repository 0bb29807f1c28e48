"""A run, and its events and results for its caller."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bigmodel import log
from bigmodel.data import Pipeline
from bigmodel.ledger import Ledger
from bigmodel.program import Program, State
from bigmodel.training import ending


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


@dataclass
class Run:
    """The parts of one run."""

    program: Program
    path: pathlib.Path
    train_data: Pipeline
    eval_data: Mapping[str, Pipeline]  # by the name of the set
    ledger: Ledger
    end: ending.Ending = field(default_factory=ending.Ending)
    callbacks: Sequence[Callback] = ()
    at_end: Callable[[pathlib.Path], object] = bool  # called when training has ended, even by an error


def filled(run: Run) -> float:
    """The share of a batch's positions that hold a token, as the first batch shows it; 1 for other data."""
    if "segments" not in run.program.batch_spec:
        return 1.0
    share = float((run.train_data[0]["segments"] > 0).mean())
    if share < 0.995:
        log.say(
            f"padding   {1 - share:.0%} of a batch's positions, which the plan counts and tokens/s does not"
        )
    return share
