"""Layers that every family shares. Parameters are kept in `param_dtype`; a layer computes in its input's.

Legend: B batch, L length, D width, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel import mesh
from bigmodel.models import ops, weights

Sums = dict[str, tuple[int, ...]]  # of a layer's weights: the axes, from the end, that its product sums over


class Dense(nnx.Module):
    """x [..., I] -> x @ kernel [I, O] (+ bias [O]); `inputs` and `outputs` as in `products.dense`."""

    SUMS: ClassVar[Sums] = {"kernel": (-2,)}

    def __init__(self, i: int, o: int, *, std: float, dtype: str, rngs: nnx.Rngs, bias: bool = True):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (i, o), dtype))
        self.bias = nnx.Param(jnp.zeros((o,), dtype)) if bias else None

    def __call__(self, x: jax.Array, inputs: Sequence[int] = (), outputs: Sequence[int] = ()) -> jax.Array:
        y = weights.product(x, self.kernel[...], inputs, outputs)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + (bias.reshape(outputs) if outputs else bias)


class Embed(nnx.Module):
    """ids [B, L] -> rows of table [V, D]; `attend` uses the same table as an output layer."""

    SUMS: ClassVar[Sums] = {"table": (-1,)}

    def __init__(self, v: int, d: int, *, dtype: str, rngs: nnx.Rngs, std: float = 0.02):
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (v, d), dtype))

    def __call__(self, ids_BL: jax.Array, dtype: str) -> jax.Array:
        return mesh.shard(weights.rows(self.table[...], ids_BL, dtype), "batch", "sequence", None)

    def attend(self, x_BLD: jax.Array) -> jax.Array:
        return weights.attend(x_BLD, self.table[...])


class LayerNorm(nnx.Module):
    """Ba et al. 2016; statistics in float32."""

    def __init__(self, d: int, *, eps: float, dtype: str, bias: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((d,), dtype))
        self.bias = nnx.Param(jnp.zeros((d,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.normalize(x, self.scale[...], True, self.eps)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019; statistics in float32."""

    def __init__(self, d: int, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((d,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.normalize(x, self.scale[...], False, self.eps)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Srivastava et al. 2014, scaled at training time; without a key (evaluation) it does nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def read(x_BLD: jax.Array, segments_BL: jax.Array, where: str) -> jax.Array:
    """The vector of a text, [B, D]: its `first` or its `last` token's, or the `mean` of all."""
    real_BL = segments_BL > 0
    if where == "mean":
        weight_BL1 = real_BL[..., None].astype(jnp.float32)
        mean_BD = (x_BLD.astype(jnp.float32) * weight_BL1).sum(1) / weight_BL1.sum(1).clip(1)
        return mean_BD.astype(x_BLD.dtype)
    last_B = jnp.maximum(real_BL.sum(1) - 1, 0)
    at_B = last_B if where == "last" else jnp.zeros_like(last_B)
    return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)[:, 0]


def rope(x_BLHK: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, eq. 34), halves rotated as in Llama; angles in float32."""
    half = x_BLHK.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BL.astype(jnp.float32)[..., None, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


def shard_stream(x_BLD: jax.Array) -> jax.Array:
    """Pins the residual stream: examples over the batch axes, width over the tensor axis, so that what is
    saved between layers is cut by the whole mesh (as MaxText does); a layer's products gather it again."""
    return mesh.shard(x_BLD, "batch", "sequence", "width")


class Conv(nnx.Module):
    """x [B, H, W, I] -> [B, H', W', O]: a convolution of `size` (one number, or height and width)."""

    SUMS: ClassVar[Sums] = {"kernel": (-4, -3, -2)}

    def __init__(
        self,
        i: int,
        o: int,
        size: int | tuple[int, int],
        *,
        dtype: str,
        rngs: nnx.Rngs,
        bias: bool = True,
        stride: int = 1,
        padding: ops.Padding = "SAME",
    ):
        height, width = (size, size) if isinstance(size, int) else size
        std = (2 / (i * height * width)) ** 0.5  # He et al. 2015, eq. 10
        self.strides, self.padding = (stride, stride), padding
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (height, width, i, o), dtype))
        self.bias = nnx.Param(jnp.zeros((o,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = weights.conv(x, self.kernel[...], self.strides, self.padding)
        y = mesh.shard(y, "batch", None, None, None)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """Ioffe and Szegedy 2015 over all but the last axis; statistics in float32, running ones in `rest`.

    Under `jax.jit` the mean is over the batch of the whole mesh. Each microbatch has its own statistics, as
    any hardware that sees one piece has; each moves the running ones by 1 - `momentum`.
    """

    def __init__(self, d: int, *, dtype: str, momentum: float = 0.9, eps: float = 1e-5, scale: float = 1.0):
        self.momentum, self.eps = momentum, eps
        self.scale = nnx.Param(jnp.full((d,), scale, dtype))
        self.bias = nnx.Param(jnp.zeros((d,), dtype))
        self.mean = nnx.BatchStat(jnp.zeros((d,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((d,), jnp.float32))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        scale, bias = self.scale[...], self.bias[...]
        if not train:
            inverse = jax.lax.rsqrt(self.var[...] + self.eps) * scale.astype(jnp.float32)
            shift = bias.astype(jnp.float32) - self.mean[...] * inverse
            return (x.astype(jnp.float32) * inverse + shift).astype(x.dtype)
        y, mean, var = ops.batch_norm(x, scale, bias, self.eps)
        count = x.size // x.shape[-1]
        for stat, new in ((self.mean, mean), (self.var, var * (count / max(count - 1, 1)))):
            stat[...] = self.momentum * stat[...] + (1 - self.momentum) * jax.lax.stop_gradient(new)
        return y
