"""One Transformer stack. GPT-2 and Llama are settings of it (see `families.Transformer`).

Legend: B batch, L length, D width, H heads, G key/value heads, K head dim, F hidden units, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigmodel import mesh
from bigmodel.config import Config
from bigmodel.families import Transformer
from bigmodel.models import layers, module, ops
from bigmodel.models.attention import attend

UNROLLED_ON_CPU = 12  # layers; on a CPU a scan copies what it saves, 10-25 % of the step, and compiles faster
PROJECTIONS = ("q", "k", "v", "attention_out", "up", "gate", "mlp_out")  # names that remat policies save
OFFLOADED = {
    "offload-all": ("layer_input", "q", "k", "v", "attention_out"),
    "offload-qkv": ("layer_input", "q", "k", "v"),
}


class GPT(nnx.Module):
    """Decoder-only language model (Radford et al. 2019; Touvron et al. 2023).

    batch: `tokens`, `segments`, `positions`, each int32 [B, L] -> logits [B, L, V] in the compute dtype.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c = _transformer(config)
        self.config = config
        dtype = config.param_dtype
        self.embed = layers.Embed(c.vocab_size, c.width, dtype=dtype, rngs=rngs)
        learned, length = c.position == "learned", spec["tokens"].shape[1]
        self.positions = layers.Embed(length, c.width, dtype=dtype, rngs=rngs) if learned else None
        self.blocks = module.stack(lambda rngs: Block(config, rngs), c.depth, rngs)
        self.norm = _norm(c, dtype)
        head = functools.partial(layers.Dense, c.width, c.vocab_size, std=_small(c), dtype=dtype, bias=False)
        self.head = None if c.tie_embeddings else head(rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array], *, key: jax.Array | None, train: bool) -> jax.Array:
        c = _transformer(self.config)
        key = key if train and c.dropout else None
        x_BLD = self.embed(batch["tokens"], self.config.compute_dtype)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(batch["positions"], self.config.compute_dtype)
        keys = None
        if key is not None:
            x_BLD = layers.dropout(x_BLD, c.dropout, jax.random.fold_in(key, c.depth))
            keys = jax.random.split(key, c.depth)
        x_BLD = module.scan(
            self.blocks,
            lambda block, x, key: block(x, batch["segments"], batch["positions"], key),
            layers.shard_width(x_BLD),
            keys,
            wrap=_remat(self.config.remat),
            unroll=not c.scan or (mesh.platform() == "cpu" and c.depth <= UNROLLED_ON_CPU),
        )
        x_BLD = self.norm(x_BLD)
        logits_BLV = self.embed.attend(x_BLD) if self.head is None else self.head(x_BLD)
        return layers.shard_hidden(logits_BLV)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = _transformer(config)
        self.dropout = c.dropout
        self.attention_norm = _norm(c, config.param_dtype)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(c, config.param_dtype)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x_BLD: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        x_BLD = checkpoint_name(x_BLD, "layer_input")
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        y_BLD = self.attention(self.attention_norm(x_BLD), segments_BL, positions_BL)
        x_BLD = layers.shard_width(x_BLD + layers.dropout(y_BLD, self.dropout, keys[0]))
        y_BLD = self.mlp(self.mlp_norm(x_BLD))
        return layers.shard_width(x_BLD + layers.dropout(y_BLD, self.dropout, keys[1]))


class Attention(nnx.Module):
    """Causal self-attention within segments."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.c = c = _transformer(config)
        dense = functools.partial(layers.Dense, dtype=config.param_dtype, rngs=rngs, bias=c.bias)
        self.q = dense(c.width, c.heads * c.head_dim, std=_small(c))
        self.k = dense(c.width, c.kv_heads * c.head_dim, std=_small(c))
        self.v = dense(c.width, c.kv_heads * c.head_dim, std=_small(c))
        self.out = dense(c.heads * c.head_dim, c.width, std=_small(c) * (2 * c.depth) ** -0.5)

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.c
        q_BLHK = self._heads(checkpoint_name(self.q(x_BLD), "q"), c.heads)
        k_BLGK = self._heads(checkpoint_name(self.k(x_BLD), "k"), c.kv_heads)
        v_BLGK = self._heads(checkpoint_name(self.v(x_BLD), "v"), c.kv_heads)
        if c.position == "rope":
            q_BLHK = layers.rope(q_BLHK, positions_BL, c.rope_theta)
            k_BLGK = layers.rope(k_BLGK, positions_BL, c.rope_theta)
        y_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, segments_BL=segments_BL, causal=True, block=c.attention_block)
        y_BLD = self.out(y_BLHK.reshape(*x_BLD.shape[:2], -1))
        return checkpoint_name(y_BLD, "attention_out")

    def _heads(self, x_BLD: jax.Array, heads: int) -> jax.Array:
        x_BLHK = x_BLD.reshape(*x_BLD.shape[:2], heads, self.c.head_dim)
        return mesh.shard(x_BLHK, mesh.BATCH, None, "tensor", None)


class MLP(nnx.Module):
    """GELU (Hendrycks and Gimpel 2016) or SwiGLU (Shazeer 2020) between two projections."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = _transformer(config)
        dense = functools.partial(layers.Dense, dtype=config.param_dtype, rngs=rngs, bias=c.bias)
        self.up = dense(c.width, c.mlp_width, std=_small(c))
        self.gate = dense(c.width, c.mlp_width, std=_small(c)) if c.mlp == "swiglu" else None
        self.down = dense(c.mlp_width, c.width, std=_small(c) * (2 * c.depth) ** -0.5)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = layers.shard_hidden(checkpoint_name(self.up(x_BLD), "up"))
        if self.gate is None:
            h_BLF = ops.gelu_tanh(h_BLF)
        else:
            h_BLF = h_BLF * ops.silu(layers.shard_hidden(checkpoint_name(self.gate(x_BLD), "gate")))
        return checkpoint_name(self.down(h_BLF), "mlp_out")


def _transformer(config: Config) -> Transformer:
    assert isinstance(config.model, Transformer)
    return config.model


def _norm(c: Transformer, dtype: str) -> nnx.Module:
    if c.norm == "rmsnorm":
        return layers.RMSNorm(c.width, eps=c.norm_eps, dtype=dtype)
    return layers.LayerNorm(c.width, eps=c.norm_eps, dtype=dtype, bias=c.bias)


def _small(c: Transformer) -> float:
    """Standard deviation sqrt(2 / 5D) of the weights (Nguyen and Salazar 2019); 0.023 at GPT-2's width."""
    return (2 / (5 * c.width)) ** 0.5


def _remat(policy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the backward pass finds saved, and what it computes again.

    none: XLA's choice, all saved. full: only each layer's input. minimal: the projections, not the attention
    context. dots: every matrix product. offload-all, offload-qkv: in host memory the layer's input, q, k, v
    and (all) the attention's output projection; the rest is computed again.
    """
    policies = jax.checkpoint_policies

    def offload(names: tuple[str, ...]) -> Any:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(names),
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip

    choices: dict[str, Callable[[], Any]] = {
        "full": lambda: policies.nothing_saveable,
        "minimal": lambda: policies.save_only_these_names(*PROJECTIONS),
        "dots": lambda: policies.dots_saveable,
        "offload-all": lambda: offload(OFFLOADED["offload-all"]),
        "offload-qkv": lambda: offload(OFFLOADED["offload-qkv"]),
    }
    if policy == "none":
        return lambda body: body
    return functools.partial(jax.checkpoint, policy=choices[policy](), prevent_cse=False)
