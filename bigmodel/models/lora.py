"""Low-rank adapters (Hu et al. 2021) on any model: W + (alpha / rank) A B in place of W, which stays.

`storage` adds them to the parameters under "lora/", around any other storage; the modules do not know.
A layer that asks for `product(x, W)` gets x W + (alpha / rank) (x A) B, inside the scanned block: neither
W + A B nor its gradient is ever stored.

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

from bigmodel import trees
from bigmodel.config import InputError
from bigmodel.config.adapt import Lora
from bigmodel.models import weights
from bigmodel.models.module import Definition, Storage, Tree

NAME = "lora"  # where the adapters are among the parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """base [.., I, O], an array or a `weights.Quantized`, and what is added to it: scale * a @ b."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    def __getitem__(self, index: Any) -> Self:
        assert index is ...
        return self

    def astype(self, dtype: Any) -> jax.Array:
        """The sum, for layers that need the weight itself, and for an export."""
        low = self.a.astype(jnp.float32) @ self.b.astype(jnp.float32)
        return (self.base.astype(jnp.float32) + self.scale * low).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        low = weights.product(weights.product(x, self.a), self.b)
        return weights.product(x, self.base) + low * jnp.asarray(self.scale, x.dtype)


def storage(definition: Definition, base: Storage, how: Lora) -> Storage:
    """`base` with an adapter on each weight [.., I, O] whose path `how.on` finds.

    A starts out random, B at zero, so that the model starts out as it was; both are float32.

    Raises:
        InputError: no weight has such a path.
    """
    if not how.rank:
        return base
    known = {name for name, sums in definition.products.items() if sums == (-2,)}
    chosen = {name for name in known if re.search(how.on, "/" + name)}
    if not chosen:
        raise InputError(
            f"lora.on={how.on!r} finds no weight of this model; it has {', '.join(sorted(known))}"
        )
    shapes = {name: w.shape for name, w in trees.by_path(definition.plain_spec).items() if name in chosen}

    def encode(key: jax.Array, plain: Tree) -> tuple[Tree, Tree]:
        params, parts = base.encode(key, plain)
        adapters = {}
        for each, (name, (*depth, i, o)) in zip(
            jax.random.split(key, len(shapes)), shapes.items(), strict=True
        ):
            adapters[f"{name}/a"] = jax.random.normal(each, (*depth, i, how.rank), jnp.float32) * i**-0.5
            adapters[f"{name}/b"] = jnp.zeros((*depth, how.rank, o), jnp.float32)
        return {**params, NAME: trees.nest(adapters)}, parts

    def decode(params: Tree, parts: Tree) -> Tree:
        adapters = trees.by_path(params[NAME])
        params = {key: value for key, value in params.items() if key != NAME}

        def adapted(path: Any, w: Any) -> Any:
            name = trees.path_str(path)
            if name not in chosen:
                return w
            return Adapted(w, adapters[f"{name}/a"], adapters[f"{name}/b"], how.alpha / how.rank)

        return jax.tree_util.tree_map_with_path(adapted, base.decode(params, parts), is_leaf=_is_weight)

    return Storage(base.parts, encode, decode)


def _is_weight(x: Any) -> bool:
    return isinstance(x, weights.Quantized | weights.Rounded)
