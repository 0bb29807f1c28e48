"""BERT: an encoder that reads both ways.

Legend: B batch, L length, M masked positions an example, D width, V vocabulary.
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


class BERT(nnx.Module):
    """Bidirectional encoder (Devlin et al. 2018).

    batch: `tokens`, `segments`, `positions` int32 [B, L]; `types` int32 [B, L] if the model has token types
    (left out: 0); for `head=mlm` `masked_positions` int32 [B, M].
    -> `hidden` [B, L, D]; `pooled` [B, D] with a pooler; `logits` [B, M, V] with the mlm head, or of a
    classifier or regression [B, classes], from what is pooled, or without a pooler the first position;
    `next_sentence` [B, 2] where the batch has one; `losses` as GPT's with experts.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c = config.model
        assert isinstance(c, families.BERT)
        self.config = config
        dtype, std, width = config.param_dtype, transformer.small(c), c.width
        learned, length = c.position == "learned", spec["tokens"].shape[1]
        self.embed = layers.Embed(c.vocab_size, width, dtype=dtype, rngs=rngs)
        self.positions = layers.Embed(length, width, dtype=dtype, rngs=rngs) if learned else None
        self.types = layers.Embed(c.token_types, width, dtype=dtype, rngs=rngs) if c.token_types else None
        self.embed_norm = transformer.norm(c, dtype)
        self.blocks = module.stack(lambda rngs: transformer.Block(config, rngs), c.depth, rngs)
        self.norm = transformer.norm(c, dtype) if c.norm_order == "pre" else None
        dense = functools.partial(layers.Dense, width, dtype=dtype, rngs=rngs)
        out_std = transformer.output_std(c)
        self.pooler = dense(width, std=std) if c.pooler else None
        self.next_sentence = dense(2, std=out_std) if "next_sentence" in spec else None
        classifies = config.task.one_output
        mlm = c.head == "mlm" and not classifies
        self.head = dense(c.num_classes, std=out_std) if classifies else None
        self.transform = dense(width, std=std) if mlm else None
        self.transform_norm = transformer.norm(c, dtype) if mlm else None
        self.head_bias = nnx.Param(jnp.zeros((c.vocab_size,), dtype)) if mlm else None

    def __call__(
        self, batch: module.Batch, *, key: jax.Array | None, train: bool, taps: module.Taps | None = None
    ) -> module.Outputs:
        c, compute_dtype = transformer.transformer(self.config), self.config.compute_dtype
        x_BLD = self.embed(batch["tokens"], compute_dtype)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(batch["positions"], compute_dtype)
        if self.types is not None:
            types_BL = batch["types"] if "types" in batch else jnp.zeros_like(batch["tokens"])
            x_BLD = x_BLD + self.types(types_BL, compute_dtype)
        sight = transformer.Sight(batch["segments"], batch["positions"])
        key = key if train and c.dropout else None
        x_BLD = self.embed_norm(x_BLD)
        x_BLD, losses = transformer.run(self.config, self.blocks, self.norm, x_BLD, sight, key, taps=taps)
        outputs: dict[str, Any] = {"hidden": x_BLD}
        if self.pooler is not None:
            outputs["pooled"] = jnp.tanh(self.pooler(x_BLD[:, 0]))
        if self.head is not None:
            first_BD = outputs.get("pooled", x_BLD[:, 0])
            return outputs | transformer.one_output(self.config, self.head, first_BD, losses, key)
        if self.transform is not None:
            outputs |= self._masked_words(x_BLD, batch["masked_positions"])
        if self.next_sentence is not None:
            outputs["next_sentence"] = self.next_sentence(transformer.to_outputs(c, outputs["pooled"]))
        return {**outputs, "losses": losses}

    def _masked_words(self, x_BLD: jax.Array, at_BM: jax.Array) -> module.Outputs:
        """Logits [B, M, V] at the masked positions alone: they are 15 % of all."""
        assert self.transform is not None
        assert self.transform_norm is not None
        assert self.head_bias is not None
        c = transformer.transformer(self.config)
        x_BMD = layers.shard_stream(jnp.take_along_axis(x_BLD, at_BM[..., None], axis=1))
        x_BMD = self.transform_norm(transformer.ACTIVATIONS[c.mlp](self.transform(x_BMD)))
        x_BMD = transformer.to_outputs(c, x_BMD)
        bias_V = self.head_bias[...].astype(x_BMD.dtype)
        return module.read_out(lambda x_BMD: self.embed.attend(x_BMD) + bias_V, x_BMD)
