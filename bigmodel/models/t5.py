"""T5: an encoder and a decoder that reads it.

Legend: B batch, L input length, M target length, D width, V vocabulary.
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
from bigmodel.models.transformer import RelativeBias, Sight, Stack


class T5(nnx.Module):
    """Text to text (Raffel et al. 2020; with mlp=geglu and tie_embeddings=false, Shazeer's v1.1).

    batch: `tokens`, `segments` int32 [B, L]; `decoder_tokens`, `decoder_segments` int32 [B, M] -> {"logits":
    [B, M, V] in the compute dtype, "losses"} as GPT's, a target token bearing its input's mean too.
    A classifier or a regression has the encoder alone: {"logits": [B, classes]} from the mean of its answer
    (Ni et al. 2021, section 3.2).

    With a `cache` of the decoder: `tokens` -> {"cache"}, which holds the encoder's answer; `decoder_tokens`,
    `positions` int32 [B, M], and the input's `segments` -> {"logits", "cache"}.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        del spec  # positions are relative: no size depends on the batch's
        c = config.model
        assert isinstance(c, families.T5)
        self.config, self.scale_output = config, c.scale_output
        dtype, std = config.param_dtype, transformer.output_std(c)
        self.embed = layers.Embed(c.vocab_size, c.width, dtype=dtype, rngs=rngs, std=1.0)

        def relative(bidirectional: bool) -> RelativeBias:
            return RelativeBias(
                c.relative_buckets, c.relative_distance, c.heads, bidirectional=bidirectional, dtype=dtype,
                std=std, rngs=rngs,
            )  # fmt: skip

        self.one_output = config.task.one_output
        self.encoder_bias = relative(True)
        self.decoder_bias = None if self.one_output else relative(False)
        self.encoder = Stack(config, rngs, c.depth)
        self.decoder = None if self.one_output else Stack(config, rngs, c.decoder_depth, cross=True)
        outputs = c.num_classes if self.one_output else c.vocab_size
        head = functools.partial(layers.Dense, c.width, outputs, std=std, dtype=dtype, bias=False)
        self.head = None if c.tie_embeddings and not self.one_output else head(rngs=rngs)

    def __call__(
        self, batch: module.Batch, *, key: jax.Array | None, train: bool, taps: module.Taps | None = None
    ) -> module.Outputs:
        c, config = transformer.transformer(self.config), self.config
        if "cache" in batch and "decoder_tokens" in batch:
            return self._decode(batch)
        tokens_BL, segments_BL = batch["tokens"], batch["segments"]
        keys: Any = (None, None, None)
        if key is not None and train and c.dropout:
            keys = jax.random.split(key, 3)
        x_BLD = self.embed(tokens_BL, config.compute_dtype)
        sight = Sight(segments_BL, bias=self.encoder_bias.within(tokens_BL.shape[1]))
        memory_BLD, encoder_losses = self.encoder(config, x_BLD, sight, keys[0], taps)
        if self.decoder is None or self.decoder_bias is None:
            assert self.head is not None
            mean_BD = layers.read(memory_BLD, segments_BL, "mean")
            return transformer.one_output(config, self.head, mean_BD, encoder_losses, keys[1])
        if "cache" in batch:
            return {"cache": self.decoder.read_memory(memory_BLD, batch["cache"])}
        decoder_BM, decoder_segments_BM = batch["decoder_tokens"], batch["decoder_segments"]
        memory_BLD = layers.dropout(memory_BLD, c.dropout, keys[1])
        sight = Sight(
            decoder_segments_BM, causal=True, bias=self.decoder_bias.within(decoder_BM.shape[1]),
            memory_BSD=memory_BLD, memory_segments_BS=segments_BL,
        )  # fmt: skip
        y_BMD = self.embed(decoder_BM, config.compute_dtype)
        y_BMD, losses = self.decoder(config, y_BMD, sight, keys[2], taps)
        real_BL = (segments_BL > 0).astype(jnp.float32)
        means = {
            k: (x * real_BL).sum(1, keepdims=True) / real_BL.sum(1, keepdims=True).clip(1)
            for k, x in encoder_losses.items()
        }
        losses = {k: x + means[k] for k, x in losses.items()}
        return module.read_out(self._logits, y_BMD) | {"losses": losses}

    def _decode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        assert self.decoder is not None
        sight = Sight(
            positions_BL=batch["positions"], causal=True, bias=self.decoder_bias,
            memory_segments_BS=batch["segments"],
        )  # fmt: skip
        y_BMD = self.embed(batch["decoder_tokens"], self.config.compute_dtype)
        stack = self.decoder
        y_BMD, cache = transformer.run_cached(
            self.config, stack.blocks, stack.norm, y_BMD, sight, batch["cache"]
        )
        return {"logits": self._logits(y_BMD), "cache": cache}

    def _logits(self, y_BMD: jax.Array) -> jax.Array:
        c = transformer.transformer(self.config)
        y_BMD = transformer.to_outputs(c, y_BMD)
        if self.head is not None:
            return self.head(y_BMD)
        # A tied table is scaled for the input: the output undoes that, for muP as at the base width.
        width = c.mup_base_width or c.width
        y_BMD = y_BMD * width**-0.5 if self.scale_output else y_BMD
        return self.embed.attend(y_BMD)
