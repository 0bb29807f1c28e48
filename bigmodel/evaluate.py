"""Evaluation: the metrics of a state over a split, every example counted once."""

from __future__ import annotations

import math
from typing import Any

from bigmodel.data import Pipeline, Prefetch
from bigmodel.metrics import Sums
from bigmodel.program import Program, State


def run(program: Program, state: State, pipeline: Pipeline, step_fn: Any = None) -> dict[str, float]:
    """One pass over `pipeline` -> {name: value}; where words are predicted also `perplexity`.

    The parameters' moving average is evaluated when the state has one. The last batch is padded and masked.

    Args:
        step_fn: the compiled `program.eval_step`, if the caller has it.
    """
    sums, step_fn = Sums(), step_fn or program.eval_step
    pending = None  # read one batch late, so that the device never waits for the host
    with Prefetch(pipeline, 0, program.put, program.config.data.prefetch) as batches:
        for _, batch, _ in batches:
            metrics = step_fn(state, batch)
            if pending is not None:
                sums.add(pending)
            pending = metrics
    if pending is not None:
        sums.add(pending)
    values = sums.values()
    if "bits_per_byte" in values:
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
    return values
