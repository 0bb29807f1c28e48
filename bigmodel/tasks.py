"""What a model is trained for: loss, metrics and how much each example weighs.

A task's `terms` maps the model's outputs to named (sum, weight) pairs; "loss" is among them, and its weight
is `weight(batch)`, which needs no model: so a batch can be cut into microbatches without changing the loss.

Legend: B batch, L length, M masked words or tokens of a target, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigmodel.config import Config
from bigmodel.metrics import Metrics

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Task:
    weight: Callable[[Batch], jax.Array]  # batch -> scalar: what the loss is divided by
    terms: Callable[[Any, Batch, bool], Metrics]  # outputs, batch, train -> metrics as sums


def make(config: Config) -> Task:
    """The task that `config.task` names."""
    smoothing = config.task.label_smoothing
    tasks = {
        "lm": Task(lambda batch: _lm_weight(batch).sum(), lambda o, b, train: _lm(o, b, train, smoothing)),
        "mlm": Task(lambda batch: _mlm_weight(batch).sum(), lambda o, b, train: _mlm(o, b, train, smoothing)),
        "seq2seq": Task(
            lambda batch: _seq2seq_weight(batch).sum(), lambda o, b, train: _seq2seq(o, b, train, smoothing)
        ),
        "classify": Task(
            lambda batch: batch["mask"].sum(), lambda o, b, train: _classify(o, b, train, smoothing)
        ),
    }
    return tasks[config.task.name]


def logits(outputs: Any) -> jax.Array:
    """A model's outputs are its logits, or a dict that holds them beside what else its task needs."""
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs


def _auxiliary(outputs: Any) -> dict[str, jax.Array]:
    """Named losses of the model's own, one number for each that the task's loss counts."""
    return outputs.get("losses", {}) if isinstance(outputs, Mapping) else {}


def _with(metrics: Metrics, losses: Mapping[str, jax.Array], weight: jax.Array, train: bool) -> Metrics:
    """Metrics, and the model's own losses among them; in training they are part of the loss."""
    total, count = metrics["loss"]
    for name, value in losses.items():
        amount = (value * weight).sum()
        metrics = {**metrics, f"{name}_loss": (amount, count)}
        total = total + amount if train else total
    return {**metrics, "loss": (total, count)}


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log softmax(logits [..., V])[labels], in nats and float32; smoothing as in Szegedy et al. 2016."""
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(-1)
        nll = (1 - smoothing) * nll + smoothing * uniform
    return nll


def _is_likeliest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether no class beats the label's; a maximum, which unlike an argmax is fast on a CPU."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen >= logits.max(-1)


def _lm_weight(batch: Batch) -> jax.Array:
    """1 for each target in a real document of a real example, [B, L]."""
    return jnp.where(batch["segments"] > 0, batch["mask"][:, None], 0.0)


def _words(
    logits: jax.Array, targets: jax.Array, bytes_each: jax.Array, weight: jax.Array, smoothing: float
) -> Metrics:
    """Metrics of predicted tokens: logits [B, L, V]; the others [B, L]."""
    count = weight.sum()
    nats = (cross_entropy(logits, targets, smoothing) * weight).sum()
    correct = _is_likeliest(logits, targets)
    bytes_count = (bytes_each.astype(jnp.float32) * weight).sum()
    return {
        "loss": (nats, count),
        "accuracy": (jnp.where(correct, weight, 0.0).sum(), count),
        "bits_per_byte": (nats / jnp.log(2.0), bytes_count),
    }


def _lm(outputs: Any, batch: Batch, train: bool, smoothing: float) -> Metrics:
    weight_BL = _lm_weight(batch)
    metrics = _words(logits(outputs), batch["targets"], batch["target_bytes"], weight_BL, smoothing * train)
    return _with(metrics, _auxiliary(outputs), weight_BL, train)


def _mlm_weight(batch: Batch) -> jax.Array:
    """1 for each masked word of a real example, [B, M]."""
    return batch["masked_real"] * batch["mask"][:, None]


def _mlm(outputs: Any, batch: Batch, train: bool, smoothing: float) -> Metrics:
    """The next-sentence loss is weighed, example by example, by the words that are masked in it."""
    weight_BM, mask_B = _mlm_weight(batch), batch["mask"]
    metrics = _words(
        logits(outputs), batch["masked_targets"], batch["masked_bytes"], weight_BM, smoothing * train
    )
    if "next_sentence" in outputs:
        nats_B = cross_entropy(outputs["next_sentence"], batch["next_sentence"])
        correct_B = _is_likeliest(outputs["next_sentence"], batch["next_sentence"])
        total, count = metrics["loss"]
        total = total + (nats_B * weight_BM.sum(1)).sum() if train else total
        metrics["loss"] = (total, count)
        metrics["next_sentence_loss"] = ((nats_B * mask_B).sum(), mask_B.sum())
        metrics["next_sentence_accuracy"] = (jnp.where(correct_B, mask_B, 0.0).sum(), mask_B.sum())
    real_BL = (batch["segments"] > 0).astype(jnp.float32)
    losses = {name: (x * real_BL).sum(1) / real_BL.sum(1).clip(1) for name, x in _auxiliary(outputs).items()}
    return _with(metrics, losses, weight_BM.sum(1), train)


def _seq2seq_weight(batch: Batch) -> jax.Array:
    """1 for each token of a target of a real example, [B, M]."""
    return jnp.where(batch["decoder_segments"] > 0, batch["mask"][:, None], 0.0)


def _seq2seq(outputs: Any, batch: Batch, train: bool, smoothing: float) -> Metrics:
    weight_BM = _seq2seq_weight(batch)
    metrics = _words(logits(outputs), batch["targets"], batch["target_bytes"], weight_BM, smoothing * train)
    return _with(metrics, _auxiliary(outputs), weight_BM, train)


def _classify(outputs: Any, batch: Batch, train: bool, smoothing: float) -> Metrics:
    logits_BV, mask_B = logits(outputs), batch["mask"]
    weight = mask_B.sum()
    nats = (cross_entropy(logits_BV, batch["label"], smoothing * train) * mask_B).sum()
    correct_B = _is_likeliest(logits_BV, batch["label"])
    metrics = {"loss": (nats, weight), "accuracy": (jnp.where(correct_B, mask_B, 0.0).sum(), weight)}
    return _with(metrics, _auxiliary(outputs), mask_B, train)
