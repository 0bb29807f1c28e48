"""Attention through one function, `attend`, which picks the best kernel for the backend.

TPU: the Pallas splash-attention kernel. GPU: cuDNN's flash attention, through `jax.nn`. CPU: blocks of
queries. Elsewhere, and where a kernel does not take the shape or dtype: plain XLA. All give equal values
within rounding.

Legend: B batch, L queries, S keys or slots of a cache, H heads, G key/value heads, R = H / G, K head dim, P
pages of a cache, T pages of a row.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from bigmodel import mesh
from bigmodel.models.attention_blocks import attend_blocks

SPLASH_BLOCK = 512  # rows of a kernel block; the fastest of 256, 512, 1024 in MaxText's published settings


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segments_BL: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    block: int = 0,
    key_segments_BS: jax.Array | None = None,
    bias_HLS: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(K) + bias) v -> [B, L, H, K]; grouped queries when G < H (Ainslie et al. 2023).

    Args:
        segments_BL: int; a query sees only keys of its own segment. None: all.
        causal: a query sees only keys at its own position or before.
        window: causal, and no further back than so many keys, its own among them; 0: all the way.
        block: rows of the TPU kernel's blocks; 0: SPLASH_BLOCK. Large ones want more VMEM.
        key_segments_BS: the keys' segments, where they are not the queries' own; plain XLA computes it.
        bias_HLS: float32, added to the scores; plain XLA computes it.
        scale: in place of 1 / sqrt(K).
    """
    q_BLHK = scaled(q_BLHK, scale)
    if key_segments_BS is not None or bias_HLS is not None:
        mask = visible(segments_BL, q_BLHK.shape[1], k_BSGK.shape[1], causal, key_segments_BS, window)
        return attend_xla(q_BLHK, k_BSGK, v_BSGK, mask, bias_HLS)
    kernel = pick(q_BLHK.shape[1], q_BLHK.shape[-1], q_BLHK.dtype, mesh.platform())
    if kernel == "splash":
        with jax.named_scope("sees_past" if causal else "sees_all"):  # plan/costs.py looks for it
            return attend_splash(q_BLHK, k_BSGK, v_BSGK, segments_BL, causal, block=block, window=window)
    if kernel == "cudnn":
        mask = visible(segments_BL, q_BLHK.shape[1], k_BSGK.shape[1], causal=False)
        return jax.nn.dot_product_attention(
            q_BLHK, k_BSGK, v_BSGK, mask=mask, is_causal=causal, implementation="cudnn",
            local_window_size=(window - 1, 0) if window else None,
        )  # fmt: skip
    if kernel == "blocks":
        return attend_blocks(q_BLHK, k_BSGK, v_BSGK, segments_BL, causal, window)
    keys = k_BSGK.shape[1]
    mask = visible(segments_BL, q_BLHK.shape[1], keys, causal, window=window)
    with jax.named_scope(f"sees_{min(window or keys, keys)}_of_{keys}"):  # plan/flops.py counts so many
        return attend_xla(q_BLHK, k_BSGK, v_BSGK, mask)


SEES = re.compile(r"sees_(\d+)_of_(\d+)")


class Attended(NamedTuple):
    """Inputs of attention: queries by which the scores are q k / sqrt(K), keys, values."""

    q_BLHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    mask: jax.Array | None = None  # as `visible` makes it
    bias_HLS: jax.Array | None = None


def scaled(q_BLHK: jax.Array, scale: float | None) -> jax.Array:
    """Queries whose scores are q k / sqrt(K), for those whose scores are `scale` times q k."""
    if scale is None:
        return q_BLHK
    return q_BLHK * jnp.asarray(scale * q_BLHK.shape[-1] ** 0.5, q_BLHK.dtype)


def log_maps(
    q_BLHK: jax.Array, k_BSGK: jax.Array, mask: jax.Array | None, bias_HLS: jax.Array | None = None
) -> jax.Array:
    """The log of the weights that a query gives to the keys -> float32 [B, H, L, S]; as `attend_xla`."""
    scores = _scores_by_head(q_BLHK, k_BSGK.swapaxes(1, 2), mask, bias_HLS)
    b, groups, ratio, *each = scores.shape
    return jax.nn.log_softmax(scores, axis=-1).reshape(b, groups * ratio, *each)


def attend_cached(
    q_BLHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    at_BL: jax.Array,
    *,
    window: int = 0,
    bias: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Queries at positions `at` over a cache that already holds their own keys -> [B, L, H, K].

    Slot s of a row holds the key at the last position that is s modulo S, up to the row's largest query; a
    query sees what is there at its own position or before, no further back than `window` (0: all).

    Args:
        at_BL: int32; -1: no query, whose answer means nothing.
        bias: (query positions [B, L], key positions [B, S]) -> float32 [B, H, L, S], added to the scores.
    """
    slots = k_BGSK.shape[2]
    last_B1 = at_BL.max(1, keepdims=True)
    at_BS = last_B1 - (last_B1 - jnp.arange(slots, dtype=jnp.int32)) % slots
    mask_BLS = (at_BS[:, None] <= at_BL[..., None]) & (at_BS >= 0)[:, None]
    if window:
        mask_BLS &= at_BS[:, None] > at_BL[..., None] - window
    if scale is not None:
        q_BLHK = q_BLHK * jnp.asarray(scale * q_BLHK.shape[-1] ** 0.5, q_BLHK.dtype)
    bias_BHLS = None if bias is None else bias(at_BL, at_BS)
    return _attend_by_head(q_BLHK, k_BGSK, v_BGSK, mask_BLS[:, None], bias_BHLS)


class Owners(NamedTuple):
    """The first P pages of a paged cache: the row that owns each, and the position of its first slot."""

    row_P: jax.Array  # int32; anything where the page is free
    first_P: jax.Array  # int32; beyond every position where it is


def attend_paged(
    q_B1HK: jax.Array,
    k_PGSK: jax.Array,
    v_PGSK: jax.Array,
    at_B1: jax.Array,
    pages_BT: jax.Array,
    owners: Owners,
    *,
    window: int = 0,
    scale: float | None = None,
) -> jax.Array:
    """`attend_cached` of one query a row over pages, none of which is copied -> [B, 1, H, K].

    Each page answers its owner's query, and a row weighs its pages' answers (Milakov and Gimelshein 2018,
    section 3.1), in their order, so that it does not matter which pages it has.
    """
    (b, _, heads, dim), (groups, slots) = q_B1HK.shape, k_PGSK.shape[1:3]
    row_P, first_P = owners
    k_PGSK, v_PGSK = k_PGSK[: len(row_P)], v_PGSK[: len(row_P)]
    q_BGRK = q_B1HK.reshape(b, groups, heads // groups, dim)
    scores = jnp.einsum("PGRK,PGSK->PGRS", q_BGRK[row_P], k_PGSK, preferred_element_type=jnp.float32)
    scores = scores * (dim**-0.5 if scale is None else scale)
    away_PS = at_B1[row_P] - first_P[:, None] - jnp.arange(slots, dtype=jnp.int32)
    mask_PS = (away_PS >= 0) & (away_PS < window) if window else away_PS >= 0
    least = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask_PS[:, None, None], scores, least)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    y_PGRK = jnp.einsum("PGRS,PGSK->PGRK", weights.astype(v_PGSK.dtype), v_PGSK)
    top, total, y = (
        x.at[pages_BT].get(mode="fill", fill_value=fill)  # [B, T, G, R, 1 or K]
        for x, fill in ((top, least), (weights.sum(-1, keepdims=True), 1.0), (y_PGRK, 0.0))
    )
    share = jnp.exp(top - top.max(1, keepdims=True))
    y_BGRK = (share * y.astype(jnp.float32)).sum(1) / (share * total).sum(1)
    return y_BGRK.astype(q_B1HK.dtype).reshape(q_B1HK.shape)


def pick(length: int, head_dim: int, dtype: jnp.dtype, platform: str) -> str:
    """`splash`, `cudnn`, `blocks` or `xla`: the fastest kernel that takes these shapes on this platform."""
    if platform == "tpu" and length % 128 == 0 and head_dim % 64 == 0:
        return "splash"
    if platform == "gpu" and dtype != jnp.float32 and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "blocks" if platform == "cpu" else "xla"


def visible(
    segments_BL: jax.Array | None,
    queries: int,
    keys: int,
    causal: bool,
    key_segments_BS: jax.Array | None = None,
    window: int = 0,
) -> jax.Array | None:
    """bool [B or 1, 1, L, S]: which keys a query may see; None when it may see all."""
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None, None]
        if window:
            mask = mask & ~jnp.tril(mask, keys - queries - window)
    if segments_BL is not None:
        key_segments_BS = segments_BL if key_segments_BS is None else key_segments_BS
        same = (segments_BL[:, :, None] == key_segments_BS[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def attend_xla(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array | None,
    bias_HLS: jax.Array | None = None,
) -> jax.Array:
    """The plain form, softmax in float32; `mask` as `visible` makes it."""
    # Heads before positions: XLA on a CPU multiplies contiguous matrices a third faster.
    return _attend_by_head(q_BLHK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), mask, bias_HLS)


def _attend_by_head(
    q_BLHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    mask: jax.Array | None,
    bias_HLS: jax.Array | None = None,
) -> jax.Array:
    """`attend_xla` of keys and values that have their heads before their positions; the bias may have a B."""
    scores = _scores_by_head(q_BLHK, k_BGSK, mask, bias_HLS)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    y_BGRLK = jnp.einsum("BGRLS,BGSK->BGRLK", weights, v_BGSK)
    return y_BGRLK.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


def _scores_by_head(
    q_BLHK: jax.Array, k_BGSK: jax.Array, mask: jax.Array | None, bias_HLS: jax.Array | None
) -> jax.Array:
    """Masked scores -> float32 [B, G, R, L, S]."""
    b, length, heads, dim = q_BLHK.shape
    groups = k_BGSK.shape[1]
    q_BGRLK = q_BLHK.reshape(b, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", q_BGRLK, k_BGSK, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    if bias_HLS is not None:
        lead, of_one = bias_HLS.shape[:-3], bias_HLS.shape[-2:]
        scores = scores + bias_HLS.reshape(*lead, groups, heads // groups, *of_one)
    if mask is None:
        return scores
    return jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)


def attend_splash(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    causal: bool,
    *,
    block: int = 0,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas TPU kernel, on each device's own examples and heads; `interpret` runs it on any backend."""
    length, dim = q_BLHK.shape[1], q_BLHK.shape[-1]
    keys = k_BSGK.shape[1]
    if segments_BL is None:
        segments_BL = jnp.ones((q_BLHK.shape[0], length), jnp.int32)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        head_mask: Any = splash_mask.FullMask((length, keys))
        if causal:
            head_mask = splash_mask.CausalMask((length, keys))
        if window:
            head_mask = splash_mask.LocalMask((length, keys), (window - 1, 0), 0)
        rows = next(b for b in (block or SPLASH_BLOCK, 512, 256, 128) if length % b == 0 and keys % b == 0)
        sizes = splash_kernel.BlockSizes(
            block_q=rows, block_kv=rows, block_kv_compute=rows, block_q_dkv=rows, block_kv_dkv=rows,
            block_kv_dkv_compute=rows, block_q_dq=rows, block_kv_dq=rows,
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
    heads, ids = mesh.spec("batch", "sequence", "heads", None), mesh.spec("batch", "sequence")
    over_mesh = functools.partial(
        jax.shard_map, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False
    )
    return over_mesh(local)(q_BLHK, k_BSGK, v_BSGK, segments_BL)
