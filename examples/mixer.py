r"""MLP-Mixer (Tolstikhin et al. 2021): a family of models that bigmodel does not know.

    python scripts/train.py --config=configs/own_model.py --workdir=runs/mixer

The other commands take it as they take any run. Legend: B batch, N patches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from bigmodel.config import Config, InputError
from bigmodel.config.families.base import Family, positive
from bigmodel.models import layers, module, vit


@dataclass(frozen=True)
class Mixer(Family):
    """The keys of config.model."""

    depth: int = 4
    width: int = 64
    patch: int = 2  # pixels a side
    token_width: int = 32  # hidden units of the MLPs across patches
    channel_width: int = 256  # of those across channels
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "depth", "width", "patch", "token_width", "channel_width")

    def module(self) -> Callable[..., Any]:
        return Network


class Mlp(nnx.Module):
    def __init__(self, size: int, hidden: int, dtype: str, rngs: nnx.Rngs):
        self.norm = layers.LayerNorm(size, eps=1e-6, dtype=dtype)
        self.up = layers.Dense(size, hidden, std=size**-0.5, dtype=dtype, rngs=rngs)
        self.down = layers.Dense(hidden, size, std=hidden**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(self.norm(x))))


class Block(nnx.Module):
    def __init__(self, c: Mixer, patches: int, dtype: str, rngs: nnx.Rngs):
        self.tokens = Mlp(patches, c.token_width, dtype, rngs)
        self.channels = Mlp(c.width, c.channel_width, dtype, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        x_BND = x_BND + self.tokens(x_BND.swapaxes(1, 2)).swapaxes(1, 2)
        return x_BND + self.channels(x_BND)


class Network(nnx.Module):
    """batch: `image` float [B, height, width, channels] -> logits [B, C]."""

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c, dtype, (_, *sides, channels) = config.model, config.param_dtype, spec["image"].shape
        assert isinstance(c, Mixer)
        if any(side % c.patch for side in sides):
            raise InputError(f"model.patch={c.patch} does not divide images of {sides}; choose a divisor")
        self.patch, self.dtype = c.patch, config.compute_dtype
        inputs, patches = c.patch**2 * channels, sides[0] * sides[1] // c.patch**2
        self.embed = layers.Dense(inputs, c.width, std=inputs**-0.5, dtype=dtype, rngs=rngs)
        self.blocks = module.stack(lambda rngs: Block(c, patches, dtype, rngs), c.depth, rngs)
        self.norm = layers.LayerNorm(c.width, eps=1e-6, dtype=dtype)
        self.head = layers.Dense(c.width, c.num_classes, std=0.02, dtype=dtype, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array], *, key: Any, train: bool) -> dict[str, jax.Array]:
        x_BND = self.embed(vit.patches(batch["image"].astype(self.dtype), self.patch))
        x_BND, _ = module.scan(self.blocks, lambda block, x, _: (block(x), None), x_BND)
        return {"logits": self.head(self.norm(x_BND).mean(1))}
