"""GPT: decoder-only language models.

Legend: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel.config import Config, families
from bigmodel.models import layers, module, transformer


class GPT(nnx.Module):
    """Decoder-only language model (Radford et al. 2019; Touvron et al. 2023; Jiang et al. 2024).

    batch: `tokens`, `segments`, `positions`, each int32 [B, L] -> {"logits": [B, L, V] in the compute dtype,
    "losses": the experts' {name: float32 [B, L]}}. A classifier or a regression has logits [B, classes], from
    a text's last token (Radford et al. 2018, section 3.2), and losses [B].

    With a `cache` (see `transformer.run_cached`), and `pages` (and `owners`) if it is paged -> {"logits",
    "cache"}; with `read_at` [B, N] the logits of these places alone.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c = config.model
        assert isinstance(c, families.GPT)
        self.config = config
        dtype = config.param_dtype
        self.embed = layers.Embed(c.vocab_size, c.width, dtype=dtype, rngs=rngs)
        learned, length = c.position == "learned", spec["tokens"].shape[1]
        self.positions = layers.Embed(length, c.width, dtype=dtype, rngs=rngs) if learned else None
        self.blocks = module.stack(lambda rngs: transformer.Block(config, rngs), c.depth, rngs)
        self.norm = transformer.norm(c, dtype) if c.norm_order == "pre" else None
        self.one_output = config.task.one_output
        outputs, std = c.num_classes if self.one_output else c.vocab_size, transformer.output_std(c)
        head = functools.partial(layers.Dense, c.width, outputs, std=std, dtype=dtype, bias=False)
        self.head = None if c.tie_embeddings and not self.one_output else head(rngs=rngs)

    def __call__(
        self, batch: module.Batch, *, key: jax.Array | None, train: bool, taps: module.Taps | None = None
    ) -> module.Outputs:
        c = transformer.transformer(self.config)
        x_BLD = self.embed(batch["tokens"], self.config.compute_dtype)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(batch["positions"], self.config.compute_dtype)
        if "cache" in batch:
            return self._cached(x_BLD, batch)
        sight = transformer.Sight(batch["segments"], batch["positions"], causal=True)
        key = key if train and c.dropout else None
        x_BLD, losses = transformer.run(self.config, self.blocks, self.norm, x_BLD, sight, key, taps=taps)
        if self.one_output:
            assert self.head is not None
            last_BD = layers.read(x_BLD, batch["segments"], "last")
            return transformer.one_output(self.config, self.head, last_BD, losses, key)
        return module.read_out(self._logits, x_BLD) | {"losses": losses}

    def _cached(self, x_BLD: jax.Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        sight = transformer.Sight(
            batch.get("segments"), batch["positions"], causal=True, pages_BT=batch.get("pages"),
            owners=batch.get("owners"),
        )  # fmt: skip
        x_BLD, cache = transformer.run_cached(
            self.config, self.blocks, self.norm, x_BLD, sight, batch["cache"]
        )
        if "read_at" in batch:
            x_BLD = jnp.take_along_axis(x_BLD, batch["read_at"][..., None], 1)
        return {"logits": self._logits(x_BLD), "cache": cache}

    def _logits(self, x_BLD: jax.Array) -> jax.Array:
        x_BLD = transformer.to_outputs(transformer.transformer(self.config), x_BLD)
        return self.embed.attend(x_BLD) if self.head is None else self.head(x_BLD)
