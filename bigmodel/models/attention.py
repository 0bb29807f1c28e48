"""Attention through one function, `attend`, which picks the best kernel for the backend.

TPU: the Pallas splash-attention kernel. GPU: cuDNN's flash attention, through `jax.nn`. Elsewhere, and
where a kernel does not take the shape or dtype: plain XLA. All three give equal values within rounding.

Legend: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P

from bigmodel import mesh

SPLASH_BLOCK = 512  # rows of a kernel block; the fastest of 256, 512, 1024 in MaxText's published settings


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segments_BL: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v -> [B, L, H, K]; grouped queries when G < H (Ainslie et al. 2023).

    Args:
        segments_BL: int; a query sees only keys of its own segment (self-attention, L == S). None: all.
        causal: a query sees only keys at its own position or before.
    """
    kernel = pick(q_BLHK.shape[1], q_BLHK.shape[-1], q_BLHK.dtype, mesh.platform())
    if kernel == "splash":
        return attend_splash(q_BLHK, k_BSGK, v_BSGK, segments_BL, causal)
    if kernel == "cudnn":
        mask = visible(segments_BL, q_BLHK.shape[1], k_BSGK.shape[1], causal=False)
        return jax.nn.dot_product_attention(
            q_BLHK, k_BSGK, v_BSGK, mask=mask, is_causal=causal, implementation="cudnn"
        )
    return attend_xla(q_BLHK, k_BSGK, v_BSGK, visible(segments_BL, q_BLHK.shape[1], k_BSGK.shape[1], causal))


def pick(length: int, head_dim: int, dtype: jnp.dtype, platform: str) -> str:
    """`splash`, `cudnn` or `xla`: the fastest kernel that takes these shapes on this platform."""
    if platform == "tpu" and length % 128 == 0 and head_dim % 64 == 0:
        return "splash"
    if platform == "gpu" and dtype != jnp.float32 and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def visible(segments_BL: jax.Array | None, queries: int, keys: int, causal: bool) -> jax.Array | None:
    """bool [B or 1, 1, L, S]: which keys a query may see; None when it may see all."""
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None, None]
    if segments_BL is not None:
        same = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def attend_xla(q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The plain form, softmax in float32; `mask` as `visible` makes it."""
    b, length, heads, dim = q_BLHK.shape
    groups = k_BSGK.shape[2]
    q_BLGRK = q_BLHK.reshape(b, length, groups, heads // groups, dim)
    scores = jnp.einsum("BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRLS,BSGK->BLGRK", weights, v_BSGK).reshape(b, length, heads, dim)


def attend_splash(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas TPU kernel, on each device's own examples and heads; `interpret` runs it on any backend."""
    length, dim = q_BLHK.shape[1], q_BLHK.shape[-1]
    keys = k_BSGK.shape[1]
    if segments_BL is None:
        segments_BL = jnp.ones((q_BLHK.shape[0], length), jnp.int32)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        head_mask = splash_mask.CausalMask((length, keys)) if causal else splash_mask.FullMask((length, keys))
        block = next(b for b in (SPLASH_BLOCK, 256, 128) if length % b == 0 and keys % b == 0)
        sizes = splash_kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        )  # fmt: skip
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([head_mask] * q.shape[2]),
            block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        )  # fmt: skip
        ids = splash_kernel.SegmentIds(q=segments, kv=segments)
        q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(dim**-0.5, q.dtype), k, v))
        return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q_BLHK, k_BSGK, v_BSGK, segments_BL)
    heads = P(mesh.BATCH, None, "tensor", None)
    over_mesh = functools.partial(
        jax.shard_map, in_specs=(heads, heads, heads, P(mesh.BATCH, None)), out_specs=heads, check_vma=False
    )
    return over_mesh(local)(q_BLHK, k_BSGK, v_BSGK, segments_BL)
