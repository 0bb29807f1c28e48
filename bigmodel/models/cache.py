"""Keys and values of what a Transformer has read, so that a new token is all that decoding computes.

A cache is a dict of arrays for each layer. `k` and `v` are rows of slots: row b is sequence b's, and the
token at position p lies in slot p modulo the number of slots (a sliding window needs no more slots than it is
wide). In a paged cache the rows are pages, and `pages` [B, T] says which ones hold a sequence, in order (Kwon
et al. 2023). In int8, every key and value has a scale of its own.

Legend: B batch, L new tokens, R rows, T pages of a sequence, S slots, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import mesh
from bigmodel.config.families import Family, Transformer

Cache = dict[str, Any]
NAMES = ("k", "v")


def spec(c: Family, rows: int, slots: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of an empty cache, with a leading [layers]. `dtype`: the compute dtype's, or int8."""
    assert isinstance(c, Transformer)
    shape = (c.cached_layers, rows, c.kv_heads, slots, c.head_dim)
    out = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name in NAMES}
    if dtype == "int8":
        out |= {f"{name}_scale": jax.ShapeDtypeStruct(shape[:-1], jnp.float32) for name in NAMES}
    return out


def write(
    cache: Cache, k_BLGK: jax.Array, v_BLGK: jax.Array, at_BL: jax.Array, real_BL: jax.Array,
    pages_BT: jax.Array | None,
) -> Cache:  # fmt: skip
    """One layer's cache with new keys and values at positions `at`; what is not real is not written.

    Of more tokens than there are slots, the last ones are kept.
    """
    slots = cache["k"].shape[2]
    if pages_BT is None:
        real_BL = real_BL & (at_BL > jnp.where(real_BL, at_BL, -1).max(1, keepdims=True) - slots)
        row_BL = jnp.broadcast_to(jnp.arange(at_BL.shape[0], dtype=jnp.int32)[:, None], at_BL.shape)
    else:
        row_BL = jnp.take_along_axis(pages_BT, jnp.maximum(at_BL, 0) // slots, 1, mode="clip")
    row_BL = jnp.where(real_BL, row_BL, cache["k"].shape[0])  # beyond the last row: dropped
    slot_BL = jnp.maximum(at_BL, 0) % slots
    one = at_BL.shape[1] == 1 and pages_BT is None and mesh.platform() == "tpu"
    here_BS = (jnp.arange(slots, dtype=jnp.int32) == slot_BL[:, :1]) & real_BL[:, :1]
    out = dict(cache)
    for name, new_BLGK in (("k", k_BLGK), ("v", v_BLGK)):
        if f"{name}_scale" in cache:
            new_BLGK, scale_BLG = quantize(new_BLGK)
            out[f"{name}_scale"] = cache[f"{name}_scale"].at[row_BL, :, slot_BL].set(scale_BLG, mode="drop")
        new_BLGK = new_BLGK.astype(cache[name].dtype)
        if one:  # a TPU scatters row after row, for a small part of its bandwidth
            rows = jnp.where(here_BS[:, None, :, None], new_BLGK.swapaxes(1, 2), cache[name])
        else:
            rows = cache[name].at[row_BL, :, slot_BL].set(new_BLGK, mode="drop")
        out[name] = rows if pages_BT is not None else mesh.shard(rows, "batch", "heads", None, None)
    return out


def read(cache: Cache, dtype: Any, pages_BT: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """-> one layer's keys and values [B, G, S, K] (S: T times a page's slots)."""
    out = []
    for name in NAMES:
        x_RGSK = cache[name]
        if pages_BT is not None:
            x_RGSK = _gathered(x_RGSK, pages_BT)
        x_RGSK = x_RGSK.astype(dtype)
        if f"{name}_scale" in cache:
            scale = cache[f"{name}_scale"]
            scale = scale if pages_BT is None else _gathered(scale, pages_BT)
            x_RGSK = x_RGSK * scale[..., None].astype(dtype)
        out.append(x_RGSK)
    return out[0], out[1]


def _gathered(x: jax.Array, pages_BT: jax.Array) -> jax.Array:
    """[R, G, S, ...] -> [B, G, T * S, ...]."""
    b, t = pages_BT.shape
    x = x.at[pages_BT].get(mode="clip").swapaxes(1, 2)
    return x.reshape(b, x.shape[1], t * x.shape[3], *x.shape[4:])


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., K] -> (int8 [..., K], scale float32 [...]), symmetric: x is about int8 * scale."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(-1), 1e-12) / 127
    return jnp.round(wide / scale[..., None]).astype(jnp.int8), scale


def keep_memory(cache: Cache, k_BSGK: jax.Array, v_BSGK: jax.Array) -> Cache:
    """One layer's cache with the memory's keys and values, which cross-attention reads at every step."""
    return {**cache, "memory_k": k_BSGK, "memory_v": v_BSGK}


def memory(cache: Cache) -> tuple[jax.Array, jax.Array]:
    """-> what `keep_memory` kept, [B, S, G, K]."""
    return cache["memory_k"], cache["memory_v"]
