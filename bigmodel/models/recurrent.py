"""RNN: LSTM and GRU, as language model or text classifier.

The inputs' part of all gates is one matrix product over all steps, outside the loop; inside it each step is
one product with the state. The gradient of that product's kernel is taken after the loop, again in one.

Legend: B batch, L length, I inputs, H width, G gates, V vocabulary, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel import mesh
from bigmodel.config import Config, families
from bigmodel.models import layers, module, products

# (state, the gates' sums [B, G, H], what of the input stays apart [B, H] or None) -> state; state[0] is h.
State = tuple[jax.Array, ...]
Cell = Callable[[State, jax.Array, jax.Array | None], State]


def lstm(state: State, sums_BGH: jax.Array, apart_BH: jax.Array | None) -> State:
    """Hochreiter and Schmidhuber 1997 with Gers et al.'s forget gate; gates in the order i, f, g, o."""
    i, f, g, o = (sums_BGH[:, gate] for gate in range(4))
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(state: State, sums_BGH: jax.Array, apart_BH: jax.Array | None) -> State:
    """Cho et al. 2014, the reset gate after the product (as in cuDNN); gates in the order r, z, n."""
    assert apart_BH is not None
    r, z = jax.nn.sigmoid(sums_BGH[:, 0]), jax.nn.sigmoid(sums_BGH[:, 1])
    n = jnp.tanh(apart_BH + r * sums_BGH[:, 2])
    return ((1 - z) * n + z * state[0],)


CELLS: dict[str, tuple[Cell, int, int]] = {"lstm": (lstm, 4, 2), "gru": (gru, 3, 1)}  # cell, gates, arrays


class Gates(nnx.Module):
    """x [..., I] -> all gates' sums [..., G, H]; the kernel [I, G, H] keeps H apart, to be cut."""

    SUMS: ClassVar[layers.Sums] = {"kernel": (-3,)}

    def __init__(self, i: int, gates: int, h: int, *, dtype: str, rngs: nnx.Rngs, bias: bool):
        self.kernel = nnx.Param(i**-0.5 * jax.random.normal(rngs.params(), (i, gates, h), dtype))
        self.bias = nnx.Param(jnp.zeros((gates, h), dtype)) if bias else None


class Layer(nnx.Module):
    """x [B, L, I] -> h [B, L, H] of every step; the state is zero wherever a document starts."""

    def __init__(self, c: families.RNN, i: int, *, dtype: str, rngs: nnx.Rngs):
        self.cell, self.gates, self.arrays = CELLS[c.cell]
        self.inputs = Gates(i, self.gates, c.width, dtype=dtype, rngs=rngs, bias=True)
        self.state = Gates(c.width, self.gates, c.width, dtype=dtype, rngs=rngs, bias=c.cell == "gru")
        if c.cell == "lstm":  # forget little at first (Jozefowicz et al. 2015, section 2.2)
            assert self.inputs.bias is not None
            self.inputs.bias[...] = self.inputs.bias[...].at[1].set(1)

    def __call__(self, x_BLI: jax.Array, keep_BL: jax.Array) -> jax.Array:
        dtype = x_BLI.dtype
        # Gathered over fsdp once, not in every step.
        kernel_IGH, kernel_HGH = (
            mesh.shard(part.kernel[...].astype(dtype), None, None, "hidden")
            for part in (self.inputs, self.state)
        )
        x_LBI = mesh.shard(x_BLI.swapaxes(0, 1), "sequence", "batch", None)
        sums_LBGH = project(x_LBI, kernel_IGH) + _bias(self.inputs, dtype)
        apart_LBH = None
        if self.state.bias is not None:  # gru: the reset gate scales the state's part of n alone
            apart_LBH = sums_LBGH[:, :, 2]
            bias_GH = _bias(self.state, dtype)
            n_BH = jnp.broadcast_to(bias_GH[2], apart_LBH.shape)
            sums_LBGH = jnp.concatenate([sums_LBGH[:, :, :2] + bias_GH[:2], n_BH[:, :, None]], 2)
        sums_LBGH = mesh.shard(sums_LBGH, "sequence", "batch", None, "hidden")
        h_LBH = unroll(self.cell, self.arrays, sums_LBGH, apart_LBH, keep_BL.T, kernel_HGH)
        return mesh.shard(h_LBH.swapaxes(0, 1), "batch", "sequence", "hidden")


def _bias(part: Gates, dtype: Any) -> jax.Array:
    assert part.bias is not None
    return part.bias[...].astype(dtype)


def project(x: jax.Array, kernel_IGH: jax.Array) -> jax.Array:
    """x [..., I] -> [..., G, H]. Flat where nothing cuts H: a CPU multiplies matrices fastest."""
    if mesh.ways("hidden") == 1:
        flat = products.dense(x, kernel_IGH.reshape(len(kernel_IGH), -1))
        return flat.reshape(*x.shape[:-1], *kernel_IGH.shape[1:])
    return jax.lax.dot_general(x, kernel_IGH, (((x.ndim - 1,), (0,)), ((), ())))


def unroll(
    cell: Cell,
    arrays: int,
    sums_LBGH: jax.Array,
    apart_LBH: jax.Array | None,
    keep_LB: jax.Array,
    kernel_HGH: jax.Array,
) -> jax.Array:
    """h [L, B, H] of every step: state = cell(keep * state, sums + h @ kernel, apart).

    The state is kept in float32, as the gates are; products are in the kernel's dtype. Reverse mode through
    the loop would add to the kernel's gradient at every step; here it is one product of all steps' states
    with the gradients of all steps' sums, which the inputs' gradients are anyhow.
    """
    dtype = kernel_HGH.dtype

    def loop(sums_LBGH: jax.Array, apart_LBH: jax.Array | None, kernel_HGH: jax.Array) -> Any:
        def step(state: State, x: tuple[Any, ...]) -> tuple[State, tuple[jax.Array, jax.Array]]:
            sums_BGH, apart_BH, keep_B = x
            state = tuple(part * keep_B[:, None] for part in state)
            before_BH = state[0].astype(dtype)
            sums_BGH = (sums_BGH + project(before_BH, kernel_HGH)).astype(jnp.float32)
            apart_BH = None if apart_BH is None else apart_BH.astype(jnp.float32)
            state = cell(state, sums_BGH, apart_BH)
            return state, (state[0].astype(dtype), before_BH)

        _, b, _, h = sums_LBGH.shape
        zero_BH = mesh.shard(jnp.zeros((b, h), jnp.float32), "batch", "hidden")
        _, (h_LBH, before_LBH) = jax.lax.scan(step, (zero_BH,) * arrays, (sums_LBGH, apart_LBH, keep_LB))
        return h_LBH, before_LBH

    @jax.custom_vjp
    def run(sums_LBGH: jax.Array, apart_LBH: jax.Array | None, kernel_HGH: jax.Array) -> jax.Array:
        return loop(sums_LBGH, apart_LBH, kernel_HGH)[0]

    def forward(sums_LBGH: jax.Array, apart_LBH: jax.Array | None, kernel_HGH: jax.Array) -> Any:
        h_LBH, back, before_LBH = jax.vjp(
            lambda sums, apart: loop(sums, apart, kernel_HGH), sums_LBGH, apart_LBH, has_aux=True
        )
        return h_LBH, (back, before_LBH)

    def backward(residuals: Any, grad_LBH: jax.Array) -> Any:
        back, before_LBH = residuals
        d_sums_LBGH, d_apart_LBH = back(grad_LBH)
        if mesh.ways("hidden") > 1:
            return d_sums_LBGH, d_apart_LBH, jnp.einsum("LBH,LBGK->HGK", before_LBH, d_sums_LBGH)
        h, (gates, k) = before_LBH.shape[-1], d_sums_LBGH.shape[2:]
        d_kernel = before_LBH.reshape(-1, h).T @ d_sums_LBGH.reshape(-1, gates * k)
        return d_sums_LBGH, d_apart_LBH, d_kernel.reshape(h, gates, k)

    run.defvjp(forward, backward)
    return run(sums_LBGH, apart_LBH, kernel_HGH)


class RNN(nnx.Module):
    """Layers of LSTM or GRU over embedded tokens; dropout between them, as in Zaremba et al. 2014.

    batch: `tokens`, `segments`, `positions`, each int32 [B, L] -> {"logits": [B, L, V]}; of a classifier or
    a regression [B, classes], from the state at the last token. Packed documents do not see each other.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        c = config.model
        assert isinstance(c, families.RNN)
        self.c, self.compute_dtype, dtype = c, config.compute_dtype, config.param_dtype
        self.embed = layers.Embed(c.vocab_size, c.embed_width, dtype=dtype, rngs=rngs)
        widths = (c.embed_width, *(c.width,) * (c.depth - 1))
        self.layers = nnx.List([Layer(c, i, dtype=dtype, rngs=rngs) for i in widths])
        self.one_output = config.task.one_output
        ties = c.tie_embeddings and not self.one_output
        inner = c.embed_width if ties else c.width  # a tied output layer reads what the embedding's width is
        std = c.width**-0.5
        self.out = layers.Dense(c.width, inner, std=std, dtype=dtype, rngs=rngs) if inner != c.width else None
        outputs = c.num_classes if self.one_output else c.vocab_size
        self.head = None if ties else layers.Dense(c.width, outputs, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        keys = [None] * (self.c.depth + 1) if key is None else list(jax.random.split(key, self.c.depth + 1))
        keep_BL = (batch["positions"] > 0).astype(jnp.float32)
        x_BLD = self.embed(batch["tokens"], self.compute_dtype)
        for index, layer in enumerate(self.layers):
            x_BLD = layer(layers.dropout(x_BLD, self.c.dropout, keys[index]), keep_BL)
        x_BLD = layers.dropout(x_BLD, self.c.dropout, keys[-1])
        if self.one_output:
            assert self.head is not None
            return module.read_out(self.head, layers.read(x_BLD, batch["segments"], "last"))
        x_BLD = x_BLD if self.out is None else self.out(x_BLD)
        return module.read_out(self.embed.attend if self.head is None else self.head, x_BLD)
