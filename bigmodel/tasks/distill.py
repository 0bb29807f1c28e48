"""Distillation: a task around a task, with the distance from a teacher in its loss (Hinton et al. 2015).

The model is a student and its teacher (models/distilled.py); its outputs in training hold `teacher`, pairs
of arrays to compare. The batch is that of the task around which this one stands.

Legend: B batch, L positions, S keys, H heads, V vocabulary or classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigmodel.config import Config, InputError
from bigmodel.metrics import Metrics
from bigmodel.models import attention
from bigmodel.models.distilled import NAME, Compared
from bigmodel.tasks.base import Batch, Task


def around(task: type[Task]) -> type[Task]:
    """Returns the task with the distance from a teacher as a part of its training loss."""

    class Distill(task):  # type: ignore[valid-type, misc]
        def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
            if train:
                losses = distances(self.config, outputs[NAME], batch)
                outputs = {**outputs, "losses": {**outputs.get("losses", {}), **losses}}
            return super().terms(outputs, batch, train)

    return Distill


def distances(config: Config, compared: Compared, batch: Batch) -> dict[str, jax.Array]:
    """Returns the weighed distances from the teacher, a number for each that the task's loss counts."""
    how = config.distill
    losses = {"distill": how.weight * distance(config, *compared.logits)}
    shape = losses["distill"].shape
    if compared.hidden is not None:
        losses["hidden"] = how.hidden * likeness(*compared.hidden, shape)
    losses = {name: _for_task(value, batch) for name, value in losses.items()}
    if how.attention:
        shape = losses["distill"].shape
        far = [_of_shape(maps_apart(*pair), batch, shape) for pair in compared.attention]
        losses["attention"] = how.attention * sum(far, jnp.zeros(shape, jnp.float32))
    return losses


def check(config: Config, taught: Config) -> None:
    """Raises InputError where student and teacher do not predict the same thing.

    Args:
        config, taught: the student's and the teacher's.
    """
    where = config.distill.teacher
    if not (config.task.one_output or config.task.predicts_tokens):
        raise InputError(
            f"distill.teacher: task.name={config.task.name} has no logits to learn; leave it out, or distil "
            "a model that classifies, regresses or predicts tokens"
        )
    model, teacher = config.model, taught.model
    sizes = {"vocab_size": (model.vocab_size, teacher.vocab_size)}
    sizes["num_classes"] = (model.num_classes, teacher.num_classes)
    for key, (own, other) in sizes.items():
        if own != other and own and other:
            raise InputError(f"distill.teacher={where} has model.{key}={other}; set model.{key} so")
    if taught.task.name != config.task.name:
        raise InputError(
            f"distill.teacher={where} does task.name={taught.task.name}, not {config.task.name}; "
            "give a teacher of the same task"
        )
    if not config.task.one_output and taught.seq_len != config.seq_len:
        raise InputError(f"distill.teacher={where} has seq_len={taught.seq_len}; set seq_len so")
    if not config.distill.attention:
        return
    for who, each in (("model", model), ("teacher", teacher)):
        if each.attends is None:
            raise InputError(f"distill.attention finds no attention in the {who} ({each.name}); set it to 0")
    own_keys, other_keys = model.attends or {}, teacher.attends or {}
    for key in own_keys.keys() | other_keys.keys():
        if own_keys.get(key) != other_keys.get(key):
            raise InputError(
                f"distill.attention compares position by position, but distill.teacher={where} has "
                f"model.{key}={other_keys.get(key)}; set model.{key} so"
            )


def distance(config: Config, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Distance of logits [..., V] from the teacher's -> [...].

    T^2 KL(teacher || student) of the probabilities at temperature T (Hinton et al. 2015, section 2), label by
    label where there are several; of values, squares.
    """
    t = config.distill.temperature
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if config.task.label_kind == "numbers":
        return jnp.square(student - teacher).mean(-1)
    if config.task.label_kind == "classes":
        soft = jax.nn.sigmoid(teacher / t)
        return t * t * (optax.sigmoid_binary_cross_entropy(student / t, soft)).mean(-1)
    log_p, log_q = jax.nn.log_softmax(teacher / t), jax.nn.log_softmax(student / t)
    return t * t * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def likeness(x: jax.Array, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Difference in how the student's features x [..., N, D] and the teacher's y [..., N, E] relate N rows to
    each other (Tung and Mori 2019, eq. 2-4); of any widths -> `shape`."""

    def related(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        gram = jnp.einsum("...ND,...MD->...NM", x, x)
        return gram / jnp.maximum(jnp.linalg.norm(gram, axis=-1, keepdims=True), 1e-6)

    off = jnp.square(related(x) - related(y)).sum(-1)
    return off if off.shape == shape else jnp.broadcast_to(off.mean(), shape)


def maps_apart(own: attention.Attended, teacher: attention.Attended) -> jax.Array:
    """Distance of a layer's self-attention from the teacher's -> [B, L], for each query.

    KL(teacher || student) of what each position attends to, plus that of how its value relates to the others'
    (MiniLM, Wang et al. 2020, eq. 3-6). Heads are compared one by one, or their means where the two have not
    as many; widths may differ.
    """
    pair = (jax.lax.stop_gradient(teacher), own)
    maps = [attention.log_maps(x.q_BLHK, x.k_BSGK, x.mask, x.bias_HLS) for x in pair]
    values = [attention.log_maps(x.v_BSGK, x.v_BSGK, x.mask) for x in pair]
    return _apart(*maps) + _apart(*values)


def _apart(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) of log probabilities [B, H, L, S], over the last axis, and the mean over heads -> [B, L]."""
    if log_p.shape[1] != log_q.shape[1]:
        means = (jax.nn.logsumexp(x, axis=1, keepdims=True) - math.log(x.shape[1]) for x in (log_p, log_q))
        log_p, log_q = means
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)


def _of_shape(x_BL: jax.Array, batch: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Values of positions -> `shape`, [B] or [B, ...]: as they are where the task counts these positions,
    else the mean over the real ones."""
    if x_BL.shape == shape:
        return x_BL
    parts = [batch[name] for name in ("segments", "decoder_segments") if name in batch]
    real_BL = next((part > 0 for part in parts if part.shape == x_BL.shape), jnp.ones(x_BL.shape, bool))
    weight_BL = real_BL.astype(jnp.float32)
    mean_B = (x_BL * weight_BL).sum(1) / jnp.maximum(weight_BL.sum(1), 1)
    return jnp.broadcast_to(mean_B.reshape(-1, *(1,) * (len(shape) - 1)), shape)


def _for_task(loss: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """A masked-word model counts its losses by position of the text [B, L], not of the masks [B, M]."""
    if "masked_real" not in batch:
        return loss
    real = batch["masked_real"]
    mean_B1 = (loss * real).sum(1, keepdims=True) / jnp.maximum(real.sum(1, keepdims=True), 1)
    return jnp.broadcast_to(mean_B1, batch["segments"].shape)
