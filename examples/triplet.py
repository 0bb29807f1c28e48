"""Triplet loss (Schroff et al. 2015, eq. 3): a task that bigmodel does not know.

    python scripts/train.py --config=configs/cnn.py --config.task.name=examples/triplet.py:Triplet \
        --config.model.num_classes=32 --workdir=runs/triplet

The model's logits are the embedding, so model.num_classes is its width. Each example is an anchor; its
positive is the farthest of its class in the batch, its negative the nearest of another (Hermans et al. 2017).
Legend: B batch, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel.config import Labels
from bigmodel.config.families.base import Family, above_0
from bigmodel.config.task import LabelKind
from bigmodel.metrics import Metrics
from bigmodel.tasks.base import Batch, Row
from bigmodel.tasks.labels import LabelTask


@dataclass(frozen=True)
class Triplet(Labels):
    """The keys of config.task."""

    name: str = "examples/triplet.py:Triplet"
    margin: float = 0.2  # how much nearer a positive should be than a negative
    like: ClassVar[str] = "classify"
    label_kind: ClassVar[LabelKind] = "class"

    def problems(self, model: Family) -> Iterable[tuple[str, str]]:
        yield from above_0(self, "margin")

    def task(self) -> type[LabelTask]:
        return Embedding


class Embedding(LabelTask[Triplet]):
    """The loss, and how often the nearest other example of the batch is of the same class."""

    reports: ClassVar[bool] = False  # the reports of classes do not apply

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        real_B, label_B = batch["mask"] > 0, batch["label"]
        z_BD = normalized(outputs["logits"].astype(jnp.float32))
        far_BB = jnp.square(z_BD[:, None] - z_BD[None]).sum(-1)
        other_BB = real_B[None] & ~jnp.eye(len(z_BD), dtype=bool)
        same_BB = label_B[:, None] == label_B[None]
        positive_B = jnp.where(other_BB & same_BB, far_BB, -jnp.inf).max(1)
        negative_B = jnp.where(other_BB & ~same_BB, far_BB, jnp.inf).min(1)
        counts_B = real_B & jnp.isfinite(positive_B) & jnp.isfinite(negative_B)
        gap_B = jnp.where(counts_B, positive_B - negative_B, -jnp.inf)
        loss = jax.nn.relu(gap_B + self.keys.margin).sum()
        nearest_B = jnp.where(other_BB, far_BB, jnp.inf).argmin(1)
        right = jnp.where(label_B[nearest_B] == label_B, batch["mask"], 0.0).sum()
        return {"loss": (loss, batch["mask"].sum()), "nearest": (right, batch["mask"].sum())}

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        return {"embedding": np.asarray(normalized(out["output"])).tolist()}


def normalized(x: Any) -> jax.Array:
    """Returns vectors of length 1, [..., D]."""
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-6)
