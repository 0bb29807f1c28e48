"""Observes a trained model on its training data: inputs of matrix products, and gradients of the loss.

Legend: I inputs of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import trees
from bigmodel.compress import trained
from bigmodel.compress.trained import Trained
from bigmodel.models import weights

BATCHES = 4  # of the config's batch_size, from the training split


def batches(model: Trained, count: int = BATCHES) -> Iterator[dict[str, jax.Array]]:
    """Yields the first batches of the training split, on the mesh."""
    pipeline = trained.train_data(model)
    return (model.program.put(pipeline[step]) for step in range(count))


def inputs(model: Trained, names: list[str], what: str) -> dict[str, jax.Array]:
    """Returns a statistic of the inputs of each named product over the batches, in float32.

    Args:
        what: `gram`: [..., I, I], the sum of x x^T; `largest`: [...], the largest |x|. The leading dimensions
            are the weight's own (a stack's depth).

    Leaves out products that the model does not compute by `weights.product` or (`largest` only) `conv`.
    """
    flat_params = trees.by_path(model.params)
    sums = model.program.model.products
    contracted = {"gram": ((-2,),), "largest": ((-2,), (-4, -3, -2))}[what]
    direct = [name for name in names if sums[name] in contracted]

    def probe(name: str) -> dict[str, jax.Array]:
        w = flat_params[name]
        lead = w.shape[: w.ndim + min(sums[name])]
        return {what: jnp.zeros((*lead, w.shape[-2], w.shape[-2]) if what == "gram" else lead, jnp.float32)}

    def outputs(probes: Any, params: Any, rest: Any, batch: Any) -> jax.Array:
        flat = trees.by_path(params)
        watched = {name: weights.Observed(flat[name], probes[name]) for name in direct}
        params = trees.with_leaves(params, watched)
        out, _ = model.program.model.apply(params, rest, batch, key=None, train=False)
        return sum((x.astype(jnp.float32).sum() for x in jax.tree.leaves(out)), jnp.float32(0))

    statistic = _jitted(model, jax.grad(outputs))
    probes = {name: probe(name) for name in direct}
    combine = jnp.add if what == "gram" else jnp.maximum
    total = probes
    for batch in batches(model):
        total = jax.tree.map(combine, total, statistic(probes, model.params, model.rest, batch))
    found = {name: x[what] for name, x in total.items()}
    return {name: x for name, x in found.items() if bool((x != 0).any())}


def slopes(model: Trained) -> Iterator[Any]:
    """Yields the gradient of the mean training loss, batch by batch, without dropout."""
    task = model.program.task
    key = jax.random.key(0) if task.several_passes else None

    def loss(params: Any, rest: Any, batch: Any) -> jax.Array:
        outputs, _ = model.program.model.apply(params, rest, batch, key=key, train=True)
        return task.terms(outputs, batch, True)["loss"][0] / jnp.maximum(task.weight(batch), 1e-9)

    slope = _jitted(model, jax.grad(loss))
    return (slope(model.params, model.rest, batch) for batch in batches(model))


def _jitted(model: Trained, function: Any) -> Any:
    return jax.jit(model.program.on_mesh(function))
