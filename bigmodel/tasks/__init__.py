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
from bigmodel.config import Task as TaskConfig
from bigmodel.metrics import Metrics
from bigmodel.tasks import overlap, ranking

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Task:
    weight: Callable[[Batch], jax.Array]  # batch -> scalar: what the loss is divided by
    terms: Callable[[Any, Batch, bool], Metrics]  # outputs, batch, train -> metrics as sums
    predictions: Callable[
        [Any], dict[str, jax.Array]
    ]  # outputs of evaluation -> what to keep of each example
    passes_many: bool = False  # a training step is not one forward pass and its transpose: see plan/flops.py


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


def _precedes_none(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool [..., V]: which classes do not stand before the label's: lower, or equal and not earlier.

    The order is argmax's and `jax.lax.top_k`'s: of equal classes the first one. A NaN precedes everything.
    """
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    return (logits < chosen) | ((logits == chosen) & (jnp.arange(logits.shape[-1]) >= labels[..., None]))


def _is_likeliest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label is the argmax; never where a logit is NaN. One pass that is fast on a CPU."""
    return _precedes_none(logits, labels).all(-1)


def _is_among(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k likeliest classes; never where a logit is NaN."""
    before = (~_precedes_none(logits, labels)).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits), k, before).sum(-1) < k


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


def _lm(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    weight_BL = _lm_weight(batch)
    smoothing = task.label_smoothing * train
    metrics = _words(logits(outputs), batch["targets"], batch["target_bytes"], weight_BL, smoothing)
    return _with(metrics, _auxiliary(outputs), weight_BL, train)


def _mlm_weight(batch: Batch) -> jax.Array:
    """1 for each masked word of a real example, [B, M]."""
    return batch["masked_real"] * batch["mask"][:, None]


def _mlm(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """The next-sentence loss is weighed, example by example, by the words that are masked in it."""
    weight_BM, mask_B = _mlm_weight(batch), batch["mask"]
    smoothing = task.label_smoothing * train
    metrics = _words(logits(outputs), batch["masked_targets"], batch["masked_bytes"], weight_BM, smoothing)
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


def _seq2seq(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    weight_BM = _seq2seq_weight(batch)
    smoothing = task.label_smoothing * train
    metrics = _words(logits(outputs), batch["targets"], batch["target_bytes"], weight_BM, smoothing)
    return _with(metrics, _auxiliary(outputs), weight_BM, train)


def _weight(batch: Batch) -> jax.Array:
    """How much each example's loss counts, [B]: 0 for padding, else its class's weight, or 1."""
    return batch["mask"] * batch["weight"] if "weight" in batch else batch["mask"]


def focal(nll: jax.Array, gamma: float) -> jax.Array:
    """Lin et al. 2017, eq. 4: nll * (1 - p) ** gamma, where p = exp(-nll)."""
    return nll * jnp.maximum(-jnp.expm1(-nll), 1e-12) ** gamma


def _classify(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """Logits [B, V]; those of auxiliary classifiers, if there are any, count `aux_weight` times each."""
    logits_BV, smoothing = logits(outputs), task.label_smoothing * train
    aux = outputs.get("aux_logits", ()) if isinstance(outputs, Mapping) else ()
    labels: list[tuple[jax.Array, jax.Array | float]] = [(batch["label"], 1.0)]
    if "label_other" in batch:  # of mixup or CutMix
        share_B = batch["label_share"]
        labels = [(batch["label"], share_B), (batch["label_other"], 1 - share_B)]

    def over_labels(value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return sum((share * value(label) for label, share in labels), jnp.float32(0))

    def loss(logits: jax.Array) -> jax.Array:
        def one(label: jax.Array) -> jax.Array:
            nll = cross_entropy(logits, label, smoothing)
            return focal(nll, task.focal_gamma) if task.loss == "focal" else nll

        return over_labels(one)

    weight_B, mask_B = _weight(batch), batch["mask"]
    nats_B = loss(logits_BV) + sum((task.aux_weight * loss(each) for each in aux), jnp.float32(0))
    metrics = {"loss": ((nats_B * weight_B).sum(), weight_B.sum())}

    def count(is_right: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        right_B = over_labels(lambda label: is_right(label).astype(jnp.float32))
        return (right_B * mask_B).sum(), mask_B.sum()

    metrics["accuracy"] = count(lambda label: _is_likeliest(logits_BV, label))
    if 1 < task.top_k < logits_BV.shape[-1]:
        metrics[f"top{task.top_k}"] = count(lambda label: _is_among(logits_BV, label, task.top_k))
    return _with(metrics, _auxiliary(outputs), weight_B, train)


def _multilabel(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """Binary cross-entropy for each class, averaged over the classes; `label` is 0 or 1, [B, V]."""
    logits_BV, label_BV = logits(outputs).astype(jnp.float32), batch["label"]
    smoothing = task.label_smoothing * train
    if "label_other" in batch:
        share_B1 = batch["label_share"][:, None]
        label_BV = share_B1 * label_BV + (1 - share_B1) * batch["label_other"]
    target_BV = label_BV * (1 - smoothing) + smoothing / 2
    if task.loss == "focal":
        on, off = jax.nn.softplus(-logits_BV), jax.nn.softplus(logits_BV)
        gamma = task.focal_gamma
        nats_BV = target_BV * focal(on, gamma) + (1 - target_BV) * focal(off, gamma)
    else:
        nats_BV = optax.sigmoid_binary_cross_entropy(logits_BV, target_BV)
    mask_B, weight_B = batch["mask"], _weight(batch)
    right_BV = ((logits_BV > 0) == (label_BV > 0.5)) & ~jnp.isnan(logits_BV)  # a NaN predicts nothing
    exact_B = right_BV.all(-1).astype(jnp.float32)
    metrics = {
        "loss": ((nats_BV.mean(-1) * weight_B).sum(), weight_B.sum()),
        "accuracy": ((right_BV.astype(jnp.float32).mean(-1) * mask_B).sum(), mask_B.sum()),
        "exact_match": ((exact_B * mask_B).sum(), mask_B.sum()),
    }
    return _with(metrics, _auxiliary(outputs), weight_B, train)


def _regress(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """Squared error, or Huber's (1964), averaged over the outputs; `label` [B, V]."""
    error_BV, huber_delta = logits(outputs).astype(jnp.float32) - batch["label"], task.huber_delta
    square_BV, distance_BV = jnp.square(error_BV), jnp.abs(error_BV)
    loss_BV = square_BV
    if huber_delta:
        near_BV = jnp.minimum(distance_BV, huber_delta)
        loss_BV = near_BV * (distance_BV - 0.5 * near_BV)
    mask_B, weight_B = batch["mask"], _weight(batch)
    weight = mask_B.sum()
    metrics = {
        "loss": ((loss_BV.mean(-1) * weight_B).sum(), weight_B.sum()),
        "mse": ((square_BV.mean(-1) * mask_B).sum(), weight),
        "mae": ((distance_BV.mean(-1) * mask_B).sum(), weight),
    }
    return _with(metrics, _auxiliary(outputs), weight_B, train)


def _gan(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """Both networks' losses and their sum; where each one's gradient stops is the model's business."""
    real_B, fake_B = (outputs[name].astype(jnp.float32) for name in ("real", "fake"))
    judged_B = outputs.get("judged", outputs["fake"]).astype(jnp.float32)
    on_real, on_fake, on_judged = GAN_LOSSES[task.gan_loss]
    losses = {"discriminator": on_real(real_B) + on_fake(fake_B), "generator": on_judged(judged_B)}
    if "slope" in outputs:
        losses["penalty"] = task.gradient_penalty * jnp.square(outputs["slope"] - 1)
    told_apart_B = ((real_B > 0).astype(jnp.float32) + (fake_B < 0).astype(jnp.float32)) / 2
    values = {f"{name}_loss": value for name, value in losses.items()}
    values |= {"loss": sum(losses.values(), jnp.float32(0)), "told_apart": told_apart_B}
    values |= {"real_logit": real_B, "fake_logit": fake_B}
    mask_B = batch["mask"]
    return {name: ((value * mask_B).sum(), mask_B.sum()) for name, value in values.items()}


Loss = Callable[[jax.Array], jax.Array]
# Of the discriminator's logits: its loss on real images, on fakes; the generator's loss.
GAN_LOSSES: dict[str, tuple[Loss, Loss, Loss]] = {
    # Goodfellow et al. 2014, eq. 1, with the generator's other loss that section 3 gives
    "non-saturating": (lambda x: jax.nn.softplus(-x), jax.nn.softplus, lambda x: jax.nn.softplus(-x)),
    # Lim and Ye 2017; Miyato et al. 2018, eqs. 16 and 17
    "hinge": (lambda x: jax.nn.relu(1 - x), lambda x: jax.nn.relu(1 + x), lambda x: -x),
    # Arjovsky et al. 2017; the penalty of Gulrajani et al. 2017, eq. 3, comes on top
    "wgan-gp": (lambda x: -x, lambda x: x, lambda x: -x),
}


def _detect_weight(batch: Batch) -> jax.Array:
    """How many places of each image have something to give, [B]; at least 1, so that empty images count."""
    count_B = (batch["place_label"] >= 0).sum(-1).astype(jnp.float32)
    return jnp.maximum(count_B, 1) * batch["mask"]


def _detect(outputs: Any, batch: Batch, train: bool, task: TaskConfig) -> Metrics:
    """FCOS (Tian et al. 2019, eq. 2): focal loss of every class at every place; where there is a box also
    1 - GIoU, and cross-entropy of how central the place is."""
    label_BP, mask_B, count_B = batch["place_label"], batch["mask"], _detect_weight(batch)
    logits_BPK = outputs["class_logits"].astype(jnp.float32)
    some_BP = (label_BP >= 0).astype(jnp.float32) * mask_B[:, None]
    is_BPK = jax.nn.one_hot(label_BP, logits_BPK.shape[-1])
    on_BPK = focal(jax.nn.softplus(-logits_BPK), task.focal_gamma)
    off_BPK = focal(jax.nn.softplus(logits_BPK), task.focal_gamma)
    class_BP = (FOCAL_ALPHA * is_BPK * on_BPK + (1 - FOCAL_ALPHA) * (1 - is_BPK) * off_BPK).sum(-1)
    overlap_BP = overlap.giou(outputs["boxes"], batch["place_box"])
    center_BP = optax.sigmoid_binary_cross_entropy(
        outputs["center_logits"].astype(jnp.float32), batch["place_center"]
    )
    losses = {
        "class_loss": (class_BP * mask_B[:, None]).sum(),
        "box_loss": ((1 - overlap_BP) * some_BP).sum(),
        "center_loss": (center_BP * some_BP).sum(),
    }
    losses["loss"] = sum(losses.values(), jnp.float32(0))
    metrics = {name: (value, count_B.sum()) for name, value in losses.items()}
    return metrics | {"giou": ((overlap_BP * some_BP).sum(), some_BP.sum())}


FOCAL_ALPHA = 0.25  # Lin et al. 2017, section 5.1

Terms = Callable[[Any, Batch, bool, TaskConfig], Metrics]
TASKS: dict[str, tuple[Callable[[Batch], jax.Array], Terms]] = {  # what weighs each target; the metrics
    "lm": (_lm_weight, _lm),
    "mlm": (_mlm_weight, _mlm),
    "seq2seq": (_seq2seq_weight, _seq2seq),
    "classify": (_weight, _classify),
    "multilabel": (_weight, _multilabel),
    "regress": (_weight, _regress),
    "gan": (_weight, _gan),
    "detect": (_detect_weight, _detect),
    "rank": (_weight, ranking.terms),
}


def _logits_alone(outputs: Any, task: TaskConfig) -> dict[str, jax.Array]:
    return {"output": logits(outputs).astype(jnp.float32)}


PREDICTIONS: dict[str, Callable[[Any, TaskConfig], dict[str, jax.Array]]] = {  # where it is not the logits
    "rank": lambda outputs, task: {name: x for name, x in outputs.items() if name != "in_batch"},
    "gan": lambda outputs, task: {"fake": outputs["image"].astype(jnp.float32)},
    "detect": lambda outputs, task: overlap.decode(
        outputs, task.most_detections, task.nms_overlap, task.least_score
    ),
}
PASS_MANY = ("gan",)


def make(config: Config) -> Task:
    """The task that `config.task` names."""
    weight, terms = TASKS[config.task.name]
    keep = PREDICTIONS.get(config.task.name, _logits_alone)
    return Task(
        weight=lambda batch: weight(batch).sum(),
        terms=lambda outputs, batch, train: terms(outputs, batch, train, config.task),
        predictions=lambda outputs: keep(outputs, config.task),
        passes_many=config.task.name in PASS_MANY,
    )
