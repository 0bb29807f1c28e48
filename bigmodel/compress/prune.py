"""Unstructured pruning: sets single weights of a trained model to zero; they stay zero in later training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import log, sparsity, trees
from bigmodel.compress import observe, recipe, solve
from bigmodel.compress.trained import Trained, changed
from bigmodel.config import Prune


def apply(model: Trained, step: recipe.PruneStep) -> Trained:
    """Prunes in one shot: by magnitude; by Wanda (Sun et al. 2023: |w| times the norm of its input, compared
    within an output); or by SparseGPT. Layers whose inputs cannot be observed are pruned by magnitude.

    Raises:
        InputError: `sparsity.chosen` refuses.
    """
    how = settings(step)
    flat, sums = trees.by_path(model.params), model.program.model.products
    found = sparsity.chosen(how, sums, model.params)
    grams: dict[str, jax.Array] = {}
    if step.method in ("wanda", "sparsegpt"):
        grams = observe.inputs(model, list(found), "gram")
        if others := sorted(found.keys() - grams.keys()):
            log.say(f"prune     {step.method} cannot observe the inputs of {', '.join(others)}: by magnitude")
    scores = {name: jnp.abs(flat[name]) for name in found if name not in grams}
    keep = jax.jit(functools.partial(sparsity.masks, how, found))(scores, step.amount) if scores else {}
    new = {name: jnp.where(mask, flat[name], 0) for name, mask in keep.items()}
    one = jax.jit(functools.partial(_wanda if step.method == "wanda" else solve.sparsegpt, how=how))
    for name, gram in grams.items():
        new[name] = one(flat[name], gram).astype(flat[name].dtype)
    constant = dataclasses.replace(how, end_step=0)  # the zeros stay
    return changed(
        model, model.config.replace(prune=constant), trees.with_leaves(model.params, new), model.rest
    )


def scheduled(model: Trained, step: recipe.PruneStep) -> Trained:
    """Returns the model with a config by which training prunes it. Raises as `apply`."""
    how = settings(step)
    sparsity.chosen(how, model.program.model.products, model.params)
    return changed(model, model.config.replace(prune=how), model.params, model.rest)


def finished(model: Trained) -> Trained:
    """Ends such training: zeros stay zero from here on, in the moving average too."""
    config = model.config.replace(prune=dataclasses.replace(model.config.prune, end_step=0, begin_step=0))
    params = model.params
    if "ema" in model.state:
        masks = trees.by_path(model.state["opt"].masks)
        flat = trees.by_path(params)
        params = trees.with_leaves(
            params, {name: jnp.where(mask, flat[name], 0) for name, mask in masks.items()}
        )
    return changed(model, config, params, model.rest)


def _wanda(w: jax.Array, gram: jax.Array, how: Prune) -> jax.Array:
    """Sets the smallest |w| ||x|| of each output to zero; w is [..., I, O] and gram [..., I, I]."""
    how = dataclasses.replace(how, scope="layer")
    norm = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    score = jnp.swapaxes(
        jnp.abs(w.astype(jnp.float32)) * norm, -1, -2
    )  # [..., O, I]: each output is compared within itself
    keep = sparsity.masks(how, {"w": (-1,)}, {"w": score}, how.sparsity)["w"]
    return jnp.where(jnp.swapaxes(keep, -1, -2), w, 0)


def settings(step: recipe.PruneStep) -> Prune:
    """Returns the step's settings as `config.prune`: with steps, a schedule over three quarters of them."""
    method: Any = "movement" if step.method == "movement" else "magnitude"
    if step.pattern:
        n, m = map(int, step.pattern.split(":"))
        how = Prune(sparsity=1 - n / m, pattern=step.pattern)
    else:
        how = Prune(sparsity=step.amount)
    end = max(3 * step.steps // 4, 1) if step.steps else 0
    how = dataclasses.replace(how, method=method, scope=step.scope, end_step=end)
    how = dataclasses.replace(how, every_steps=max(end // 16, 1))
    return dataclasses.replace(how, on=step.on) if step.on else how
