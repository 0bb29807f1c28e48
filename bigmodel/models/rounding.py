"""Codes of quantized numbers: rounded, packed two to a byte (int4), and the groups that share a scale.

Legend: I inputs, O outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# By kind: the largest code (they are symmetric, so zero stays zero), and the dtype that is stored.
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
STORED = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}


def round_to(x: jax.Array, kind: str) -> jax.Array:
    """Numbers in units of the scale -> codes, one each (int4: as int8)."""
    x = jnp.clip(x, -LARGEST[kind], LARGEST[kind])
    return x.astype(STORED["fp8"]) if kind == "fp8" else jnp.round(x).astype(jnp.int8)


def pack(codes: jax.Array) -> jax.Array:
    """int8 codes in -8..7 [..., O] -> uint8 [..., O / 2 up], the even ones in the low halves."""
    odd = codes.shape[-1] % 2
    if odd:
        codes = jnp.concatenate([codes, jnp.zeros((*codes.shape[:-1], 1), codes.dtype)], -1)
    pairs = jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    low = pairs[..., 0] & jnp.uint8(15)
    return low | (pairs[..., 1] << jnp.uint8(4))


def unpack(packed: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack`: uint8 [..., O / 2 up] -> int8 [..., O]."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    low = (signed << jnp.int8(4)) >> jnp.int8(4)
    both = jnp.stack([low, signed >> jnp.int8(4)], -1)
    return both.reshape(*packed.shape[:-1], -1)[..., :size]


def spans(w: jax.Array, sums: Sequence[int], group: int) -> jax.Array:
    """w with its last summed axis [I] cut into [G, I / G]."""
    axis = w.ndim + max(sums)
    size = w.shape[axis]
    group = min(group or size, size)
    return w.reshape(*w.shape[:axis], size // group, group, *w.shape[axis + 1 :])


def reduced(ndim: int, sums: Sequence[int]) -> tuple[int, ...]:
    """The axes of what `spans` gave over which a scale is shared."""
    last = ndim + max(sums)
    return (*(axis for axis in (ndim + s for s in sums) if axis != last), last + 1)


def scale_shape(x: jax.Array, ndim: int, sums: Sequence[int]) -> jax.Array:
    """A result of a reduction over `reduced` -> ndim axes again, of size 1 where they were summed."""
    last = ndim + max(sums)
    return jnp.expand_dims(x, tuple(axis for axis in (ndim + s for s in sums) if axis != last))


def spread(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A scale of `quantize` -> one that multiplies codes of `shape`, its groups repeated."""
    for axis, size in enumerate(shape):
        if scale.shape[axis] not in (1, size):
            scale = jnp.repeat(scale, size // scale.shape[axis], axis, total_repeat_length=size)
    return scale
