"""The protocol of a task, and what several tasks compute alike.

A task's `terms` maps the model's outputs to named (sum, weight) pairs; "loss" is among them, and its weight
is `weight(batch)`, which needs no model: so a batch can be cut into microbatches without changing the loss.

Legend: B batch, L length, V vocabulary or classes.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigmodel.config import Config, InputError, TaskKeys
from bigmodel.data import labels
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.data.sizes import Sizes
from bigmodel.metrics import Metrics

K = TypeVar("K", bound=TaskKeys)
Batch = Mapping[str, jax.Array]
Examples = dict[str, np.ndarray]  # arrays [N, ...] of all examples
Features = Callable[[np.ndarray], np.ndarray]  # images [N, H, W, C] as the model sees them -> [N, D]
Row = dict[str, Any]


class ReportTo(NamedTuple):
    """Where a report's pictures go, and what it needs beside the examples."""

    directory: pathlib.Path
    names: Sequence[str] = ()  # of the classes; none: their numbers
    groups: Sequence[str] = ()  # names of the groups of data.group; none: their numbers
    features: Features | None = None  # of images, for distances between sets of them
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None  # rows of a batch by `index`
    where: Callable[[int], str] | None = None  # an example's place in the data, by `index`
    about: str = ""  # the run, its step and its data, for pictures


class Task(abc.ABC, Generic[K]):
    """One task of one config: its batch, loss, metrics, predictions, reports and pictures.

    `Task[keys.LM]` is a task whose keys, `self.keys`, are an LM's.

    Derive from it and define `shapes`, `examples`, `weight` and `terms`; the rest has defaults.
    """

    several_passes: ClassVar[bool] = False  # a step is more than one forward pass and its transpose
    compared: ClassVar[tuple[str, ...]] = ("label", "label_scale", "group")  # arrays that a report needs
    reports: ClassVar[bool] = False  # a full evaluation makes a `report`
    draws: ClassVar[bool] = False  # each evaluation draws `pictures` of a batch
    class_feature: ClassVar[str] = ""  # the feature whose classes have names; label: that of data.label

    def __init__(self, config: Config) -> None:
        self.config = config
        self.keys: K = cast(Any, config.task)

    # ------------------------------------------------------------------------------------------- batches

    @abc.abstractmethod
    def shapes(self, facts: Facts) -> Shapes:
        """Returns name -> (shape of one example, dtype) of a batch's arrays but `mask`. Reads no records.

        Raises:
            InputError: an unknown dataset, or features that do not suit the task or the model.
        """

    @abc.abstractmethod
    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        """Opens a split: the examples, and how a batch is made of them."""

    def sizes(self, facts: Facts) -> Sizes:
        """Returns what reads the sizes of a model that these data decide, by key of the model."""
        return {}

    def class_names(self, facts: Facts) -> tuple[str, ...]:
        """Returns the names of the classes; () where they have none."""
        key = labels.name_of(self.config) if self.class_feature == "label" else self.class_feature
        if not key:
            return ()
        if (named := facts.stored("class names")) is not None:
            return tuple(named)
        feature = facts.features[key]
        return tuple(facts.names(key)) if feature.dtype == "text" else feature.names

    def first_values(self, facts: Facts) -> Mapping[str, float]:
        """Returns what the data say of parameters, by path: a run starts there, where the model has them."""
        return {}

    # -------------------------------------------------------------------------------- loss and predictions

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the scalar that the loss is divided by: the examples that count."""
        return batch["mask"].sum()

    @abc.abstractmethod
    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """Returns the loss and the metrics as {name: (sum, weight)}."""

    def predictions(self, outputs: Any) -> dict[str, jax.Array]:
        """Returns what evaluation keeps of each example's outputs."""
        return {"output": outputs["logits"].astype(jnp.float32)}

    # -------------------------------------------------------------------------------------------- reports

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Returns metrics of a split that follow from the others."""
        return {}

    @property
    def over_all_names(self) -> tuple[str, ...]:
        """The names of the metrics that need all examples of a split at once."""
        return ()

    def over_all(self, examples: Examples) -> Mapping[str, float | None]:
        """Returns the metrics of `over_all_names`; None where one has no value.

        Args:
            examples: predictions and `compared` arrays of the whole split.
        """
        return {}

    def report(self, examples: Examples, to: ReportTo) -> dict[str, Any]:
        """Returns the metrics of a full evaluation, and draws its pictures.

        Args:
            examples: predictions and `compared` arrays of the whole split, and each example's `index`.
        """
        raise InputError(f"task.name={self.config.task.name} has no report beyond its metrics")

    def pictures(self, predicted: Examples, batch: Examples, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns pictures uint8 [H, W, 3] of one batch and its predictions, by name."""
        return {}

    def inferred(self, outputs: Any) -> dict[str, jax.Array]:
        """Returns what scripts/predict.py needs of each example's outputs."""
        return self.predictions(outputs)

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        """Returns one example's outputs as plain values, for scripts/predict.py and the server.

        Args:
            out: what `predictions` or the model gives for one example.
            names: of the classes.
            columns: of the table that the example comes from (data/tables.py), or None.
        """
        return {key: value.tolist() for key, value in out.items()}


def with_losses(metrics: Metrics, losses: Mapping[str, jax.Array], weight: jax.Array, train: bool) -> Metrics:
    """Adds the model's own losses to the metrics; in training they are part of the loss."""
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


def focal(nll: jax.Array, gamma: float) -> jax.Array:
    """Lin et al. 2017, eq. 4: nll * (1 - p) ** gamma, where p = exp(-nll)."""
    return nll * jnp.maximum(-jnp.expm1(-nll), 1e-12) ** gamma


def _precedes_none(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool [..., V]: classes that do not stand before the label's: lower, or equal and not earlier.

    The order is argmax's and `jax.lax.top_k`'s: of equal classes the first one. A NaN precedes everything.
    """
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    return (logits < chosen) | ((logits == chosen) & (jnp.arange(logits.shape[-1]) >= labels[..., None]))


def is_likeliest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """True where the label is the argmax; never where a logit is NaN. One pass that is fast on a CPU."""
    return _precedes_none(logits, labels).all(-1)


def is_among(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """True where the label is among the k likeliest classes; never where a logit is NaN."""
    before = (~_precedes_none(logits, labels)).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits), k, before).sum(-1) < k
