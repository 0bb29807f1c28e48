"""Evaluation: the metrics of a state over a split, every example counted once."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bigmodel import mesh, metrics, pictures, tasks
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


def collect(program: Program, state: State, pipeline: Pipeline) -> dict[str, np.ndarray]:
    """The outputs of every example of a split, once each and in order, on every host.

    -> {"output": float32 [N, ...], "label": [N, ...], and "group": [N] if the config names one}.
    """
    parts: list[dict[str, np.ndarray]] = []
    names = [name for name in ("label", "group", "mask") if name in program.batch_spec]

    def outputs(params: Any, rest: Any, batch: Any) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            out, _ = program.model.apply(params, rest, batch, key=None, train=False)
        return {"output": tasks.logits(out).astype("float32")} | {name: batch[name] for name in names}

    predict = jax.jit(outputs, out_shardings=mesh.replicated(program.mesh))
    params = state.get("ema", state["params"])
    with Prefetch(pipeline, 0, program.put, program.config.data.prefetch) as batches:
        for _, batch, _ in batches:
            got = jax.device_get(predict(params, state["rest"], batch))
            there = got.pop("mask") > 0
            parts.append({name: value[there] for name, value in got.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def report(
    program: Program, examples: dict[str, np.ndarray], directory: pathlib.Path, names: Sequence[str] = ()
) -> dict[str, Any]:
    """What `collect` gave -> the metrics that need all examples; draws a classifier's pictures.

    Args:
        directory: where the pictures go.
        names: of the classes; none: their numbers.
    """
    output, label = examples["output"], examples["label"]
    task = program.config.task
    if task.name == "regress":
        return metrics.regression(output, label)
    score_NK = np.asarray(jax.nn.softmax(output) if task.name == "classify" else jax.nn.sigmoid(output))
    out = metrics.classification(score_NK, label, examples.get("group"), task.top_k)
    is_NK = np.eye(score_NK.shape[1], dtype=bool)[label] if label.ndim == 1 else label > 0.5
    titles = [*names, *map(str, range(len(names), score_NK.shape[1]))]
    paths = pictures.draw(directory, is_NK, score_NK, out, titles)
    return out | {"pictures": [str(path) for path in paths]}
