"""What a model is trained for: loss, metrics and how much each example weighs.

A task's `terms` maps the model's outputs to named (sum, weight) pairs; "loss" is among them, and its weight
is `weight(batch)`, which needs no model: so a batch can be cut into microbatches without changing the loss.

Legend: B batch, L length, V vocabulary or classes.
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
        "lm": Task(lambda batch: _lm_weight(batch).sum(), lambda o, b, train: _lm(o, b, smoothing * train)),
        "classify": Task(
            lambda batch: batch["mask"].sum(), lambda o, b, train: _classify(o, b, smoothing * train)
        ),
    }
    return tasks[config.task.name]


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


def _lm(logits_BLV: jax.Array, batch: Batch, smoothing: float) -> Metrics:
    weight_BL = _lm_weight(batch)
    weight = weight_BL.sum()
    nats = (cross_entropy(logits_BLV, batch["targets"], smoothing) * weight_BL).sum()
    correct_BL = _is_likeliest(logits_BLV, batch["targets"])
    bytes_BL = batch["target_bytes"].astype(jnp.float32) * weight_BL
    return {
        "loss": (nats, weight),
        "accuracy": (jnp.where(correct_BL, weight_BL, 0.0).sum(), weight),
        "bits_per_byte": (nats / jnp.log(2.0), bytes_BL.sum()),
    }


def _classify(logits_BV: jax.Array, batch: Batch, smoothing: float) -> Metrics:
    mask_B = batch["mask"]
    weight = mask_B.sum()
    nats = (cross_entropy(logits_BV, batch["label"], smoothing) * mask_B).sum()
    correct_B = _is_likeliest(logits_BV, batch["label"])
    return {"loss": (nats, weight), "accuracy": (jnp.where(correct_B, mask_B, 0.0).sum(), weight)}
