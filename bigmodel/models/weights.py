"""Weights that are no plain arrays: cut over a mesh, quantized, quantized in training, or observed.

A layer asks for `product(x, w)`, `rows(w, ids)` or `w.astype(dtype)` of its parameter. So a
quantized model is dequantized where it is used, inside the scanned block, and never all at once.

`lay_out` tells each over which mesh axes it is stored, and so how its products are laid out.

int4 is packed by `rounding`, two codes a byte: `jnp.int4` (and with it qwix's QArray, whose way of giving a
scale to a group of inputs this follows) takes a byte for each number, in memory and on disk.

Legend: I inputs, O outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from bigmodel import mesh, trees
from bigmodel.models import ops, products, rounding

SHRINKS = tuple(1 - 0.04 * step for step in range(16))  # of the largest weight: where clipping is tried


Axes = mesh.Layout | None  # where a weight's last dimensions are stored; None: on one device


class Weight(abc.ABC):
    """A weight as layers read it, in place of an array; `w[...]`, as of nnx.Param, is the weight itself."""

    axes: Axes = None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def stored(self, dtype: Any) -> jax.Array:
        """The weight as floats, cut over the mesh as it is stored."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: Any) -> jax.Array:
        """The weight as floats, gathered over fsdp."""
        return self.stored(dtype) if self.axes is None else mesh.gather(self.axes, self.stored(dtype))

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., I] @ this [I, O] -> [..., O]."""
        return products.dense(x, self.stored(x.dtype), self.axes)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] @ this [V, D] transposed -> [..., V]."""
        return products.dense(x, self.stored(x.dtype).T, _turned(self.axes))

    def conv(self, x: jax.Array, strides: tuple[int, int], padding: ops.Padding) -> jax.Array:
        """x [B, H, W, I] * this [h, w, I, O] -> [B, H', W', O]."""
        return conv(x, self.stored(x.dtype), strides, padding)

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows of this [V, D] at `ids` [...] -> [..., D]."""
        return rows(self.stored(dtype), ids, dtype)

    def __getitem__(self, index: Any) -> Self:
        assert index is ...
        return self


@dataclass(frozen=True)
class _OfFloats(Weight):
    """A weight that holds another one as it is."""

    value: Any
    axes: Axes = field(default=None, kw_only=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def stored(self, dtype: Any) -> jax.Array:
        return self.value.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(Weight):
    """codes x scale; `scale` has the codes' rank, and along each axis their size, or G of it, or 1.

    `activation`, if there is one, is the scale of the layer's inputs, which are then quantized too.
    """

    codes: jax.Array
    scale: jax.Array
    activation: jax.Array | None
    kind: str = field(metadata={"static": True})
    size: int = field(metadata={"static": True})  # of the last axis, which int4 halves
    axes: Axes = field(default=None, kw_only=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.size)

    def stored(self, dtype: Any) -> jax.Array:
        codes = self._numbers(jnp.float32)
        return (codes * rounding.spread(self.scale, codes.shape)).astype(dtype)

    def _numbers(self, dtype: Any) -> jax.Array:
        """The codes, each exact in any dtype of floats that a product takes."""
        return (rounding.unpack(self.codes, self.size) if self.kind == "int4" else self.codes).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., I] @ w [I, O]; of int8 or float8 operands where the inputs have a scale."""
        if self.activation is None:
            if self.scale.shape[-2] > 1:
                return super().product(x)
            return _scaled(products.dense(x, self._numbers(x.dtype), self.axes), self.scale[0], x.dtype)
        x_q = rounding.round_to(x.astype(jnp.float32) / self.activation, self.kind)
        y = products.dense_exact(x_q, self.codes, self.axes)
        return _scaled(y, self.activation * self.scale[0], x.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        if self.scale.shape[-1] > 1:
            return super().attend(x)
        return _scaled(
            products.dense(x, self._numbers(x.dtype).T, _turned(self.axes)), self.scale[:, 0], x.dtype
        )

    def conv(self, x: jax.Array, strides: tuple[int, int], padding: ops.Padding) -> jax.Array:
        """Convolution of x, quantized as in `product`."""
        if self.activation is None:
            return super().conv(x, strides, padding)
        x_q = rounding.round_to(x.astype(jnp.float32) / self.activation, self.kind)
        exact = jnp.int32 if self.kind == "int8" else jnp.float32
        y = jax.lax.conv_general_dilated(
            x_q, _kernel(self.codes), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=exact,
        )  # fmt: skip
        return _scaled(y, self.activation * self.scale[0, 0, 0], x.dtype)

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        taken = replace(self, codes=_rows(self.codes)[ids], scale=_rows(self.scale)[ids], axes=None)
        return taken.stored(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InBlocks(Weight):
    """A quantized weight for decoding on a CPU: it becomes floats a block of outputs at a time, in its cache.

    As a whole it would be written to memory as floats and read again, or, since a loop over tokens does not
    change it, be kept there as floats from the loop's start. It lies with its outputs first, which a product
    of one row reads fastest: [O, I], or a layer's [V, D] of a `table`.
    """

    BLOCK: ClassVar[int] = 2**21  # codes; of 2**17 to 2**21 the fastest for 1 and for 8 rows

    turned: Quantized
    table: bool = field(metadata={"static": True})

    @classmethod
    def of(cls, w: Quantized) -> Any:
        """w [..., I, O], or a table [..., V, D], whose rows have each their scales, in this form."""
        if w.activation is not None:
            return w
        if w.scale.shape[-2] == w.codes.shape[-2]:
            return cls(w, True)
        codes = rounding.unpack(w.codes, w.size) if w.kind == "int4" else w.codes
        codes = codes.swapaxes(-1, -2)
        inputs = codes.shape[-1]
        codes = rounding.pack(codes) if w.kind == "int4" else codes
        return cls(replace(w, codes=codes, scale=w.scale.swapaxes(-1, -2), size=inputs), False)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.turned.shape
        return shape if self.table else (*shape[:-2], *shape[:-3:-1])

    def stored(self, dtype: Any) -> jax.Array:
        floats = self.turned.stored(dtype)
        return floats if self.table else floats.swapaxes(-1, -2)

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        return self.turned.rows(ids, dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.product(x)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O], that of a table too."""
        outputs, inputs = self.turned.shape
        size = max(1, min(self.BLOCK // inputs, -(-outputs // 2)))  # a loop of one turn would be no loop

        def block(i: jax.Array, y_NO: jax.Array) -> jax.Array:
            start = jnp.minimum(i * size, outputs - size)  # the last one may do some outputs again
            w_OI = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), self.turned)
            return jax.lax.dynamic_update_slice_in_dim(y_NO, w_OI.attend(x_NI), start, 1)

        x_NI = x.reshape(-1, inputs)
        y_NO = jnp.zeros((len(x_NI), outputs), x.dtype)
        y_NO = jax.lax.fori_loop(0, -(-outputs // size), block, y_NO)
        return y_NO.reshape(*x.shape[:-1], outputs)


def _scaled(y: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    return (y.astype(jnp.float32) * scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sharded(_OfFloats):
    """Floats that are cut over a mesh, and gathered over fsdp in the dtype of whatever uses them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded(_OfFloats):
    """Floats that are rounded to what `quantize` would keep of them, wherever they are used; the gradient
    passes straight through (Bengio et al. 2013; Jacob et al. 2018)."""

    sums: tuple[int, ...] = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    group: int = field(metadata={"static": True})

    def stored(self, dtype: Any) -> jax.Array:
        rounded = quantize(jax.lax.stop_gradient(self.value), self.sums, self.kind, self.group)
        off = rounded.astype(self.value.dtype) - jax.lax.stop_gradient(self.value)
        return (self.value + off).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed(_OfFloats):
    """Floats, and a probe: an array of zeros whose "gradient" is what is learned of the product's inputs.

    A gradient is the one thing that already finds its way out of a scanned, sharded model. The probe is
    `gram` [I, I], for the sum of x x^T over all positions, and `largest` [], for the largest |x|.
    """

    probe: dict[str, jax.Array]

    def product(self, x: jax.Array) -> jax.Array:
        return super().product(_tap(x, self.probe))

    def conv(self, x: jax.Array, strides: tuple[int, int], padding: ops.Padding) -> jax.Array:
        return super().conv(_tap(x, self.probe), strides, padding)


@jax.custom_vjp
def _tap(x: jax.Array, probe: dict[str, jax.Array]) -> jax.Array:
    return x


def _tap_bwd(residuals: tuple[jax.Array, Any], g: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    x, probe = residuals
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    measures = {"gram": lambda: rows.T @ rows, "largest": lambda: jnp.abs(rows).max()}
    return g, {name: measures[name]() for name in probe}


_tap.defvjp(lambda x, probe: (x, (x, probe)), _tap_bwd)


def product(x: jax.Array, w: Any, inputs: Sequence[int] = (), outputs: Sequence[int] = ()) -> jax.Array:
    """x [..., I] @ w [I, O] -> [..., O] in x's dtype; `inputs` and `outputs` as in `products.dense`."""
    if isinstance(w, jax.Array):
        return products.dense(x, w.astype(x.dtype), None, inputs, outputs)
    if isinstance(w, Sharded):
        return products.dense(x, w.stored(x.dtype), w.axes, inputs, outputs)
    y = w.product(x.reshape(*x.shape[: x.ndim - len(inputs)], -1) if inputs else x)
    return y.reshape(*y.shape[:-1], *outputs) if outputs else y


def product_of_experts(x: jax.Array, w: Any) -> jax.Array:
    """x [B, E, C, I], w [E, I, O] -> [B, E, C, O] in x's dtype, each expert's places by its own weight."""
    if isinstance(w, Weight):
        return products.dense_of_experts(x, w.stored(x.dtype), w.axes)
    return products.dense_of_experts(x, w.astype(x.dtype), None)


def attend(x: jax.Array, table: Any) -> jax.Array:
    """x [..., D] @ table [V, D] transposed -> [..., V] in x's dtype."""
    return products.dense(x, table.astype(x.dtype).T) if isinstance(table, jax.Array) else table.attend(x)


def conv(x: jax.Array, w: Any, strides: tuple[int, int], padding: ops.Padding) -> jax.Array:
    """x [B, H, W, I] * w [h, w, I, O] -> [B, H', W', O] in x's dtype."""
    if not isinstance(w, jax.Array):
        return w.conv(x, strides, padding)
    return ops.conv(x, _kernel(w.astype(x.dtype)), strides, padding, mesh.platform())


def _kernel(w: jax.Array) -> jax.Array:
    """A convolution's kernel, whole: only its examples are split, forward and backward."""
    return mesh.shard(w, None, None, None, None)


def rows(table: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table [V, D] at `ids` [...] -> [..., D]."""
    if isinstance(table, jax.Array):
        return _rows(table.astype(dtype))[ids]
    return table.rows(ids, dtype)


def _rows(table_VD: jax.Array) -> jax.Array:
    """A table whose rows are whole, for a lookup: XLA cannot cut a gather's result by width and by batch."""
    return mesh.shard(table_VD, "vocabulary", None)


def _turned(axes: Axes) -> Any:
    return None if axes is None else axes[::-1]


def lay_out(params: Any, rules: mesh.Rules) -> Any:
    """A model's parameters, each of which tells its layers where it is stored; on one device as they are.

    Args:
        params: nested dicts of arrays and Weights, as `rules` lay them out.
    """
    if not mesh.is_split():
        return params

    def leaf(path: Any, w: Any) -> Any:
        name = re.sub(
            r"(/\d+|/base)+$", "", trees.path_str(path)
        )  # a layer of a stack, what an adapter is on
        default = mesh.rule(mesh.RULES, name)
        axes = mesh.padded(mesh.rule(rules, name), len(default))
        if not (mesh.is_gathered(axes) or mesh.is_gathered(default)) or isinstance(w, InBlocks):
            return w
        if isinstance(w, Weight):
            return replace(w, axes=axes)  # type: ignore[type-var]
        return Sharded(w, axes=axes)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda x: isinstance(x, Weight))


def quantize(w: jax.Array, sums: Sequence[int], kind: str, group: int = 0, search: bool = False) -> Quantized:
    """w -> codes with a scale for each output, or each `group` of inputs of an output.

    Args:
        sums: the axes, counted from the end, that a product sums over; the last of them is cut into groups.
        group: must divide that axis, or be larger; 0: one scale for all inputs.
        search: try scales that clip the largest weights, and keep each group's of the least squared error.
    """
    wide = w.astype(jnp.float32)
    largest = rounding.spans(jnp.abs(wide), sums, group).max(rounding.reduced(w.ndim, sums))
    scale = rounding.scale_shape(largest, w.ndim, sums) / rounding.LARGEST[kind]
    if search:
        scale = _least_error(wide, scale, sums, kind, group)
    return encode(wide, scale, kind)


def encode(w: jax.Array, scale: jax.Array, kind: str) -> Quantized:
    """w and scales as `quantize` shapes them -> the nearest codes. A scale of 0 has only zeros to hold."""
    wide = rounding.spread(scale, w.shape)
    ratio = jnp.where(wide > 0, w.astype(jnp.float32) / jnp.where(wide > 0, wide, 1.0), 0.0)
    codes = rounding.round_to(ratio, kind)
    return Quantized(rounding.pack(codes) if kind == "int4" else codes, scale, None, kind, w.shape[-1])


def _least_error(w: jax.Array, scale: jax.Array, sums: Sequence[int], kind: str, group: int) -> jax.Array:
    def error(scale: jax.Array) -> jax.Array:
        off = jnp.square(encode(w, scale, kind).astype(jnp.float32) - w)
        total = rounding.spans(off, sums, group).sum(rounding.reduced(w.ndim, sums))
        return rounding.scale_shape(total, w.ndim, sums)

    def step(best: tuple[jax.Array, jax.Array], shrink: jax.Array) -> tuple[Any, None]:
        found = error(scale * shrink)
        better = found < best[1]
        return (jnp.where(better, scale * shrink, best[0]), jnp.where(better, found, best[1])), None

    (scale, _), _ = jax.lax.scan(step, (scale, error(scale)), jnp.asarray(SHRINKS[1:], jnp.float32))
    return scale
