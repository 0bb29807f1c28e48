"""Matrix products whose gradients and layouts over a mesh are stated.

XLA's CPU backend multiplies 2-D operands at the machine's peak, but contracts several axes at once far
slower. And its partitioner computes other functions where layouts are left to it (see `bigmodel/mesh.py`). So
each product here has its own backward pass, and pins its operands and results, forward and backward.

Legend: B batch, E experts, C places of an expert, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigmodel import mesh

Layout = mesh.Layout | None  # the mesh axes over which a weight is stored; None: on one device


def dense(
    x: Array, w: Array, layout: Layout = None, inputs: Sequence[int] = (), outputs: Sequence[int] = ()
) -> Array:
    """x [..., I] @ w [I, O] -> [..., O]; both operands share one dtype, which the gradients keep.

    With a `layout`, the operands of each product are gathered and its result is scattered, as in FSDP (Zhao
    et al. 2023) and in tensor parallelism with a sharded stream (Korthikanti et al. 2022, section 4.2.2). The
    weight is gathered over fsdp, forward and backward. x lies over tensor where the weight's inputs do, and
    is whole where its outputs do. The output and x's gradient lie over tensor, the weight's as it is stored.

    Args:
        inputs, outputs: what I and O are the product of, such as (heads, head_dim); x then ends in `inputs`,
            the result in `outputs`, and their first dimension lies over tensor. Left out: I and O themselves.
    """
    inputs, outputs = tuple(inputs or w.shape[:1]), tuple(outputs or w.shape[1:])
    if layout is not None:
        return _dense_over_mesh(layout, inputs, outputs, x, w)
    y = _dense(x.reshape(*x.shape[: x.ndim - len(inputs)], -1), w)
    return y.reshape(*y.shape[:-1], *outputs)


@jax.custom_vjp
def _dense(x: Array, w: Array) -> Array:
    return _dense_fwd(x, w)[0]


def _outer(x: Array, g: Array) -> Array:
    """x [..., I], g [..., O] -> [I, O], summed over every leading axis."""
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, g, ((lead, lead), ((), ())))


def outer_flat(x: Array, g: Array) -> Array:
    """`_outer` with one contracted axis: twice as fast a training step on a CPU."""
    return _outer(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))


def _outer_turned(x: Array, g: Array) -> Array:
    """`outer_flat` by way of its transpose where a CPU is faster so: many rows into a tall result."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if not g.shape[1] < x.shape[1] <= x.shape[0]:
        return _outer(x, g)
    return lax.optimization_barrier(_outer(g, x)).T  # without the barrier XLA turns it back


def _dense_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    # The bare product, not `dense` again: `remat=dots` saves what it recognizes as one.
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))), (x, w)


def _dense_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    dx = lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))
    return dx, (_outer_turned if mesh.platform() == "cpu" else _outer)(x, g)


_dense.defvjp(_dense_fwd, _dense_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense_over_mesh(
    layout: mesh.Layout, inputs: tuple[int, ...], outputs: tuple[int, ...], x: Array, w: Array
) -> Array:
    return _dense_over_mesh_fwd(layout, inputs, outputs, x, w)[0]


def _last(x: Array, sizes: tuple[int, ...], axis: mesh.Axes) -> Array:
    """x [B, ..., *sizes], examples over the batch axes, the first of `sizes` over `axis`."""
    return mesh.shard(x, *_axes_of(x.ndim, sizes, axis))


def _axes_of(ndim: int, sizes: tuple[int, ...], axis: mesh.Axes) -> tuple[mesh.Dimension, ...]:
    return ("batch", *(None,) * (ndim - 1 - len(sizes)), axis, *(None,) * (len(sizes) - 1))


def _gathered(
    layout: mesh.Layout, inputs: tuple[int, ...], outputs: tuple[int, ...], x: Array, w: Array
) -> tuple[Array, Array]:
    i, o = mesh.used(layout)
    axes = (i, *(None,) * (len(inputs) - 1), o, *(None,) * (len(outputs) - 1))
    return _last(x, inputs, i), mesh.shard(w.reshape(*inputs, *outputs), *axes)


def _dense_over_mesh_fwd(
    layout: mesh.Layout, inputs: tuple[int, ...], outputs: tuple[int, ...], x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    # Saved as they came: a gathered weight would stay for every layer until the backward pass.
    x_used, w_used = _gathered(layout, inputs, outputs, x, w)
    n = len(inputs)
    y = lax.dot_general(x_used, w_used, ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())))
    return _last(y, outputs, mesh.result(layout)), (x, w)


def _dense_over_mesh_bwd(
    layout: mesh.Layout,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    residuals: tuple[Array, Array],
    g: Array,
) -> tuple[Array, Array]:
    x, w = _gathered(layout, inputs, outputs, *residuals)
    g = _last(g, outputs, mesh.used(layout)[1])
    n, rows = len(inputs), x.ndim - len(inputs)
    dx = lax.dot_general(g, w, ((tuple(range(rows, g.ndim)), tuple(range(n, w.ndim))), ((), ())))
    if mesh.platform() == "cpu":
        dw = _outer_turned(x.reshape(*x.shape[:rows], -1), g.reshape(*g.shape[:rows], -1))
    else:
        every = tuple(range(rows))
        dw = lax.dot_general(x, g, ((every, every), ((), ()))).reshape(residuals[1].shape)
    return _last(dx, inputs, mesh.result(layout)), mesh.shard(dw, *layout)


_dense_over_mesh.defvjp(_dense_over_mesh_fwd, _dense_over_mesh_bwd)


def dense_of_experts(x: Array, w: Array, layout: Layout = None) -> Array:
    """x [B, E, C, I], w [E, I, O] -> [B, E, C, O]: `dense` of each expert, on the devices that have it."""
    return _dense_of_experts(layout, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_of_experts(layout: Layout, x: Array, w: Array) -> Array:
    return _dense_of_experts_fwd(layout, x, w)[0]


def _by_expert(layout: Layout, x: Array, inner: mesh.Axes) -> Array:
    if layout is None:
        return x
    return mesh.shard(x, "group", "experts", None, inner)


def _dense_of_experts_fwd(layout: Layout, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    _, inner, outer = ((),) * 3 if layout is None else mesh.used_by_experts(layout)
    w_used = w if layout is None else mesh.shard(w, *mesh.used_by_experts(layout))
    y = lax.dot_general(_by_expert(layout, x, inner), w_used, (((3,), (1,)), ((1,), (0,))))
    return _by_expert(layout, jnp.moveaxis(y, 0, 1), outer or inner), (x, w)


def _dense_of_experts_bwd(layout: Layout, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    _, inner, outer = ((),) * 3 if layout is None else mesh.used_by_experts(layout)
    x, g = _by_expert(layout, x, inner), _by_expert(layout, g, outer)
    w = w if layout is None else mesh.shard(w, *mesh.used_by_experts(layout))
    dx = jnp.moveaxis(lax.dot_general(g, w, (((3,), (2,)), ((1,), (0,)))), 0, 1)
    dw = lax.dot_general(x, g, (((0, 2), (0, 2)), ((1,), (1,))))
    return _by_expert(layout, dx, inner or outer), dw if layout is None else mesh.shard(dw, *layout)


_dense_of_experts.defvjp(_dense_of_experts_fwd, _dense_of_experts_bwd)


def dense_exact(x: Array, w: Array, layout: Layout) -> Array:
    """x [..., I] @ w [I, O] -> [..., O] of int8 codes, summed in int32, or of float8 codes, in float32."""
    exact = jnp.int32 if w.dtype == jnp.int8 else jnp.float32
    if layout is not None:
        x, w = _gathered(layout, w.shape[:1], w.shape[1:], x, w)
    y = lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=exact)
    return y if layout is None else _last(y, w.shape[1:], mesh.result(layout))
