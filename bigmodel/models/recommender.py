"""Recommenders: matrix factorization, neural collaborative filtering, two towers, and DLRM.

The first three score pairs of `user` and `item` ids, giving out `scores` [B, 1 + N] of an example's item and
its `negatives`; in training by the in-batch softmax `in_batch` [B, B], of every user with every item of the
batch; in evaluation among all items `all` [B, V]. DLRM reads the rows of a table.

Legend: B batch, C items for each user, V items, D width, H hidden units, F features.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel import mesh
from bigmodel.config import Config, Rank, families
from bigmodel.models import embedding, layers, module

Batch = Mapping[str, jax.Array]
CHUNK = 256  # items scored at once, where a pair takes a network


class Tower(nnx.Module):
    """Dense + ReLU for each of `widths` (the last one without ReLU if it is `bare`)."""

    def __init__(self, i: int, widths: tuple[int, ...], *, bare: bool, dtype: str, rngs: nnx.Rngs):
        self.bare, sizes = bare, zip((i, *widths), widths, strict=False)
        self.layers = nnx.List(
            [layers.Dense(a, b, std=math.sqrt(2 / a), dtype=dtype, rngs=rngs) for a, b in sizes]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, dense in enumerate(self.layers):
            x = dense(x)
            if index + 1 < len(self.layers) or not self.bare:
                x = jax.nn.relu(x)
        return x


class Pairs(nnx.Module):
    """Scores of users with items; a kind says what vectors they have, and how two of them make a score."""

    def __init__(self, config: Config, spec: Mapping[str, Any], rngs: nnx.Rngs):
        c = config.model
        assert isinstance(c, families.Recommender)
        assert isinstance(config.task, Rank)
        self.c, self.dtype, self.loss = c, config.compute_dtype, config.task.rank_loss
        table = functools.partial(embedding.Rows, dtype=config.param_dtype, rngs=rngs)
        self.users = table(c.users, self.vector(c), std=self.std(c))
        self.items = table(c.items, self.vector(c), std=self.std(c))

    @staticmethod
    def vector(c: families.Recommender) -> int:
        """Numbers that a user or an item has in its table."""
        return c.width

    @staticmethod
    def std(c: families.Recommender) -> float:
        return 0.1 * c.width**-0.5

    def user(self, x: jax.Array) -> jax.Array:
        """A user's row -> what `score` takes."""
        return x

    def item(self, x: jax.Array) -> jax.Array:
        return x

    @abc.abstractmethod
    def score(self, user_B1D: jax.Array, item_BCD: jax.Array) -> jax.Array:
        """float32 [B, C]; either may have 1 for B."""

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        user_B1D = self.user(self.users(batch["user"][:, None], self.dtype))
        if not train and "seen" in batch:
            return {"all": self._all(user_B1D)}
        if train and self.loss == "softmax":
            item_B1D = self.item(self.items(batch["item"][:, None], self.dtype))
            return {"in_batch": self.score(user_B1D, item_B1D.swapaxes(0, 1))}
        ids_BC = batch["item"][:, None]
        if "negatives" in batch:
            ids_BC = jnp.concatenate([ids_BC, batch["negatives"]], 1)
        return {"scores": self.score(user_B1D, self.item(self.items(ids_BC, self.dtype)))}

    def _all(self, user_B1D: jax.Array) -> jax.Array:
        """[B, V]: with every item, in chunks."""
        table_VD = self.items.rows[...].astype(self.dtype)
        chunk = next(n for n in range(min(CHUNK, len(table_VD)), 0, -1) if len(table_VD) % n == 0)
        chunks = mesh.shard(table_VD.reshape(-1, 1, chunk, table_VD.shape[1]), None, None, None, None)
        scores = jax.lax.map(lambda item_1CD: self.score(user_B1D, self.item(item_1CD)), chunks)
        return mesh.shard(scores.swapaxes(0, 1).reshape(user_B1D.shape[0], -1), "batch", None)


def dot(user_B1D: jax.Array, item_BCD: jax.Array) -> jax.Array:
    """float32 [B, C]; one matrix product where all users meet the same items."""
    if item_BCD.shape[0] == 1:  # of an exported function any number
        return jnp.einsum("bd,cd->bc", user_B1D[:, 0], item_BCD[0], preferred_element_type=jnp.float32)
    return jnp.einsum("bd,bcd->bc", user_B1D[:, 0], item_BCD, preferred_element_type=jnp.float32)


class Factors(Pairs):
    """mean + bias of the user + bias of the item + p q (Koren et al. 2009, eq. 4).

    A bias is the last number of a row."""

    def __init__(self, config: Config, spec: Mapping[str, Any], rngs: nnx.Rngs):
        super().__init__(config, spec, rngs)
        self.mean = nnx.Param(jnp.zeros((), config.param_dtype))

    @staticmethod
    def vector(c: families.Recommender) -> int:
        return c.width + 1

    def score(self, user_B1D: jax.Array, item_BCD: jax.Array) -> jax.Array:
        biases = (user_B1D[..., -1] + item_BCD[..., -1]).astype(jnp.float32)
        return dot(user_B1D[..., :-1], item_BCD[..., :-1]) + biases + self.mean[...].astype(jnp.float32)


class NeuMF(Pairs):
    """h [p * q; MLP(p', q')] (He et al. 2017, eq. 12), both parts with vectors of their own.

    The MLP's first layer, as wide as its vectors, is taken apart, so that a user's part is computed once."""

    def __init__(self, config: Config, spec: Mapping[str, Any], rngs: nnx.Rngs):
        super().__init__(config, spec, rngs)
        c, dtype = self.c, config.param_dtype
        first, half = c.widths[0], self.vector(c) - c.width
        dense = functools.partial(layers.Dense, half, first, std=half**-0.5, dtype=dtype, rngs=rngs)
        self.of_user, self.of_item = dense(), dense(bias=False)
        self.tower = Tower(first, c.widths[1:], bare=False, dtype=dtype, rngs=rngs)
        last = c.width + c.widths[-1]
        self.head = layers.Dense(last, 1, std=last**-0.5, dtype=dtype, rngs=rngs, bias=False)

    @staticmethod
    def vector(c: families.Recommender) -> int:
        return c.width + c.widths[0]

    @staticmethod
    def std(c: families.Recommender) -> float:
        return 0.1  # small ones leave the products, and their gradients, near nothing

    def user(self, x: jax.Array) -> jax.Array:
        return self._with_hidden(x, self.of_user)

    def item(self, x: jax.Array) -> jax.Array:
        return self._with_hidden(x, self.of_item)

    def _with_hidden(self, x: jax.Array, dense: layers.Dense) -> jax.Array:
        hidden = mesh.shard(dense(x[..., self.c.width :]), "batch", None, None)
        return jnp.concatenate([x[..., : self.c.width], hidden], -1)

    def score(self, user_B1D: jax.Array, item_BCD: jax.Array) -> jax.Array:
        d = self.c.width
        product_BCD = user_B1D[..., :d] * item_BCD[..., :d]
        hidden_BCH = self.tower(jax.nn.relu(user_B1D[..., d:] + item_BCD[..., d:]))
        return self.head(jnp.concatenate([product_BCD, hidden_BCH], -1))[..., 0].astype(jnp.float32)


class TwoTower(Pairs):
    """cos(tower(user), tower(item)) / temperature (Yi et al. 2019, section 4)."""

    def __init__(self, config: Config, spec: Mapping[str, Any], rngs: nnx.Rngs):
        super().__init__(config, spec, rngs)
        tower = functools.partial(
            Tower, self.c.width, self.c.widths, bare=True, dtype=config.param_dtype, rngs=rngs
        )
        self.user_tower, self.item_tower = tower(), tower()

    @staticmethod
    def std(c: families.Recommender) -> float:
        return c.width**-0.5

    def user(self, x: jax.Array) -> jax.Array:
        return _unit(self.user_tower(x))

    def item(self, x: jax.Array) -> jax.Array:
        return _unit(self.item_tower(x))

    def score(self, user_B1D: jax.Array, item_BCD: jax.Array) -> jax.Array:
        return dot(user_B1D, item_BCD) / self.c.temperature


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-12)).astype(x.dtype)


class DLRM(nnx.Module):
    """Naumov et al. 2019: numbers through `bottom` to the categories' width, the dot products of every two
    of all these vectors and the numbers' own through `widths`; -> {"logits": [B, classes]}."""

    def __init__(self, config: Config, spec: Mapping[str, Any], rngs: nnx.Rngs):
        c, dtype = config.model, config.param_dtype
        assert isinstance(c, families.Recommender)
        self.dtype = config.compute_dtype
        self.inputs = embedding.TableInputs(c.rows, c.width, spec, dtype=dtype, rngs=rngs)
        numbers, features = self.inputs.numbers, self.inputs.categories + (self.inputs.numbers > 0)
        tower = functools.partial(Tower, bare=False, dtype=dtype, rngs=rngs)
        self.bottom = tower(numbers, (*c.bottom, c.width)) if numbers else None
        joined = features * (features - 1) // 2 + (c.width if numbers else 0)
        self.top = tower(joined, c.widths)
        last = c.widths[-1]
        self.head = layers.Dense(last, c.num_classes, std=last**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        numeric_BN, x_BFD = self.inputs(batch, self.dtype)
        parts = []
        if numeric_BN is not None and self.bottom is not None:
            parts.append(self.bottom(numeric_BN))
            own_B1D = parts[0][:, None]
            x_BFD = own_B1D if x_BFD is None else jnp.concatenate([own_B1D, x_BFD], 1)
        assert x_BFD is not None
        products_BFF = jnp.einsum("bfd,bgd->bfg", x_BFD, x_BFD)
        lower = jnp.tril_indices(x_BFD.shape[1], -1)
        joined = jnp.concatenate([*parts, products_BFF[:, *lower]], 1)
        return module.read_out(self.head, self.top(mesh.shard(joined, "batch", None)))


KINDS: dict[str, Any] = {"mf": Factors, "ncf": NeuMF, "two_tower": TwoTower, "dlrm": DLRM}


def make(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs) -> nnx.Module:
    """The kind that `config.model.kind` names."""
    c = config.model
    assert isinstance(c, families.Recommender)
    return KINDS[c.kind](config, spec, rngs)
