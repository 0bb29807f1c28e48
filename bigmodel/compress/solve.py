"""One weight after another is changed, and those after it make up for the error: SparseGPT and GPTQ.

Both are Optimal Brain Surgeon (Hassibi and Stork 1993) in a fixed order, on the layer's own squared error
|| X (W - W') ||^2, whose Hessian is X^T X.

Legend: I inputs, O outputs, B inputs of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel.config import Prune
from bigmodel.models import weights
from bigmodel.sparsity import masks

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it (Frantar et al. 2022, section 3.3)
Prepare = Callable[[jax.Array, jax.Array], jax.Array]  # rows [B, O], diagonal [B] -> what settles them
Settle = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # row [O], that, its place -> its new value


def in_order(
    w_IO: jax.Array, gram_II: jax.Array, block: int, prepare: Prepare, settle: Settle
) -> tuple[jax.Array, jax.Array]:
    """-> (new weights [I, O], what `prepare` gave for each block). float32; `block` divides I.

    Frantar et al. 2022, section 3.3: the inverse Hessian's Cholesky factor holds all that is needed of it.
    """
    inputs = w_IO.shape[0]
    dead_I = jnp.diag(gram_II) == 0
    damp = DAMPING * jnp.diag(gram_II).mean() + 1e-8
    h_II = gram_II + jnp.diag(jnp.where(dead_I, 1.0, damp))
    inverse_II = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(h_II), jnp.eye(inputs))
    u_II = jnp.linalg.cholesky(inverse_II).T
    w_IO = jnp.where(dead_I[:, None], 0.0, w_IO)
    at_I, at_B = jnp.arange(inputs), jnp.arange(block)

    def one_block(w_IO: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = index * block
        u_BI = jax.lax.dynamic_slice_in_dim(u_II, start, block)
        u_BB = jax.lax.dynamic_slice_in_dim(u_BI, start, block, axis=1)
        rows_BO = jax.lax.dynamic_slice_in_dim(w_IO, start, block)
        diagonal_B = jnp.diag(u_BB)
        prepared = prepare(rows_BO, diagonal_B)

        def one_row(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            rows_BO, errors_BO = carry
            new_O = settle(rows_BO[j], prepared, j)
            error_O = (rows_BO[j] - new_O) / diagonal_B[j]
            after_B = jnp.where(at_B > j, u_BB[j], 0.0)
            rows_BO = (rows_BO - after_B[:, None] * error_O).at[j].set(new_O)
            return rows_BO, errors_BO.at[j].set(error_O)

        rows_BO, errors_BO = jax.lax.fori_loop(0, block, one_row, (rows_BO, jnp.zeros_like(rows_BO)))
        after_BI = jnp.where(at_I >= start + block, u_BI, 0.0)
        w_IO = jax.lax.dynamic_update_slice_in_dim(w_IO - after_BI.T @ errors_BO, rows_BO, start, 0)
        return w_IO, prepared

    return jax.lax.scan(one_block, w_IO, jnp.arange(inputs // block))


def sparsegpt(w: jax.Array, gram: jax.Array, how: Prune) -> jax.Array:
    """w [..., I, O] pruned as `how` says, the rest of it changed to make up (Frantar and Alistarh 2023,
    algorithm 1): in each block, what costs least goes, w^2 / diagonal^2."""
    how = dataclasses.replace(how, scope="layer")
    block = block_size(w.shape[-2], 128, int(how.pattern.partition(":")[2] or 1))

    def prepare(rows_BO: jax.Array, diagonal_B: jax.Array) -> jax.Array:
        score = jnp.square(rows_BO / diagonal_B[:, None])
        return masks(how, {"w": (-2,)}, {"w": score}, how.sparsity)["w"]

    def settle(row_O: jax.Array, mask_BO: jax.Array, j: jax.Array) -> jax.Array:
        return jnp.where(mask_BO[j], row_O, 0.0)

    return _over_stack(lambda w, h: in_order(w, h, block, prepare, settle)[0])(w.astype(jnp.float32), gram)


def gptq(w: jax.Array, gram: jax.Array, kind: str, group: int) -> weights.Quantized:
    """w [..., I, O] quantized, each weight after those before it made up for (Frantar et al. 2022).

    A group's scale is chosen when its turn comes; without groups, an output's is of its own weights.
    """
    inputs = w.shape[-2]
    grouped = 0 < group < inputs
    block = group if grouped else block_size(inputs, 128)

    def one(w_IO: jax.Array, h_II: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = weights.quantize(w_IO, (-2,), kind, 0, search=True).scale

        def prepare(rows_BO: jax.Array, diagonal_B: jax.Array) -> jax.Array:
            return weights.quantize(rows_BO, (-2,), kind, 0, search=True).scale if grouped else whole

        def settle(row_O: jax.Array, scale_1O: jax.Array, j: jax.Array) -> jax.Array:
            return weights.encode(row_O[None], scale_1O, kind).astype(jnp.float32)[0]

        new_IO, scales = in_order(w_IO, h_II, block, prepare, settle)
        return new_IO, scales[:, 0] if grouped else whole

    new, scale = _over_stack(one)(w.astype(jnp.float32), gram)
    return weights.encode(new, scale, kind)


def block_size(inputs: int, most: int, multiple: int = 1) -> int:
    """The largest divisor of `inputs` up to `most` that is a multiple of `multiple`."""
    sizes = range(min(most, inputs), 0, -1)
    return next((n for n in sizes if inputs % n == 0 and n % multiple == 0), inputs)


def _over_stack(function: Any) -> Any:
    """Of [I, O] and [I, I] -> of [..., I, O] and [..., I, I]."""

    def over(w: jax.Array, gram: jax.Array) -> Any:
        mapped = function
        for _ in range(w.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(w, gram)

    return over
