"""SparseGPT and GPTQ: change weights one after another; later ones compensate for the error of earlier ones.

Both are Optimal Brain Surgeon (Hassibi and Stork 1993) in a fixed order, on the layer's own squared error
|| X (W - W') ||^2, whose Hessian is X^T X.

Legend: I inputs, O outputs, B inputs of a block, G of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel.config import Prune
from bigmodel.models import weights
from bigmodel.sparsity import masks, pattern

BLOCK = 128  # inputs whose errors reach the later ones in one product
DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it (Frantar et al. 2022, section 3.3)
Prepare = Callable[[jax.Array, jax.Array], jax.Array]  # rows [G, O], diagonal [G] -> scales or masks
Settle = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # row [O], those, its index -> the new row


@dataclasses.dataclass(frozen=True)
class Order:
    """Sizes of the blocks and groups in which `in_order` walks the inputs; the last ones may be smaller.

    A group's errors reach the rest of its block before the next group is prepared; a block's errors reach the
    later blocks in one product.
    """

    block: int
    group: int  # divides `block`


def in_order(
    w_IO: jax.Array, gram_II: jax.Array, order: Order, prepare: Prepare, settle: Settle
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns new weights [I, O], and the stacked results of `prepare`: of full blocks, then of the last one.

    Frantar et al. 2022, section 3.3: the Cholesky factor of the inverse Hessian is all that is needed of it.
    Computes in float32.
    """
    inputs, block = w_IO.shape[0], order.block
    dead_I = jnp.diag(gram_II) == 0
    damp = DAMPING * jnp.diag(gram_II).mean() + 1e-8
    h_II = gram_II + jnp.diag(jnp.where(dead_I, 1.0, damp))
    inverse_II = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(h_II), jnp.eye(inputs))
    u_II = jnp.linalg.cholesky(inverse_II).T
    w_IO = jnp.where(dead_I[:, None], 0.0, w_IO)

    def one_block(w_IO: jax.Array, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        u_BI = jax.lax.dynamic_slice_in_dim(u_II, start, size)
        u_BB = jax.lax.dynamic_slice_in_dim(u_BI, start, size, axis=1)
        rows_BO = jax.lax.dynamic_slice_in_dim(w_IO, start, size)
        rows_BO, errors_BO, prepared = _settled(rows_BO, u_BB, min(order.group, size), prepare, settle)
        after_BI = jnp.where(jnp.arange(inputs) >= start + size, u_BI, 0.0)
        w_IO = jax.lax.dynamic_update_slice_in_dim(w_IO - after_BI.T @ errors_BO, rows_BO, start, 0)
        return w_IO, prepared

    found = []
    if blocks := inputs // block:
        starts = jnp.arange(blocks) * block
        w_IO, prepared = jax.lax.scan(lambda w_IO, start: one_block(w_IO, start, block), w_IO, starts)
        found.append(prepared.reshape(-1, *prepared.shape[2:]))
    if left := inputs % block:
        w_IO, prepared = one_block(w_IO, jnp.int32(inputs - left), left)
        found.append(prepared)
    return w_IO, found


def _settled(
    rows_BO: jax.Array, u_BB: jax.Array, group: int, prepare: Prepare, settle: Settle
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Settles a block's rows one by one: returns new rows, their errors, and each group's `prepare`."""
    at_B, diagonal_B = jnp.arange(len(rows_BO)), jnp.diag(u_BB)

    def one_group(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, jax.Array]:
        rows_GO = jax.lax.dynamic_slice_in_dim(carry[0], start, group)
        prepared = prepare(rows_GO, jax.lax.dynamic_slice_in_dim(diagonal_B, start, group))

        def one_row(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            (rows_BO, errors_BO), j = carry, start + k
            new_O = settle(rows_BO[j], prepared, k)
            error_O = (rows_BO[j] - new_O) / diagonal_B[j]
            after_B = jnp.where(at_B > j, u_BB[j], 0.0)
            rows_BO = (rows_BO - after_B[:, None] * error_O).at[j].set(new_O)
            return rows_BO, errors_BO.at[j].set(error_O)

        return jax.lax.fori_loop(0, group, one_row, carry), prepared

    starts = jnp.arange(0, len(rows_BO), group)
    (rows_BO, errors_BO), prepared = jax.lax.scan(one_group, (rows_BO, jnp.zeros_like(rows_BO)), starts)
    return rows_BO, errors_BO, prepared


def sparsegpt(w: jax.Array, gram: jax.Array, how: Prune) -> jax.Array:
    """Prunes w [..., I, O] as `how` says and changes the rest to compensate (Frantar and Alistarh 2023).

    Algorithm 1: removes the weights with the least w^2 / diagonal^2, chosen for a block of 128 inputs at
    once, or for N:M patterns for each M inputs in turn (section 3.4).
    """
    how = dataclasses.replace(how, scope="layer")
    order = Order(BLOCK, BLOCK)
    if how.pattern:
        m = pattern(how)[1]
        order = Order(m * max(BLOCK // m, 1), m)

    def prepare(rows_GO: jax.Array, diagonal_G: jax.Array) -> jax.Array:
        score = jnp.square(rows_GO / diagonal_G[:, None])
        return masks(how, {"w": (-2,)}, {"w": score}, how.sparsity)["w"]

    def settle(row_O: jax.Array, mask_GO: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.where(mask_GO[k], row_O, 0.0)

    return _over_stack(lambda w, h: in_order(w, h, order, prepare, settle)[0])(w.astype(jnp.float32), gram)


def gptq(w: jax.Array, gram: jax.Array, kind: str, group: int) -> weights.Quantized:
    """Quantizes w [..., I, O] weight by weight; later ones compensate for earlier ones (Frantar et al. 2022).

    A group's scale is chosen when its turn comes; without groups, each output has one scale.
    """
    inputs = w.shape[-2]
    grouped = 0 < group < inputs
    order = Order(group, group) if grouped else Order(BLOCK, BLOCK)

    def one(w_IO: jax.Array, h_II: jax.Array) -> tuple[jax.Array, jax.Array]:
        per_output = weights.quantize(w_IO, (-2,), kind, 0, search=True).scale

        def prepare(rows_GO: jax.Array, diagonal_G: jax.Array) -> jax.Array:
            return weights.quantize(rows_GO, (-2,), kind, 0, search=True).scale if grouped else per_output

        def settle(row_O: jax.Array, scale_1O: jax.Array, k: jax.Array) -> jax.Array:
            return weights.encode(row_O[None], scale_1O, kind).astype(jnp.float32)[0]

        new_IO, scales = in_order(w_IO, h_II, order, prepare, settle)
        return new_IO, scales[0][:, 0] if grouped else per_output

    new, scale = _over_stack(one)(w.astype(jnp.float32), gram)
    return weights.encode(new, scale, kind)


def _over_stack(function: Any) -> Any:
    """Maps a function of [I, O] and [I, I] over leading dimensions."""

    def over(w: jax.Array, gram: jax.Array) -> Any:
        mapped = function
        for _ in range(w.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(w, gram)

    return over
