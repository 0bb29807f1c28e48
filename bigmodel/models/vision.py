"""Convolutional networks. Legend: B batch, H height, W width, C channels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from flax import nnx

from bigmodel.config import Config
from bigmodel.families import CNN as CNNConfig
from bigmodel.models import layers, ops


class CNN(nnx.Module):
    """Conv 3x3 + ReLU for each entry of `channels`, max-pool 2 after the first; Dense + ReLU; Dense.

    batch: `image` float [B, H, W, C] -> logits [B, classes] in the compute dtype.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        assert isinstance(config.model, CNNConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype = config.compute_dtype
        _, height, width, channels = spec["image"].shape
        sizes = zip((channels, *c.channels), c.channels, strict=False)
        self.convs = nnx.List([layers.Conv(i, o, 3, dtype=dtype, rngs=rngs) for i, o in sizes])
        flat = (height // 2) * (width // 2) * c.channels[-1]
        self.hidden = layers.Dense(flat, c.width, std=math.sqrt(2 / flat), dtype=dtype, rngs=rngs)
        self.head = layers.Dense(c.width, c.num_classes, std=c.width**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array], *, key: jax.Array | None, train: bool) -> jax.Array:
        x_BHWC = batch["image"].astype(self.compute_dtype)
        for index, conv in enumerate(self.convs):
            x_BHWC = jax.nn.relu(conv(x_BHWC))
            if index == 0:
                x_BHWC = ops.max_pool(x_BHWC, (2, 2), (2, 2))
        x_BD = x_BHWC.reshape(x_BHWC.shape[0], -1)
        return self.head(jax.nn.relu(self.hidden(x_BD)))
