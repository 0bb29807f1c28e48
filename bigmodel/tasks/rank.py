"""The task rank: items for users, and the place of the item that was held out.

| name | shape | dtype | meaning |
|---|---|---|---|
| user, item | [B] | int32 | from 1; 0: not among the training ratings |
| negatives | [B, N] | int32 | binary, or task.eval_negatives: items that the user did not rate |
| log_q | [B] | float32 | softmax: log of the item's share of the ratings |
| rating | [B] | float32 | rating: the number of stars |
| seen | [B, K] | int32 | ranked among all items: those that the user rated before; 0: none |
| known | [B] | int32 | ranked among all items: how many ids there are |
| mask | [B] | float32 | 0: the row fills up the batch |

Legend: B batch, C candidates other than an example's own item, V items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import config as keys
from bigmodel.data import ratings
from bigmodel.data.facts import Facts
from bigmodel.data.labels import Shapes
from bigmodel.data.pipeline import Parts
from bigmodel.data.sizes import Sizes
from bigmodel.metrics import Metrics
from bigmodel.tasks.base import Batch, Row, Task

NEVER = jnp.finfo(jnp.float32).min


class Rank(Task[keys.Rank]):
    """Items for users."""

    def shapes(self, facts: Facts) -> Shapes:
        return ratings.shapes(self.config, facts)

    def sizes(self, facts: Facts) -> Sizes:
        return ratings.sizes(self.config, facts)

    def examples(self, split: str, facts: Facts, train: bool) -> Parts:
        """The ratings of `data.split`, the last one of each user held out for evaluation."""
        config, task, found = self.config, self.keys, ratings.load(self.config, facts)
        about: dict[str, Any] = {"source": found.fingerprint, "loss": task.rank_loss}
        about |= {"held_out": "validation"} if config.data.eval_split == "validation" else {}
        if train and task.rank_loss == "binary":
            about |= {"negatives": task.negatives, "draws": config.seed}
        rows, last = ratings.Split(found, not train), "last but one" if "held_out" in about else "last"
        finish, rule = ratings.finisher(config, found, train), f"the {last} rating of each user"
        return Parts(rows, finish, about, amount=f"{len(rows):,} ratings", split_rule=rule)

    def first_values(self, facts: Facts) -> Mapping[str, float]:
        """The mean of the training ratings, from which a model of ratings has only to differ."""
        if self.keys.rank_loss != "rating":
            return {}
        found = ratings.load(self.config, facts)
        return {"mean": float(found.rating[~found.is_test].mean())}

    def terms(self, outputs: Any, batch: Batch, train: bool) -> Metrics:
        """The loss; of evaluation also HR@k and NDCG@k, k being `task.top_k`, among all candidates."""
        mask_B = batch["mask"]
        if "in_batch" in outputs:
            return {"loss": _mean(in_batch(outputs["in_batch"], batch), mask_B)}
        own_B, other_BC, real_BC = candidates(outputs, batch)
        if self.keys.rank_loss == "rating":
            error_B = own_B - batch["rating"]
            values = {"loss": jnp.square(error_B), "mse": jnp.square(error_B), "mae": jnp.abs(error_B)}
        elif self.keys.rank_loss == "binary":
            # He et al. 2017, eq. 7, over an example's own item and the others
            weight_BC = real_BC.astype(jnp.float32)
            nats_B = (jax.nn.softplus(other_BC) * weight_BC).sum(1)
            values = {"loss": (jax.nn.softplus(-own_B) + nats_B) / (1 + weight_BC.sum(1))}
        else:
            all_BC = jnp.concatenate([own_B[:, None], jnp.where(real_BC, other_BC, NEVER)], 1)
            values = {"loss": jax.nn.logsumexp(all_BC, axis=1) - own_B}
        if not train:
            values |= at_k(own_B, other_BC, real_BC, self.keys.top_k)
        return {name: _mean(value, mask_B) for name, value in values.items()}

    def predictions(self, outputs: Any) -> dict[str, jax.Array]:
        return {name: x for name, x in outputs.items() if name != "in_batch"}

    def answer(self, out: Mapping[str, np.ndarray], names: Sequence[str], columns: Any) -> Row:
        """The user's score of the item: a rating, or a logit; and whether training knew both."""
        return {"score": float(out["scores"][0]), "known": bool(out["known"])}

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        return {"rmse": values["mse"] ** 0.5} if "mse" in values else {}


def _mean(value_B: jax.Array, mask_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (value_B * mask_B).sum(), mask_B.sum()


def in_batch(scores_BB: jax.Array, batch: Batch) -> jax.Array:
    """-log softmax of an example's own item among the batch's items, [B].

    Popular items are met too often as negatives, so the log of an item's share of ratings is taken off its
    score (Yi et al. 2019, eq. 3). The same item elsewhere in the batch is no negative.
    """
    logits_BB = scores_BB - batch["log_q"][None, :]
    item_B = batch["item"]
    own_BB = jnp.eye(len(item_B), dtype=bool)
    is_other_BB = (item_B[:, None] != item_B[None, :]) & (batch["mask"][None, :] > 0)
    logits_BB = jnp.where(own_BB | is_other_BB, logits_BB, NEVER)
    return jax.nn.logsumexp(logits_BB, axis=1) - jnp.diagonal(logits_BB)


def candidates(outputs: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (the own item's score [B], the others' [B, C], which of those count [B, C])."""
    if "scores" in outputs:
        scores = outputs["scores"]
        return scores[:, 0], scores[:, 1:], jnp.ones_like(scores[:, 1:], bool)
    scores_BV, item_B = outputs["all"], batch["item"]
    own_B = jnp.take_along_axis(scores_BV, item_B[:, None], 1)[:, 0]
    id_V = jnp.arange(scores_BV.shape[1])
    real_BV = (id_V > 0) & (id_V < batch["known"][:, None]) & (id_V != item_B[:, None])
    rows_B1 = jnp.arange(len(item_B))[:, None]
    return own_B, scores_BV, real_BV.at[rows_B1, batch["seen"]].set(False)


def at_k(own_B: jax.Array, other_BC: jax.Array, real_BC: jax.Array, k: int) -> dict[str, jax.Array]:
    """HR@k: 1 if the item is among the first k. NDCG@k: then 1 / log2(its place + 1) (He et al. 2015, 4.1).

    Items of equal scores may come in any order: both are expected values over all of these orders (McSherry
    and Najork 2008, section 3), so a model whose scores are all equal does as well as chance. A NaN stands
    before every other score, and an own score that is NaN is never a hit.
    """
    tie_BC = other_BC == own_B[:, None]
    before_BC = ~(other_BC <= own_B[:, None])
    first_B = (before_BC & real_BC).sum(1)  # the best place it may have, from 0
    count_B = (tie_BC & real_BC).sum(1) + 1  # places it may have
    last_B = jnp.minimum(first_B + count_B, k)
    first_B = jnp.minimum(first_B, k)
    gain_K = np.append(1 / np.log2(np.arange(k) + 2), 0)  # of each of the first k places, and beyond
    summed_K = jnp.asarray(np.insert(gain_K, 0, 0).cumsum(), jnp.float32)  # of the first 0, 1, .. places
    hits_B, many_B = last_B - first_B, summed_K[last_B] - summed_K[first_B]
    gains_B = jnp.where(count_B == 1, jnp.asarray(gain_K, jnp.float32)[first_B], many_B)
    real_B = ~jnp.isnan(own_B)
    return {
        f"{name}@{k}": jnp.where(real_B, value_B.astype(jnp.float32) / count_B.astype(jnp.float32), 0)
        for name, value_B in (("hr", hits_B), ("ndcg", gains_B))
    }
