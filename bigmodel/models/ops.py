"""Array functions whose gradients are written for speed, chiefly on a CPU; plain jnp and lax everywhere.

XLA's CPU backend multiplies 2-D operands at the machine's peak, but contracts several axes at once,
convolves and scatters a pooling's gradient far slower. Each function here therefore states its own backward
pass, in 2-D matrix products and elementwise arithmetic that fuses, and keeps few residuals: a CPU is bound by
memory.

Legend: B batch, H height, W width, I inputs, O outputs, C channels, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigmodel.models.products import dense, outer_flat

# ------------------------------------------------------------------------------------------------ activations


def _activation(
    value: Callable[[Array], Array], slope: Callable[[Array], Array], doc: str
) -> Callable[[Array], Array]:
    """An elementwise function that saves its input alone; computed in float32."""

    def wide(f: Callable[[Array], Array], x: Array) -> Array:
        return f(x.astype(jnp.float32))

    @jax.custom_vjp
    def activation(x: Array) -> Array:
        return wide(value, x).astype(x.dtype)

    def bwd(x: Array, g: Array) -> tuple[Array]:
        d = wide(slope, x)
        return ((g.astype(d.dtype) * d).astype(x.dtype),)

    activation.defvjp(lambda x: (activation(x), x), bwd)
    activation.__doc__ = doc
    return activation


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))


def _tanh_gate(x: Array) -> Array:
    return lax.logistic(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def _tanh_slope(x: Array) -> Array:
    s = _tanh_gate(x)
    return s + x * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _silu_slope(x: Array) -> Array:
    s = lax.logistic(x)
    return s + x * s * (1 - s)


gelu = _activation(
    lambda x: x * _normal_cdf(x),
    lambda x: _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    "x Phi(x), elementwise over any shape.",
)
gelu_tanh = _activation(
    lambda x: x * _tanh_gate(x), _tanh_slope, "The tanh approximation of `gelu`, elementwise."
)
silu = _activation(lambda x: x * lax.logistic(x), _silu_slope, "x sigmoid(x), elementwise.")


# ----------------------------------------------------------------------------------------------------- images


Padding = str | tuple[tuple[int, int], tuple[int, int]]  # SAME, VALID, or (above, below), (left, right)


def conv(x: Array, w: Array, strides: tuple[int, int], padding: Padding, platform: str) -> Array:
    """x [B, H, W, I] * w [h, w, I, O] -> [B, H', W', O]."""
    if platform != "cpu":
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    pads = (
        padding
        if not isinstance(padding, str)
        else (lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, padding))
    )
    return _im2col(tuple(strides), x if not any(map(sum, pads)) else jnp.pad(x, ((0, 0), *pads, (0, 0))), w)


def _taps(size: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size[0]) for j in range(size[1])]


def _patches(strides: tuple[int, int], x: Array, size: Sequence[int]) -> Array:
    """x [B, H, W, I] -> [B, H', W', h * w * I]."""
    out = [(n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], size, strides, strict=True)]
    parts = [x[:, i : i + out[0] : strides[0], j : j + out[1] : strides[1]] for i, j in _taps(size)]
    return jnp.concatenate(parts, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _im2col(strides: tuple[int, int], x: Array, w: Array) -> Array:
    return dense(_patches(strides, x, w.shape[:2]), w.reshape(-1, w.shape[-1]))


def _im2col_bwd(strides: tuple[int, int], residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    flat = _patches(strides, x, w.shape[:2]).reshape(-1, math.prod(w.shape[:3]))
    dw = outer_flat(flat, g)
    dx = jnp.zeros_like(x)
    for i, j in _taps(w.shape[:2]):
        tap = lax.dot_general(g, w[i, j], (((3,), (1,)), ((), ())))
        spans = [(n - 1) * s + 1 for n, s in zip(g.shape[1:3], strides, strict=True)]
        edges = [
            (k, n - k - m, s - 1) for k, n, m, s in zip((i, j), x.shape[1:3], spans, strides, strict=True)
        ]
        dx += lax.pad(tap, jnp.zeros((), tap.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    return dx, dw.reshape(w.shape)


_im2col.defvjp(lambda strides, x, w: (_im2col(strides, x, w), (x, w)), _im2col_bwd)


def max_pool(
    x: Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding = "VALID"
) -> Array:
    """x [B, H, W, C] -> [B, H', W', C]; a tie's gradient goes to its first element."""
    if tuple(window) == tuple(strides) and padding == "VALID":
        h, w = (n // k * k for n, k in zip(x.shape[1:3], window, strict=True))
        return _tile_max(tuple(window), x[:, :h, :w])
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), pads)


def avg_pool(x: Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding) -> Array:
    """x [B, H, W, C] -> [B, H', W', C]; what is padded counts as zeros."""
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    total = lax.reduce_window(x, 0.0, lax.add, (1, *window, 1), (1, *strides, 1), pads)
    return total / jnp.asarray(math.prod(window), x.dtype)


def mean_pool(x: Array) -> Array:
    """x [B, H, W, C] -> its mean [B, C], summed in float32."""
    return x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)


def _tile(x: Array, window: tuple[int, int], i: int, j: int) -> Array:
    """Element (i, j) of every window of x [B, H, W, C] -> [B, H', W', C]."""
    return x[:, i :: window[0], j :: window[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tile_max(window: tuple[int, int], x: Array) -> Array:
    return functools.reduce(jnp.maximum, [_tile(x, window, i, j) for i, j in _taps(window)])


def _tile_max_fwd(window: tuple[int, int], x: Array) -> tuple[Array, Array]:
    """Keeps which element is the largest. A backward pass that looked for it by its value would find none
    where XLA computes x anew, inside another fusion, and rounds otherwise."""
    y, *others = (_tile(x, window, i, j) for i, j in _taps(window))
    first = jnp.zeros(y.shape, jnp.int8)
    for index, other in enumerate(others, 1):
        y, first = jnp.maximum(y, other), jnp.where(other > y, jnp.int8(index), first)
    return y, first


def _tile_max_bwd(window: tuple[int, int], first: Array, g: Array) -> tuple[Array]:
    taps = [jnp.where(first == index, g, jnp.zeros_like(g)) for index in range(math.prod(window))]
    rows = [jnp.stack(taps[i : i + window[1]], 3) for i in range(0, len(taps), window[1])]
    b, h, w, c = g.shape
    return (jnp.stack(rows, 2).reshape(b, h * window[0], w * window[1], c),)


_tile_max.defvjp(_tile_max_fwd, _tile_max_bwd)


# ---------------------------------------------------------------------------------------------- normalization


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize(x: Array, scale: Array, center: bool, epsilon: float) -> Array:
    """LayerNorm (`center`) or RMSNorm of x [..., K], in float32, times scale [K] -> [..., K]."""
    return _normalize_fwd(x, scale, center, epsilon)[0]


def _mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def _normalize_fwd(
    x: Array, scale: Array, center: bool, epsilon: float
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    wide = x.astype(jnp.float32)
    mean = _mean(wide) if center else None
    centered = wide if mean is None else wide - mean
    inverse = lax.rsqrt(_mean(jnp.square(centered)) + epsilon)
    y = (centered * inverse * scale.astype(jnp.float32)).astype(x.dtype)
    return y, (x, scale, mean, inverse)


def _normalize_bwd(
    center: bool, epsilon: float, residuals: tuple[Array, Array, Array | None, Array], g: Array
) -> tuple[Array, Array]:
    x, scale, mean, inverse = residuals
    wide, g = x.astype(jnp.float32), g.astype(jnp.float32)
    unit = (wide if mean is None else wide - mean) * inverse
    slope = g * scale.astype(jnp.float32)
    dx = slope - unit * _mean(slope * unit)
    dx = inverse * (dx - _mean(slope) if center else dx)
    dscale = (g * unit).reshape(-1, x.shape[-1]).sum(0)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


normalize.defvjp(_normalize_fwd, _normalize_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """x [..., K] normalized over all but the last axis, times scale [K] plus bias [K], in float32.

    -> (y [..., K], mean [K], variance [K]). No gradient flows through the two statistics given out.
    """
    return _batch_norm_fwd(x, scale, bias, epsilon)[0]


def _batch_norm_fwd(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array, Array]]:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    var = jnp.square(wide - mean).mean(axes)
    inverse = lax.rsqrt(var + epsilon)
    y = (wide - mean) * (inverse * scale.astype(jnp.float32)) + bias.astype(jnp.float32)
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, inverse)


def _batch_norm_bwd(
    epsilon: float, residuals: tuple[Array, Array, Array, Array, Array], gs: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = residuals
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    g = gs[0].astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * inverse
    dbias, dscale = g.sum(axes), (g * unit).sum(axes)
    dx = (inverse * scale.astype(jnp.float32)) * (g - dbias / count - unit * (dscale / count))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
