"""Pruning while training: masks from scores, and an optimizer that keeps masked weights at zero.

`hold` wraps an optax transformation and has the masks in its state. So they are saved with it, are sharded as
their weights are, and the train step needs to know nothing of them.

Legend: I inputs, O outputs, N of M consecutive inputs that stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigmodel import trees
from bigmodel.config import InputError, Prune

Tree = Any
Sums = Mapping[str, tuple[int, ...]]  # path of a product's weight -> contracted axes, from the end


def chosen(how: Prune, sums: Sums, params: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the weights that are pruned, by path, with their contracted axes.

    Raises:
        InputError: `prune.on` matches none, or the pattern does not divide a weight's inputs.
    """
    shapes = {name: x.shape for name, x in trees.by_path(params).items()}
    found = {name: sums[name] for name in sums if name in shapes and re.search(how.on, "/" + name)}
    if not found:
        raise InputError(
            f"prune.on={how.on!r} matches no weight of this model; it has {', '.join(sorted(sums)) or 'none'}"
        )
    if how.pattern:
        _, m = pattern(how)
        for name, axes in found.items():
            if shapes[name][max(axes)] % m:
                raise InputError(
                    f"prune.pattern={how.pattern} needs a multiple of {m} inputs, but {name} has "
                    f"{shapes[name][max(axes)]}; leave it out with prune.on, or give a share such as 0.5"
                )
    return found


def pattern(how: Prune) -> tuple[int, int]:
    """Parses `2:4` as (2, 4): of 4 consecutive inputs, 2 stay."""
    n, _, m = how.pattern.partition(":")
    return int(n), int(m)


def masks(how: Prune, sums: Sums, scores: Mapping[str, jax.Array], share: Any) -> dict[str, jax.Array]:
    """Returns masks of the weights with the largest scores, which stay.

    Args:
        sums: the contracted axes of each score's weight.
        share: the share of the weights to prune; ignored if there is a pattern.
    """
    if how.pattern:
        n, m = pattern(how)
        return {name: _best_of_group(x, sums[name], n, m) for name, x in scores.items()}
    keys = {name: _ordered(x) for name, x in scores.items()}
    if how.scope == "global":
        level = _level(list(keys.values()), share, ())
        return {name: x >= level for name, x in keys.items()}
    out = {}
    for name, x in keys.items():  # each layer of a stack, and each expert, has its own level
        inner = tuple(range(x.ndim + min(sums[name]), x.ndim))
        out[name] = x >= _level([x], share, inner)
    return out


def _best_of_group(x: jax.Array, sums: Sequence[int], n: int, m: int) -> jax.Array:
    """Marks the N largest of every M along the last contracted axis; among equal ones the first."""
    axis = x.ndim + max(sums)
    groups = x.reshape(*x.shape[:axis], -1, m, *x.shape[axis + 1 :])
    rank = jnp.argsort(jnp.argsort(-groups, axis + 1, stable=True), axis + 1, stable=True)
    return (rank < n).reshape(x.shape)


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    top = jnp.uint32(1 << 31)
    return jnp.where(bits >= top, ~bits, bits | top)


def _level(keys: list[jax.Array], share: Any, inner: tuple[int, ...]) -> jax.Array:
    """Returns the largest level with at most `share` of the keys below it.

    Finds it bit by bit instead of sorting, so that only sums cross devices.

    Args:
        inner: the axes that share a level; (): all axes of all keys.
    """
    axes = [inner or tuple(range(x.ndim)) for x in keys]
    total = sum(math.prod(x.shape[axis] for axis in over) for x, over in zip(keys, axes, strict=True))
    allowed = jnp.round(jnp.asarray(share, jnp.float32) * total).astype(jnp.int32)

    def below(level: jax.Array) -> jax.Array:
        counts = [
            (x < level).sum(over, keepdims=bool(inner), dtype=jnp.int32)
            for x, over in zip(keys, axes, strict=True)
        ]
        return sum(counts[1:], counts[0])

    def step(index: jax.Array, level: jax.Array) -> jax.Array:
        higher = level | (jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32)))
        return jnp.where(below(higher) <= allowed, higher, level)

    shape = [1 if axis in inner else n for axis, n in enumerate(keys[0].shape)] if inner else []
    return jax.lax.fori_loop(0, 32, step, jnp.zeros(shape, jnp.uint32))


def share_at(how: Prune, step: jax.Array) -> jax.Array:
    """Returns the share pruned at a step (Zhu and Gupta 2017, eq. 1, from 0): fast first, then slow."""
    length = max(how.end_step - how.begin_step, 1)
    done = (step - how.begin_step).astype(jnp.float32) / length
    return how.sparsity * (1 - (1 - jnp.clip(done, 0, 1)) ** 3)


# ---------------------------------------------------------------------------------------------- training


class Masked(NamedTuple):
    """The state of `hold`: masks of the weights that are not zero, and (movement) their scores."""

    inner: Any
    step: jax.Array
    masks: Tree
    scores: Tree


def hold(tx: optax.GradientTransformation, how: Prune, sums: Sums) -> optax.GradientTransformation:
    """Wraps `tx` so that pruned weights are zero after each update.

    Without `end_step` these are the weights that are zero at the start. With it, their share grows every
    `every_steps` up to `sparsity`: the weights of smallest magnitude (Zhu and Gupta 2017), or those that
    training moves towards zero (Sanh et al. 2020, eq. 6: the score is the sum of -gradient x weight). A
    pruned weight stays pruned.
    """
    if not (how.sparsity or how.pattern):
        return tx
    gradual, movement = how.end_step > 0, how.end_step > 0 and how.method == "movement"

    def init(params: Tree) -> Masked:
        flat = trees.by_path(params)
        found = {name: flat[name] for name in chosen(how, sums, params)}
        start = {name: jnp.ones(p.shape, bool) if gradual else p != 0 for name, p in found.items()}
        scores = {name: jnp.zeros(p.shape, jnp.float32) for name, p in found.items() if movement}
        return Masked(tx.init(params), jnp.int32(0), trees.nest(start), trees.nest(scores))

    def update(grads: Tree, state: Masked, params: Tree) -> tuple[Tree, Masked]:
        updates, inner = tx.update(grads, state.inner, params)
        flat, alive, moved = (trees.by_path(tree) for tree in (params, state.masks, state.scores))
        if movement:
            slope = trees.by_path(grads)
            moved = {name: s - (slope[name] * flat[name]).astype(jnp.float32) for name, s in moved.items()}
        if gradual:
            scores = moved or {name: jnp.abs(flat[name]) for name in alive}
            alive = _fewer(how, {name: sums[name] for name in alive}, scores, alive, state.step)

        def masked(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            mask = alive.get(trees.path_str(path))
            return u if mask is None else jnp.where(mask, u, -p.astype(u.dtype))

        updates = jax.tree_util.tree_map_with_path(masked, updates, params)
        return updates, Masked(inner, state.step + 1, trees.nest(alive), trees.nest(moved))

    return optax.GradientTransformation(init, update)


def _fewer(
    how: Prune, sums: Sums, scores: dict[str, jax.Array], alive: dict[str, jax.Array], step: jax.Array
) -> dict[str, jax.Array]:
    """Returns the masks of a step: smaller ones on the schedule's steps, else `alive`."""
    last = step == how.end_step - 1
    on_schedule = (step - how.begin_step) % how.every_steps == 0
    due = last | (on_schedule & (step >= how.begin_step) & (step < how.end_step))

    def fewer() -> dict[str, jax.Array]:
        left = {name: jnp.where(alive[name], x.astype(jnp.float32), -jnp.inf) for name, x in scores.items()}
        share = share_at(how, jnp.where(last, how.end_step, step))
        best = masks(how, sums, left, share)
        return {name: best[name] & alive[name] for name in alive}

    return jax.lax.cond(due, fewer, lambda: alive)
