"""ViT: an encoder over the patches of an image.

Legend: B batch, H height, W width, C channels, P patch, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel.config import Config, InputError, families
from bigmodel.models import layers, module, transformer


class ViT(nnx.Module):
    """Vision Transformer (Dosovitskiy et al. 2020; pool=mean as in Zhai et al. 2021).

    batch: `image` float [B, H, W, C] -> {"logits": [B, classes] in the compute dtype, "losses"}.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c = config.model
        assert isinstance(c, families.ViT)
        self.config, self.patch, self.pool = config, c.patch, c.pool
        _, height, width, channels = spec["image"].shape
        if height % c.patch or width % c.patch:
            raise InputError(
                f"model.patch is {c.patch}, which does not divide images of {height} x {width}; choose one"
            )
        dtype, inputs = config.param_dtype, c.patch * c.patch * channels
        length = (height // c.patch) * (width // c.patch) + (c.pool == "cls")
        self.embed = layers.Dense(inputs, c.width, std=inputs**-0.5, dtype=dtype, rngs=rngs)
        self.first = nnx.Param(jnp.zeros((c.width,), dtype)) if c.pool == "cls" else None
        self.positions = layers.Embed(length, c.width, dtype=dtype, rngs=rngs)
        self.blocks = module.stack(lambda rngs: transformer.Block(config, rngs), c.depth, rngs)
        self.norm = transformer.norm(c, dtype) if c.norm_order == "pre" else None
        std = transformer.output_std(c)
        self.head = layers.Dense(c.width, c.num_classes, std=std, dtype=dtype, rngs=rngs)

    def __call__(
        self, batch: module.Batch, *, key: jax.Array | None, train: bool, taps: module.Taps | None = None
    ) -> module.Outputs:
        c = transformer.transformer(self.config)
        x_BLD = self.embed(patches(batch["image"].astype(self.config.compute_dtype), self.patch))
        if self.first is not None:
            first_BLD = jnp.broadcast_to(self.first[...].astype(x_BLD.dtype), (x_BLD.shape[0], 1, c.width))
            x_BLD = jnp.concatenate([first_BLD, x_BLD], axis=1)
        x_BLD = x_BLD + self.positions.table[...].astype(x_BLD.dtype)
        key = key if train and c.dropout else None
        x_BLD, losses = transformer.run(
            self.config, self.blocks, self.norm, x_BLD, transformer.Sight(), key, taps=taps
        )  # fmt: skip
        x_BD = x_BLD[:, 0] if self.pool == "cls" else x_BLD.mean(1)
        outputs = module.read_out(self.head, transformer.to_outputs(c, x_BD))
        return outputs | {"losses": {name: x_BL.mean(1) for name, x_BL in losses.items()}}


def patches(x_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, P * P * C], row by row: a convolution of stride P is a product with these."""
    b, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(b, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * channels)
