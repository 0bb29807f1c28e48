"""The Transformer stack that GPT, BERT, T5 and ViT are settings of (see `families.Transformer`).

Legend: B batch, L length, S keys of a memory or a cache, D width, H heads, G key/value heads, K head dim, F
hidden units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigmodel import mesh
from bigmodel.config import Config
from bigmodel.config.families import Transformer
from bigmodel.models import cache as cache_lib
from bigmodel.models import layers, module, moe, ops
from bigmodel.models.attention import (
    Attended,
    Owners,
    attend,
    attend_cached,
    attend_paged,
    scaled,
    visible,
)

UNROLLED_ON_CPU = 12  # layers; on a CPU a scan copies what it saves, 10-25 % of the step, and compiles faster
PROJECTIONS = ("q", "k", "v", "attention_out", "up", "gate", "mlp_out")  # names that remat policies save
OFFLOADED = {
    "offload-all": ("layer_input", "q", "k", "v", "attention_out"),
    "offload-qkv": ("layer_input", "q", "k", "v"),
}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": ops.gelu_tanh, "gelu_exact": ops.gelu, "relu": jax.nn.relu,  # Hendrycks and Gimpel 2016
    "swiglu": ops.silu, "geglu": ops.gelu_tanh,  # Shazeer 2020
}  # fmt: skip
GATED = ("swiglu", "geglu")


Cache = cache_lib.Cache  # a whole stack's, or one layer's


class Sight(NamedTuple):
    """Inputs of every layer of a stack, besides the stream."""

    segments_BL: jax.Array | None = None  # a position sees its own segment only; 0 is padding
    positions_BL: jax.Array | None = None  # for rope, and a token's place in a cache
    causal: bool = False
    bias: Any = None  # float32 [H, L, L], added to self-attention's scores; with a cache: (positions) -> it
    memory_BSD: jax.Array | None = None  # what cross-attention reads
    memory_segments_BS: jax.Array | None = None
    pages_BT: jax.Array | None = None  # where a paged cache holds each sequence
    owners: Owners | None = None  # and whose each page is, where every sequence has one new token


class Stack(nnx.Module):
    """Blocks, and after them a norm where the blocks' own come first (`norm_order=pre`)."""

    def __init__(self, config: Config, rngs: nnx.Rngs, depth: int, cross: bool = False):
        c = transformer(config)
        self.blocks = module.stack(lambda rngs: Block(config, rngs, cross), depth, rngs)
        self.norm = norm(c, config.param_dtype) if c.norm_order == "pre" else None

    def __call__(
        self, config: Config, x_BLD: jax.Array, sight: Sight, key: jax.Array | None,
        taps: module.Taps | None = None,
    ) -> tuple[jax.Array, moe.Losses]:  # fmt: skip
        return run(config, self.blocks, self.norm, x_BLD, sight, key, taps=taps)

    def read_memory(self, memory_BSD: jax.Array, cache: Cache) -> Cache:
        """The cache with what cross-attention will read of the memory, each layer's own."""

        def call(block: Any, carry: None, cache: Cache) -> tuple[None, Cache]:
            return carry, cache_lib.keep_memory(cache, *block.cross.keys(memory_BSD))

        return module.scan(self.blocks, call, None, cache)[1]


def run(
    config: Config, blocks: nnx.Module, last_norm: nnx.Module | None, x_BLD: jax.Array, sight: Sight,
    key: jax.Array | None, *, taps: module.Taps | None = None,
) -> tuple[jax.Array, moe.Losses]:  # fmt: skip
    """x through all blocks and the last norm -> (y [B, L, D], the mean over depth of the layers' losses).

    Args:
        blocks: a `module.stack` of `Block`.
        key: for dropout, of the input too; None: no dropout.
        taps: gets the last layer's self-attention, an `Attended` with its mask and bias, in "attention".
    """
    return _run(config, blocks, last_norm, x_BLD, sight, key, taps=taps)[:2]


def run_cached(
    config: Config, blocks: nnx.Module, last_norm: nnx.Module | None, x_BLD: jax.Array, sight: Sight,
    cache: Cache,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Runs blocks without dropout, and writes x into their cache (`models/cache.py`) -> (y [B, L, D], cache).

    With `sight.segments_BL` x is all that there is; without, x goes on from what the cache holds.
    """
    y_BLD, _, cache = _run(config, blocks, last_norm, x_BLD, sight, None, cache=cache)
    return y_BLD, cache


def _run(
    config: Config, blocks: nnx.Module, last_norm: nnx.Module | None, x_BLD: jax.Array, sight: Sight,
    key: jax.Array | None, *, cache: Cache | None = None, taps: module.Taps | None = None,
) -> tuple[jax.Array, moe.Losses, Any]:  # fmt: skip
    c = transformer(config)
    depth = module.depth(blocks)
    keys = None
    if key is not None:
        x_BLD = layers.dropout(x_BLD, c.dropout, jax.random.fold_in(key, depth))
        keys = jax.random.split(key, depth)
    zero_BL = jnp.zeros(x_BLD.shape[:2], jnp.float32) if c.experts else None
    losses = dict.fromkeys(moe.LOSSES, zero_BL) if c.experts else {}
    last = None if taps is None else _attended(c, x_BLD)

    def call(block: Any, carry: Any, x: tuple[jax.Array | None, Cache | None]) -> Any:
        x_BLD, losses, last = carry
        own_taps: module.Taps | None = None if last is None else {}
        x_BLD, own, cache = block(x_BLD, sight, *x, taps=own_taps)
        losses = {name: value + own[name] / depth for name, value in losses.items()}
        return (x_BLD, losses, own_taps and own_taps["attention"][0]), cache

    (x_BLD, losses, last), cache = module.scan(
        blocks,
        call,
        (layers.shard_stream(x_BLD), losses, last),
        (keys, cache),
        wrap=_remat(config.remat),
        unroll=not c.scan or (mesh.platform() == "cpu" and depth <= UNROLLED_ON_CPU),
    )
    if taps is not None and last is not None:
        length = x_BLD.shape[1]
        mask = visible(sight.segments_BL, length, length, sight.causal, window=c.window)
        taps.setdefault("attention", []).append(last._replace(mask=mask, bias_HLS=sight.bias))
    return (x_BLD if last_norm is None else last_norm(x_BLD)), losses, cache


def one_output(
    config: Config, head: layers.Dense, x_BD: jax.Array, losses: moe.Losses, key: jax.Array | None
) -> dict[str, Any]:
    """The vector of a text -> {"logits": [B, classes], "losses": the experts', [B] each}."""
    c = transformer(config)
    key = None if key is None else jax.random.fold_in(key, c.depth + 1)
    outputs = module.read_out(head, layers.dropout(to_outputs(c, x_BD), c.dropout, key))
    return outputs | {"losses": {name: x_BL.mean(1) for name, x_BL in losses.items()}}


def _attended(c: Transformer, x_BLD: jax.Array) -> Attended:
    """Inputs of a layer's self-attention, as zeros."""
    shapes = ((*x_BLD.shape[:2], heads, c.head_dim) for heads in (c.heads, c.kv_heads, c.kv_heads))
    heads = ("batch", "sequence", "heads", None)
    return Attended(*(mesh.shard(jnp.zeros(shape, x_BLD.dtype), *heads) for shape in shapes))


class Block(nnx.Module):
    """Self-attention, cross-attention if there is a memory, MLP or experts; each a step of the stream.

    `norm_order=pre`: x + f(norm(x)). `post`: norm(x + f(x)) (Vaswani et al. 2017).
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, cross: bool = False):
        self.c = c = transformer(config)
        dtype = config.param_dtype
        self.attention_norm = norm(c, dtype)
        self.attention = Attention(config, rngs)
        self.cross_norm = norm(c, dtype) if cross else None
        self.cross = Attention(config, rngs) if cross else None
        self.mlp_norm = norm(c, dtype)
        self.mlp: Any = _experts(config, rngs) if c.experts else MLP(config, rngs)

    def __call__(
        self, x_BLD: jax.Array, sight: Sight, key: jax.Array | None, cache: Cache | None = None,
        taps: module.Taps | None = None,
    ) -> tuple[jax.Array, moe.Losses, Cache | None]:  # fmt: skip
        x_BLD = checkpoint_name(x_BLD, "layer_input")
        count = 2 if self.cross is None else 3
        keys = [None] * count if key is None else list(jax.random.split(key, count))
        losses: moe.Losses = {}

        def mlp(x_BLD: jax.Array) -> jax.Array:
            if not self.c.experts:
                return self.mlp(x_BLD)
            segments_BL = sight.segments_BL
            if cache is not None and segments_BL is None and sight.positions_BL is not None:
                segments_BL = (sight.positions_BL >= 0).astype(jnp.int32)
            y_BLD, own = self.mlp(x_BLD, segments_BL)
            losses.update(own)
            return y_BLD

        if cache is not None:
            cache = dict(cache)  # attention writes into it
        attention = functools.partial(self.attention, sight=sight, cache=cache, taps=taps)
        x_BLD = self._step(x_BLD, self.attention_norm, attention, keys[0])
        if self.cross is not None:
            cross = self.cross
            x_BLD = self._step(x_BLD, self.cross_norm, lambda x: cross.over_memory(x, sight, cache), keys[1])
        return self._step(x_BLD, self.mlp_norm, mlp, keys[-1]), losses, cache

    def _step(
        self, x_BLD: jax.Array, norm: Any, f: Callable[[jax.Array], jax.Array], key: jax.Array | None
    ) -> jax.Array:
        pre = self.c.norm_order == "pre"
        y_BLD = layers.dropout(f(norm(x_BLD) if pre else x_BLD), self.c.dropout, key)
        x_BLD = x_BLD + y_BLD if pre else norm(x_BLD + y_BLD)
        return layers.shard_stream(x_BLD)


class Attention(nnx.Module):
    """Attention within segments: of a stream over itself, or over a memory."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.c = c = transformer(config)
        dense = functools.partial(layers.Dense, dtype=config.param_dtype, rngs=rngs, bias=c.bias)
        q_scale = 1.0 if c.scale_attention else c.base_head_dim**-0.5  # the scores start out alike
        self.q = dense(c.width, c.heads * c.head_dim, std=small(c) * q_scale)
        self.k = dense(c.width, c.kv_heads * c.head_dim, std=small(c))
        self.v = dense(c.width, c.kv_heads * c.head_dim, std=small(c))
        self.out = dense(c.heads * c.head_dim, c.width, std=_last(c))

    def __call__(
        self, x_BLD: jax.Array, sight: Sight, cache: Cache | None = None, taps: module.Taps | None = None
    ) -> jax.Array:
        """x [B, L, D] over itself, and over what `cache` holds; x's own keys go into it, in place."""
        c, at_BL = self.c, sight.positions_BL
        q_BLHK = self._queries(x_BLD)
        k_BLGK, v_BLGK = self.keys(x_BLD)
        if c.position == "rope" and at_BL is not None:
            q_BLHK = layers.rope(q_BLHK, at_BL, c.rope_theta)
            k_BLGK = layers.rope(k_BLGK, at_BL, c.rope_theta)
        scale = c.score_scale
        if cache is not None:
            assert at_BL is not None
            real_BL = at_BL >= 0 if sight.segments_BL is None else sight.segments_BL > 0
            cache.update(cache_lib.write(cache, k_BLGK, v_BLGK, at_BL, real_BL, sight.pages_BT))
            if sight.pages_BT is not None and sight.owners is not None:
                kv = cache_lib.read(cache, q_BLHK.dtype, None)
                options: Any = {"window": c.window, "scale": scale}
                return self._merge(attend_paged(q_BLHK, *kv, at_BL, sight.pages_BT, sight.owners, **options))
            if sight.segments_BL is None:
                kv = cache_lib.read(cache, q_BLHK.dtype, sight.pages_BT)
                y_BLHK = attend_cached(q_BLHK, *kv, at_BL, window=c.window, bias=sight.bias, scale=scale)
                return self._merge(y_BLHK)
        if taps is not None:
            taps.setdefault("attention", []).append(Attended(scaled(q_BLHK, scale), k_BLGK, v_BLGK))
        bias_HLL = sight.bias if cache is None or sight.bias is None else sight.bias(at_BL, at_BL)
        y_BLHK = attend(
            q_BLHK, k_BLGK, v_BLGK, segments_BL=sight.segments_BL, causal=sight.causal, window=c.window,
            bias_HLS=bias_HLL, scale=scale, block=c.attention_block,
        )  # fmt: skip
        return self._merge(y_BLHK)

    def over_memory(self, x_BLD: jax.Array, sight: Sight, cache: Cache | None = None) -> jax.Array:
        """Queries from x [B, L, D], keys and values from the memory [B, S, D] or what `cache` keeps of it."""
        q_BLHK = self._queries(x_BLD)
        if cache is not None:
            k_BSGK, v_BSGK = cache_lib.memory(cache)
        else:
            assert sight.memory_BSD is not None
            k_BSGK, v_BSGK = self.keys(sight.memory_BSD)
        segments_BL = sight.segments_BL
        if segments_BL is None:
            segments_BL = jnp.ones(x_BLD.shape[:2], jnp.int32)
        y_BLHK = attend(
            q_BLHK, k_BSGK, v_BSGK, segments_BL=segments_BL, causal=False,
            key_segments_BS=sight.memory_segments_BS, scale=self.c.score_scale,
        )  # fmt: skip
        return self._merge(y_BLHK)

    def keys(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-> keys and values [B, S, G, K]."""
        k_BSGK = self._heads(checkpoint_name(self.k(x_BSD, outputs=(self.c.kv_heads, self.c.head_dim)), "k"))
        v_BSGK = self._heads(checkpoint_name(self.v(x_BSD, outputs=(self.c.kv_heads, self.c.head_dim)), "v"))
        return k_BSGK, v_BSGK

    def _queries(self, x_BLD: jax.Array) -> jax.Array:
        return self._heads(checkpoint_name(self.q(x_BLD, outputs=(self.c.heads, self.c.head_dim)), "q"))

    def _merge(self, y_BLHK: jax.Array) -> jax.Array:
        return checkpoint_name(self.out(y_BLHK, inputs=(self.c.heads, self.c.head_dim)), "attention_out")

    def _heads(self, x_BLHK: jax.Array) -> jax.Array:
        return mesh.shard(x_BLHK, "batch", "sequence", "heads", None)


class MLP(nnx.Module):
    """An activation between two projections, or (GATED) its product with a third one."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = transformer(config)
        self.activation = ACTIVATIONS[c.mlp]
        dense = functools.partial(layers.Dense, dtype=config.param_dtype, rngs=rngs, bias=c.bias)
        self.up = dense(c.width, c.mlp_width, std=small(c))
        self.gate = dense(c.width, c.mlp_width, std=small(c)) if c.mlp in GATED else None
        self.down = dense(c.mlp_width, c.width, std=_last(c))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = checkpoint_name(self.up(x_BLD), "up")
        if self.gate is None:
            h_BLF = self.activation(h_BLF)
        else:
            h_BLF = h_BLF * self.activation(checkpoint_name(self.gate(x_BLD), "gate"))
        return checkpoint_name(self.down(h_BLF), "mlp_out")


def _experts(config: Config, rngs: nnx.Rngs) -> moe.MoE:
    c = transformer(config)
    return moe.MoE(
        c, ACTIVATIONS[c.mlp], gated=c.mlp in GATED, std=small(c), out_std=_last(c), dtype=config.param_dtype,
        rngs=rngs,
    )  # fmt: skip


class RelativeBias(nnx.Module):
    """T5's scores by distance (Raffel et al. 2020, section 2.1): one number for each bucket and head.

    Half of the buckets hold one distance each, the others grow by powers up to `distance`.
    """

    def __init__(
        self, buckets: int, distance: int, heads: int, *, bidirectional: bool, dtype: str, std: float,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.distance, self.bidirectional = distance, bidirectional
        self.buckets = nnx.Param(std * jax.random.normal(rngs.params(), (buckets, heads), dtype))

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Their positions [..., L], [..., S] -> float32 [..., H, L, S]."""
        offset = keys[..., None, :] - queries[..., :, None]
        table = self.buckets[...].astype(jnp.float32)
        of = bucket(offset, table.shape[0], self.distance, self.bidirectional)
        return jnp.moveaxis(table[of], -1, -3)

    def within(self, length: int) -> jax.Array:
        """-> float32 [H, L, L], of a stream over itself."""
        at_L = jnp.arange(length, dtype=jnp.int32)
        return self(at_L, at_L)


def bucket(offset: jax.Array, buckets: int, distance: int, bidirectional: bool) -> jax.Array:
    """Key's position minus query's, int32 -> the bucket's number, as in the authors' code."""
    first = jnp.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        first = jnp.where(offset > 0, buckets, 0)
    away = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(away < exact, away, far)


def transformer(config: Config) -> Transformer:
    """`config.model`, which is a Transformer's here."""
    assert isinstance(config.model, Transformer)
    return config.model


def norm(c: Transformer, dtype: str) -> nnx.Module:
    """A LayerNorm or RMSNorm over the width."""
    if c.norm == "rmsnorm":
        return layers.RMSNorm(c.width, eps=c.norm_eps, dtype=dtype)
    return layers.LayerNorm(c.width, eps=c.norm_eps, dtype=dtype, bias=c.bias)


def small(c: Transformer) -> float:
    """Standard deviation sqrt(2 / 5D) of the weights (Nguyen and Salazar 2019); 0.023 at GPT-2's width."""
    return (2 / (5 * c.width)) ** 0.5


def output_std(c: Transformer) -> float:
    """Standard deviation of an output layer's weights: muP's is that of the base width."""
    return small(c) * c.mup_ratio**-0.5


def to_outputs(c: Transformer, x: jax.Array) -> jax.Array:
    """Multiplies what output layers read by muP's base width / width."""
    return x if c.mup_ratio == 1 else x * jnp.asarray(c.mup_ratio, x.dtype)


def _last(c: Transformer) -> float:
    """Standard deviation of a layer's last projection: small, so that depth does not make the stream grow."""
    return small(c) * (2 * c.depth) ** -0.5


def _remat(policy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decides which values are saved for the backward pass; it computes the others again.

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
