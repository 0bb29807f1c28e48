"""Evaluation: the metrics of a state over a split, every example counted once."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmodel import mesh, metrics, models, pictures, tasks
from bigmodel.config import Config, InputError, Task
from bigmodel.config.families import CNN
from bigmodel.data import Pipeline, Prefetch, open_source
from bigmodel.data.corpus import special_id
from bigmodel.data.sources import features_of
from bigmodel.data.tokenizers import Tokenizer
from bigmodel.infer import decoder as decoder_lib
from bigmodel.infer import generate, loading
from bigmodel.metrics import Sums
from bigmodel.program import Program, State

Examples = dict[str, np.ndarray]  # arrays [N, ...] of all examples
Features = Callable[[np.ndarray], np.ndarray]  # images [N, H, W, C] as the model sees them -> [N, D]


class GivenUp(Exception):
    """An evaluation was asked to stop."""


def never() -> bool:
    return False


def run(
    program: Program,
    state: State,
    pipeline: Pipeline,
    step_fn: Any = None,
    stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """One pass over `pipeline` -> {name: value}; where words are predicted also `perplexity`, and
    what needs all examples at once (`WHOLE`).

    The parameters' moving average is evaluated when the state has one. The last batch is padded and masked.

    Args:
        step_fn: the compiled `program.eval_step`, if the caller has it.
        stop: asked after each batch.

    Raises:
        GivenUp: `stop` said so.
    """
    sums, step_fn = Sums(), step_fn or program.eval_step
    pending = None  # read one batch late, so that the device never waits for the host
    with Prefetch(pipeline, 0, program.put, program.config.data.prefetch) as batches:
        for _, batch, _ in batches:
            metrics = step_fn(state, batch)
            if pending is not None:
                sums.add(pending)
            pending = metrics
            if stop():
                raise GivenUp
    if pending is not None:
        sums.add(pending)
    values = sums.values()
    if program.config.task.name in ("lm", "mlm", "seq2seq"):
        with np.errstate(over="ignore"):
            values["perplexity"] = float(np.exp(np.float64(values["loss"])))
    if whole := WHOLE.get(program.config.task.name):
        more = whole(program, collect(program, state, pipeline, stop))
        values |= {name: value for name, value in more.items() if value is not None}
    return values


# What of a batch `collect` keeps beside the predictions; BESIDE for the tasks that it names.
LABELS = ("label", "label_scale", "group")
BESIDE = {"gan": ("image",), "detect": ("boxes", "labels", "crowds")}


def collect(program: Program, state: State, pipeline: Pipeline, stop: Callable[[], bool] = never) -> Examples:
    """What the task keeps of every example of a split, once each and in order, on every host.

    -> {"output": float [N, ...], "label": [N, ...], and "group": [N] if the config names one}; for tasks
    whose predictions are not their logits, what tasks.PREDICTIONS says. Numbers that were standardised are in
    their own unit again. `stop` as of `run`.
    """
    parts: list[Examples] = []
    wanted = (*BESIDE.get(program.config.task.name, LABELS), "mask")
    names = [name for name in wanted if name in program.batch_spec]
    everywhere = jax.jit(lambda columns: columns, out_shardings=mesh.replicated(program.mesh))
    with Prefetch(pipeline, 0, program.put, program.config.data.prefetch) as batches:
        for _, batch, _ in batches:
            beside = everywhere({name: batch[name] for name in names})
            got = jax.device_get({**program.predict(state, batch), **beside})
            there = got.pop("mask") > 0
            if (scale_B2 := got.pop("label_scale", None)) is not None:
                for name in ("output", "label"):
                    got[name] = got[name].astype(np.float64) * scale_B2[:, 1:] + scale_B2[:, :1]
            parts.append({name: value[there] for name, value in got.items()})
            if stop():
                raise GivenUp
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def shown(program: Program, state: State, pipeline: Pipeline) -> dict[str, np.ndarray]:
    """What the task draws of the first batch: {name: uint8 [H, W, 3]}; nothing for most tasks."""
    draw = pictures.SHOWN.get(program.config.task.name)
    if draw is None:
        return {}
    batch = program.put(pipeline[0])
    everywhere = jax.jit(lambda columns: columns, out_shardings=mesh.replicated(program.mesh))
    kept, beside = jax.device_get((program.predict(state, batch), everywhere(batch)))
    return draw(program.config, kept, beside, pipeline.class_names)


def report(
    program: Program,
    examples: Examples,
    directory: pathlib.Path,
    names: Sequence[str] = (),
    features: Features | None = None,
) -> dict[str, Any]:
    """What `collect` gave -> the metrics that need all examples; draws the task's pictures.

    Args:
        directory: where the pictures go.
        names: of the classes; none: their numbers.
        features: of images, for distances between sets of them; see `classifier_features`.
    """
    return REPORTS[program.config.task.name](program, examples, directory, names, features)


def _classified(
    program: Program, examples: Examples, directory: pathlib.Path, names: Sequence[str], _: Features | None
) -> dict[str, Any]:
    output, label, task = examples["output"], examples["label"], program.config.task
    score_NK = likelihoods(output, task.name)
    out = metrics.classification(score_NK, label, examples.get("group"), task.top_k)
    is_NK = np.eye(score_NK.shape[1], dtype=bool)[label] if label.ndim == 1 else label > 0.5
    titles = [*names, *map(str, range(len(names), score_NK.shape[1]))]
    paths = pictures.draw(directory, is_NK, score_NK, out, titles)
    return out | {"pictures": [str(path) for path in paths]}


def likelihoods(output_NK: np.ndarray, task: str) -> np.ndarray:
    """Logits -> softmax's scores, or for multilabel sigmoid's, in float64: sure ones do not become equal.

    Logits that are infinite share all the likelihood, so that the argmax is theirs.
    """
    x_NK = output_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a NaN stays one
        if task != "classify":
            return np.exp(-np.logaddexp(0, -x_NK))
        most_N1 = x_NK.max(1, keepdims=True)
        share_NK = np.exp(np.where(x_NK == most_N1, 0.0, x_NK - most_N1))
    return share_NK / share_NK.sum(1, keepdims=True)


def _drawn(
    program: Program,
    examples: Examples,
    directory: pathlib.Path,
    names: Sequence[str],
    features: Features | None,
) -> dict[str, Any]:
    """Of a GAN: distances between real images and fakes, and a grid of the real ones."""
    out: dict[str, Any] = {"examples": len(examples["image"]), **_distances(program, examples)}
    if features is not None:
        real_NK, fake_NK = (features(examples[key]) for key in ("image", "fake"))
        out["frechet_logits"] = metrics.frechet(real_NK, fake_NK)
        for key, logits_NK in (("real", real_NK), ("fake", fake_NK)):
            out[f"class_share_{key}"] = np.bincount(
                logits_NK.argmax(1), minlength=logits_NK.shape[1]
            ).tolist()
    real = pictures.grid(pictures.pixels(program.config, examples["image"]))
    return out | {"pictures": pictures.save(directory, {"real": real})}


def _detected(
    program: Program, examples: Examples, directory: pathlib.Path, names: Sequence[str], _: Features | None
) -> dict[str, Any]:
    out: dict[str, Any] = {"examples": len(examples["boxes"]), **_precision(examples)}
    for row in out["per_class"]:
        row["name"] = names[row["label"]] if row["label"] < len(names) else str(row["label"])
    return out


def _precision(examples: Examples) -> dict[str, Any]:
    return metrics.detections(
        examples["boxes"], examples["labels"], examples["found"], examples["scores"], examples["classes"],
        crowd_NM=examples.get("crowds"),
    )  # fmt: skip


REPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "classify": _classified,
    "multilabel": _classified,
    "regress": lambda program, examples, *_: metrics.regression(examples["output"], examples["label"]),
    "gan": _drawn,
    "detect": _detected,
}


# ------------------------------------------------------------------------------------- distances of images


def _distances(program: Program, examples: Examples) -> dict[str, float | None]:
    """`frechet_random`: the Frechet distance between the features of real images and of fakes that a small
    CNN of fixed random weights sees. For comparing runs on one dataset; 0 for equal sets."""
    features = _random_features(examples["image"].shape[1:])
    return {"frechet_random": metrics.frechet(features(examples["image"]), features(examples["fake"]))}


def _random_features(shape: tuple[int, ...]) -> Features:
    net = CNN(channels=(32, 64), width=128, num_classes=64)
    config = Config(model=net, task=Task(name="classify"))
    model = models.define(config, {"image": jax.ShapeDtypeStruct((1, *shape), np.float32)})
    params, rest = jax.jit(model.init)(jax.random.key(0))
    run = jax.jit(lambda image: model.apply(params, rest, {"image": image}, key=None, train=False)[0])
    return lambda image_NHWC: in_pieces(run, image_NHWC)


def classifier_features(directory: str, program: Program) -> Features:
    """The logits of the classifier that was trained in a workdir.

    Raises:
        InputError: no run there, one of another task, or one for other images than the program's.
    """
    built, state = loading.load(directory)
    ours, theirs = program.config.data, built.config.data
    same = program.batch_spec["image"].shape[1:] == built.batch_spec["image"].shape[1:]
    if built.config.task.name != "classify" or not same or (ours.mean, ours.std) != (theirs.mean, theirs.std):
        raise InputError(
            f"--features={directory}: it takes a classifier of images of the same size, channels and "
            f"normalisation, {program.batch_spec['image'].shape[1:]}; train one on data.name={ours.name}"
        )
    params, rest = built.evaluated(state), state["rest"]
    run = jax.jit(
        lambda image: tasks.logits(
            built.model.apply(params, rest, {"image": image}, key=None, train=False)[0]
        ).astype(np.float32)
    )
    return lambda image_NHWC: in_pieces(run, image_NHWC)


def in_pieces(run: Any, image_NHWC: np.ndarray, size: int = 256) -> np.ndarray:
    """`run` on as many images at once as `size`; the last piece is filled up, so that it compiles once."""
    out = []
    for start in range(0, len(image_NHWC), size):
        piece = image_NHWC[start : start + size]
        padded = np.pad(piece, ((0, size - len(piece)), (0, 0), (0, 0), (0, 0)))
        out.append(np.asarray(run(padded))[: len(piece)])
    return np.concatenate(out)


# Task -> what `run` adds, of all examples at once.
WHOLE: dict[str, Callable[[Program, Examples], Mapping[str, float | None]]] = {
    "gan": _distances,
    "detect": lambda program, examples: {k: v for k, v in _precision(examples).items() if k != "per_class"},
}


def bleu(program: Program, state: State, tokenizer: Tokenizer) -> dict[str, float]:
    """Of a run on pairs of texts, `bleu` and `chrf`, 0 to 100, of the greedy answers to the evaluation split,
    by sacrebleu (Post 2018); {} for any other run. `eval.batches` bounds how many are answered."""
    config = program.config
    d = config.data
    if config.task.name != "seq2seq" or not {"source", "target"} <= set(features_of(d.name, d.data_dir)):
        return {}
    import sacrebleu

    source = open_source(d.name, d.eval_split, d.data_dir, keys=("source", "target"))
    size, start = config.batch_size, special_id(tokenizer, config.model.vocab_size, "start")
    count = len(source) if config.eval.batches < 0 else min(len(source), config.eval.batches * size)
    decoder = decoder_lib.Decoder(program, state, end=tokenizer.ends, start=start)
    writer, answers, wanted = generate.Writer(decoder, tokenizer), [], []
    for first in range(0, count, size):
        rows = source.read(np.arange(first, min(first + size, count)))
        asked, told = ([text.decode() for text in rows[key].tolist()] for key in ("source", "target"))
        answers += writer.write(asked, decoder_lib.context(config))
        wanted += told
    return {
        "bleu": sacrebleu.corpus_bleu(answers, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [wanted]).score,
    }
