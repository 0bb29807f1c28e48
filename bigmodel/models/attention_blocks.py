"""Attention on a CPU: blocks of queries, each multiplied only with the keys it can reach.

Legend: B batch, L queries, S keys, H heads, G key/value heads, R = H / G, K head dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # queries in a block on a CPU; the fastest of 32, 64, 128 and 256 in a whole step


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_BL: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    *,
    block: int = 0,
) -> jax.Array:
    """The form for CPUs: blocks of queries, each multiplied only with the keys it can reach.

    The backward pass of several blocks computes the weights again, so nothing of size L x S outlives a block;
    that of one block finds them saved.

    Args:
        segments_BL, window: as in `attend`.
        block: queries in a block; 0: 64, or a sixteenth of a long L (the blocks are unrolled).
    """
    reach = Reach(causal, window, block or max(BLOCK, q.shape[1] // 16))
    return _attend(reach, q, k, v, segments_BL)


def _matmul(
    a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Contract one of the last two axes of a and b [B, G, _, _], batched over the first two."""
    axes = (((2 + contract[0],), (2 + contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    """[B, L, H, K] -> [B, G, L, H / G, K]: the heads that share a key head become rows of its matrix."""
    b, n, h, d = x.shape
    return x.reshape(b, n, groups, h // groups, d).transpose(0, 2, 1, 3, 4)


def _by_token(x: jax.Array) -> jax.Array:
    """[B, G, L, H / G, K] -> [B, L, H, K]."""
    b, g, n, r, d = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(b, n, g * r, d)


def _rows(x: jax.Array, span: slice) -> jax.Array:
    """Rows `span` of x [B, G, L, H / G, *] -> [B, G, span * H / G, *]."""
    x = x[:, :, span]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


class Reach(NamedTuple):
    """The keys that a query sees, and the number of queries in a block."""

    causal: bool
    window: int
    block: int


def _spans(reach: Reach, q: jax.Array, k: jax.Array) -> list[tuple[slice, slice]]:
    """The query rows of each block, and the keys it may reach; q [B, G, L, R, K], k [B, G, S, K]."""
    n, s = q.shape[2], k.shape[2]
    ends = [(i, min(i + reach.block, n)) for i in range(0, n, reach.block)]
    first = {i: max(i + s - n - reach.window + 1, 0) if reach.window else 0 for i, _ in ends}
    return [(slice(i, j), slice(first[i], max(1, j + s - n) if reach.causal else s)) for i, j in ends]


def _scores(
    reach: Reach, segments: jax.Array | None, q: jax.Array, k: jax.Array, rows: slice, keys: slice
) -> jax.Array:
    """Masked float32 scores [B, G, rows * R, keys] of one block."""
    s = _matmul(_rows(q, rows), k[:, :, keys], (1, 1), jnp.float32) * q.shape[-1] ** -0.5
    # Compared block by block: a mask of all L x S would be read from memory once for every head.
    visible_BLS = None if segments is None else segments[:, rows, None] == segments[:, None, keys]
    if reach.causal:
        position = jnp.arange(rows.start, rows.stop) + (k.shape[2] - q.shape[2])
        past = position[:, None] >= jnp.arange(keys.start, keys.stop)
        if reach.window:
            past &= position[:, None] - reach.window < jnp.arange(keys.start, keys.stop)
        visible_BLS = past[None] if visible_BLS is None else visible_BLS & past
    if visible_BLS is None:
        return s
    return jnp.where(jnp.repeat(visible_BLS, q.shape[3], 1)[:, None], s, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(reach: Reach, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    return _attend_fwd(reach, q, k, v, segments)[0]


def _attend_fwd(
    reach: Reach, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    qg, kg, vg = _by_group(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out, norms = [], []
    for rows, keys in _spans(reach, qg, kg):
        s = _scores(reach, segments, qg, kg, rows, keys)
        top = s.max(-1, keepdims=True)
        e = jnp.exp(s - top)
        total = e.sum(-1, keepdims=True)
        weights = e / total
        out.append(_matmul(weights.astype(v.dtype), vg[:, :, keys], (1, 0)))
        norms.append(top + jnp.log(total))
    o = _by_token(jnp.concatenate(out, 2).reshape(qg.shape))
    norm = jnp.concatenate(norms, 2).reshape(*qg.shape[:4], 1)
    return o, (q, k, v, segments, o, weights if len(out) == 1 else norm)


def _attend_bwd(
    reach: Reach, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, o, saved = residuals  # saved: one block's weights, or several blocks' norms
    f32, scale = jnp.float32, q.shape[-1] ** -0.5
    inner = _by_group((g.astype(f32) * o.astype(f32)).sum(-1, keepdims=True), k.shape[2])
    qg, gg = _by_group(q, k.shape[2]), _by_group(g, k.shape[2])
    kg, vg = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    dq, dk, dv = [], jnp.zeros_like(kg), jnp.zeros_like(vg)
    spans = _spans(reach, qg, kg)
    for rows, keys in spans:
        if len(spans) == 1:
            p = saved
        else:
            p = jnp.exp(_scores(reach, segments, qg, kg, rows, keys) - _rows(saved, rows))
        dp = _matmul(_rows(gg, rows), vg[:, :, keys], (1, 1), f32)
        ds = (p * (dp - _rows(inner, rows)) * scale).astype(q.dtype)
        dq.append(_matmul(ds, kg[:, :, keys], (1, 0)))
        rest = ((0, 0), (0, 0), (keys.start, k.shape[1] - keys.stop), (0, 0))
        dk += jnp.pad(_matmul(ds, _rows(qg, rows), (0, 0)), rest)
        dv += jnp.pad(_matmul(p.astype(v.dtype), _rows(gg, rows), (0, 0)), rest)
    whole_dq = _by_token(jnp.concatenate(dq, 2).reshape(qg.shape))
    return whole_dq, dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None


_attend.defvjp(_attend_fwd, _attend_bwd)
