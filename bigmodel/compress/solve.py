"""One weight after another is changed, and those after it make up for the error: SparseGPT and GPTQ.

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

BLOCK = 128  # inputs whose errors the later ones hear of at once
DAMPING = 0.01  # of the Hessian's mean diagonal, added to it (Frantar et al. 2022, section 3.3)
Prepare = Callable[[jax.Array, jax.Array], jax.Array]  # rows [G, O], diagonal [G] -> what settles them
Settle = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # row [O], that, its place -> its new value


@dataclasses.dataclass(frozen=True)
class Order:
    """How `in_order` walks the inputs, of which the last block, and its last group, may be smaller.

    What is still to come hears of a group's errors before the next group is prepared; of a block's, in one
    product.
    """

    block: int
    group: int  # divides `block`


def in_order(
    w_IO: jax.Array, gram_II: jax.Array, order: Order, prepare: Prepare, settle: Settle
) -> tuple[jax.Array, list[jax.Array]]:
    """-> (new weights [I, O], what `prepare` gave for the groups, stacked: of whole blocks, of the last one).

    Frantar et al. 2022, section 3.3: the inverse Hessian's Cholesky factor holds all that is needed of it.
    float32.
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
    """A block's rows, one after another -> (new rows, their errors, what each group was prepared with)."""
    at_B, diagonal_B = jnp.arange(len(rows_BO)), jnp.diag(u_BB)

    def one_group(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, jax.Array]:
        mine_GO = jax.lax.dynamic_slice_in_dim(carry[0], start, group)
        prepared = prepare(mine_GO, jax.lax.dynamic_slice_in_dim(diagonal_B, start, group))

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
    """w [..., I, O] pruned as `how` says, the rest of it changed to make up (Frantar and Alistarh 2023,
    algorithm 1): what costs least goes, w^2 / diagonal^2, of a block of 128 inputs at once; of N:M, of each M
    inputs when their turn comes (section 3.4)."""
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
    """w [..., I, O] quantized, each weight after those before it made up for (Frantar et al. 2022).

    A group's scale is chosen when its turn comes; without groups, an output's is of its own weights.
    """
    inputs = w.shape[-2]
    grouped = 0 < group < inputs
    order = Order(group, group) if grouped else Order(BLOCK, BLOCK)

    def one(w_IO: jax.Array, h_II: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = weights.quantize(w_IO, (-2,), kind, 0, search=True).scale

        def prepare(rows_GO: jax.Array, diagonal_G: jax.Array) -> jax.Array:
            return weights.quantize(rows_GO, (-2,), kind, 0, search=True).scale if grouped else whole

        def settle(row_O: jax.Array, scale_1O: jax.Array, k: jax.Array) -> jax.Array:
            return weights.encode(row_O[None], scale_1O, kind).astype(jnp.float32)[0]

        new_IO, scales = in_order(w_IO, h_II, order, prepare, settle)
        return new_IO, scales[0][:, 0] if grouped else whole

    new, scale = _over_stack(one)(w.astype(jnp.float32), gram)
    return weights.encode(new, scale, kind)


def _over_stack(function: Any) -> Any:
    """Of [I, O] and [I, I] -> of [..., I, O] and [..., I, I]."""

    def over(w: jax.Array, gram: jax.Array) -> Any:
        mapped = function
        for _ in range(w.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(w, gram)

    return over
