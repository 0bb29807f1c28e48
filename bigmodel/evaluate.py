"""Evaluation: the metrics of a state over a split, every example counted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmodel import mesh
from bigmodel.config import InputError
from bigmodel.data import Pipeline, Prefetch, labels
from bigmodel.data.corpus import special_id
from bigmodel.data.sources import features_of
from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer import decode, generate, loading
from bigmodel.infer.decoder import Decoder
from bigmodel.metrics import Metrics, Sums
from bigmodel.program import Program, State
from bigmodel.tasks.base import Examples, Features, ReportTo
from bigmodel.tasks.gan import in_pieces


class GivenUp(Exception):
    """An evaluation was asked to stop."""


def never() -> bool:
    return False


def run(
    program: Program, state: State, pipeline: Pipeline, stop: Callable[[], bool] = never
) -> dict[str, float]:
    """Returns {name: value} over one pass of `pipeline`, with the task's metrics that need all examples.

    The parameters' moving average is evaluated when the state has one. The last batch is padded and masked.

    Args:
        stop: asked after each batch.

    Raises:
        GivenUp: `stop` said so.
    """
    task, sums, parts = program.task, Sums(), list[Examples]()
    compared = _compared(program)

    def step(batch: Any) -> tuple[Metrics, Any]:
        if not task.over_all_names:
            return program.eval_step(state, batch), None
        metrics, predicted = program.examine(state, batch)
        return metrics, {**predicted, **compared(batch)}

    def read(metrics: Metrics, examples: Any) -> None:
        sums.add(metrics)
        if examples is not None:
            parts.append(_real(examples, pipeline, len(parts)))

    _each(program, pipeline, step, read, stop)
    values = sums.values()
    values |= task.derived(values)
    if parts:
        found = task.over_all(_joined(parts))
        values |= {name: value for name, value in found.items() if value is not None}
    return values


def collect(program: Program, state: State, pipeline: Pipeline, stop: Callable[[], bool] = never) -> Examples:
    """Returns the task's predictions for every example of a split, once each and in order, on every host.

    -> {"output": float [N, ...], "label": [N, ...], and "group": [N] if the config names one}, or what the
    task's `predictions` and `compared` say; and `index`, the example's number in the split. Numbers that were
    standardised are in their own unit again.
    `stop` as of `run`.
    """
    parts, compared = list[Examples](), _compared(program)

    def step(batch: Any) -> tuple[Any]:
        return ({**program.predict(state, batch), **compared(batch)},)

    def read(examples: Mapping[str, jax.Array]) -> None:
        parts.append(_real(examples, pipeline, len(parts)))

    _each(program, pipeline, step, read, stop)
    return _joined(parts)


def _each(
    program: Program, pipeline: Pipeline, step: Callable[[Any], tuple[Any, ...]],
    read: Callable[..., None], stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Calls `step` on each batch, and `read` on what it gave one batch late: the device never waits."""
    pending: tuple[Any, ...] | None = None
    with Prefetch(pipeline, 0, program.put, program.config.data.prefetch) as batches:
        for _, batch, _ in batches:
            given = step(batch)
            if pending is not None:
                read(*pending)
            pending = given
            if stop():
                raise GivenUp
    if pending is not None:
        read(*pending)


def _compared(program: Program) -> Callable[[Any], dict[str, jax.Array]]:
    """Returns a function of a batch that gives the arrays to compare with predictions, on every host."""
    names = [name for name in (*program.task.compared, "mask") if name in program.batch_spec]
    everywhere = jax.jit(lambda columns: columns, out_shardings=mesh.replicated(program.mesh))
    return lambda batch: everywhere({name: batch[name] for name in names})


def _real(examples: Mapping[str, jax.Array], pipeline: Pipeline, step: int) -> Examples:
    """Reads the examples of the batch of a step that count; standardized numbers in their own unit again."""
    got = jax.device_get(dict(examples))
    real_B = got.pop("mask") > 0
    size = len(real_B)
    got["index"] = pipeline.examples_at(np.arange(step * size, (step + 1) * size))
    if (scale_B2 := got.pop("label_scale", None)) is not None:
        for name in ("output", "label"):
            got[name] = got[name].astype(np.float64) * scale_B2[:, 1:] + scale_B2[:, :1]
    return {name: value[real_B] for name, value in got.items()}


def _joined(parts: Sequence[Examples]) -> Examples:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw(program: Program, state: State, pipeline: Pipeline) -> dict[str, np.ndarray]:
    """Returns the task's pictures of the first batch, uint8 [H, W, 3] by name; none for most tasks."""
    task = program.task
    if not task.draws:
        return {}
    batch = program.put(pipeline[0])
    everywhere = jax.jit(lambda columns: columns, out_shardings=mesh.replicated(program.mesh))
    predicted, rows = jax.device_get((program.predict(state, batch), everywhere(batch)))
    return task.pictures(predicted, rows, pipeline.class_names)


def report(program: Program, examples: Examples, to: ReportTo) -> dict[str, Any]:
    """Returns the metrics of what `collect` gave, and draws the task's pictures; see `Task.report`."""
    return program.task.report(examples, to)


def classifier_features(directory: str, program: Program) -> Features:
    """Returns a function that gives the logits of the classifier trained in a workdir.

    Raises:
        InputError: no run there, one of another task, or one for other images than the program's.
    """
    built, state = loading.load(directory)
    ours, theirs = program.config.data, built.config.data
    same = built.batch_spec.get("image") is not None and (
        program.batch_spec["image"].shape[1:] == built.batch_spec["image"].shape[1:]
    )
    one_class = built.config.task.one_output and built.config.task.label_kind == "class"
    if not one_class or not same or (ours.mean, ours.std) != (theirs.mean, theirs.std):
        raise InputError(
            f"--features={directory}: it takes a classifier of images of the same size, channels and "
            f"normalization, {program.batch_spec['image'].shape[1:]}; train one on data.name={ours.name}"
        )
    params, rest = built.evaluated(state), state["rest"]

    def run(image: jax.Array) -> jax.Array:
        outputs, _ = built.model.apply(params, rest, {"image": image}, key=None, train=False)
        return outputs["logits"].astype(np.float32)

    return lambda image_NHWC: in_pieces(jax.jit(run), image_NHWC)


def bleu(program: Program, state: State, tokenizer: Tokenizer) -> dict[str, float]:
    """Returns `bleu` and `chrf`, 0 to 100, of a run on pairs of texts: of greedy answers to the evaluation
    split, by sacrebleu (Post 2018); {} for any other run. `eval.batches` bounds how many are answered."""
    config = program.config
    d = config.data
    answers_pairs = config.task.generates == "answer"
    if not answers_pairs or not {"source", "target"} <= set(features_of(d.name, d.data_dir)):
        return {}
    import sacrebleu

    source = labels.open_split(config, d.eval_split, ("source", "target"))
    size, start = config.batch_size, special_id(tokenizer, config.model.vocab_size, "start")
    count = len(source) if config.eval.batches < 0 else min(len(source), config.eval.batches * size)
    decoder = Decoder(program, state, end=tokenizer.ends, start=start)
    writer, answers, references = generate.Writer(decoder, tokenizer), [], []
    for first in range(0, count, size):
        rows = source.read(np.arange(first, min(first + size, count)))
        inputs, targets = ([text.decode() for text in rows[key].tolist()] for key in ("source", "target"))
        answers += writer.write(inputs, decode.context(config))
        references += targets
    return {
        "bleu": sacrebleu.corpus_bleu(answers, [references]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [references]).score,
    }
