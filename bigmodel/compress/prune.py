"""Weights of a trained model set to zero, one by one: their masks then hold through training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import log, sparsity, trees
from bigmodel.compress import observe, recipe, solve
from bigmodel.compress.trained import Trained, changed
from bigmodel.config import InputError, Prune


def apply(model: Trained, op: recipe.Prune) -> Trained:
    """One shot: by magnitude; by Wanda (Sun et al. 2023: |w| times the norm of its input, compared within an
    output); or by SparseGPT. What a layer that shows its inputs to nobody has is pruned by magnitude.

    Raises:
        InputError: the model is quantized, or `sparsity.chosen` refuses.
    """
    if model.config.quantize.weights != "none":
        raise InputError("recipe step prune: the model is quantized already; prune it before")
    how = settings(op)
    flat, sums = trees.by_path(model.params), model.program.model.products
    found = sparsity.chosen(how, sums, model.params)
    seen: dict[str, jax.Array] = {}
    if op.method in ("wanda", "sparsegpt"):
        seen = observe.inputs(model, list(found), "gram")
        if unseen := sorted(found.keys() - seen.keys()):
            log.say(f"prune     {op.method} sees no inputs of {', '.join(unseen)}: by magnitude")
    scores = {name: jnp.abs(flat[name]) for name in found if name not in seen}
    keep = jax.jit(functools.partial(sparsity.masks, how, found))(scores, op.amount) if scores else {}
    new = {name: jnp.where(mask, flat[name], 0) for name, mask in keep.items()}
    one = jax.jit(functools.partial(_wanda if op.method == "wanda" else solve.sparsegpt, how=how))
    for name, gram in seen.items():
        new[name] = one(flat[name], gram).astype(flat[name].dtype)
    held = dataclasses.replace(how, end_step=0)
    return changed(model, model.config.replace(prune=held), trees.with_leaves(model.params, new), model.rest)


def scheduled(model: Trained, op: recipe.Prune) -> Trained:
    """The model with a config by which training prunes it. Raises as `apply`."""
    how = settings(op)
    sparsity.chosen(how, model.program.model.products, model.params)
    return changed(model, model.config.replace(prune=how), model.params, model.rest)


def finished(model: Trained) -> Trained:
    """After such training: what is zero stays so from here on, in a moving average too."""
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
    """w [..., I, O], gram [..., I, I] -> w with the smallest |w| ||x|| of each output at zero."""
    how = dataclasses.replace(how, scope="layer")
    norm = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    score = jnp.swapaxes(jnp.abs(w.astype(jnp.float32)) * norm, -1, -2)  # [..., O, I]: an output is a layer
    keep = sparsity.masks(how, {"w": (-1,)}, {"w": score}, how.sparsity)["w"]
    return jnp.where(jnp.swapaxes(keep, -1, -2), w, 0)


def settings(op: recipe.Prune) -> Prune:
    """The step's settings as `config.prune`; with steps, a schedule over the first three quarters of them."""
    method: Any = "movement" if op.method == "movement" else "magnitude"
    if op.pattern:
        n, m = map(int, op.pattern.split(":"))
        how = Prune(sparsity=1 - n / m, pattern=op.pattern)
    else:
        how = Prune(sparsity=op.amount)
    end = max(3 * op.steps // 4, 1) if op.steps else 0
    how = dataclasses.replace(how, method=method, scope=op.scope, end_step=end, every_steps=max(end // 16, 1))
    return dataclasses.replace(how, on=op.on) if op.on else how
