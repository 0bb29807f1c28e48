"""Structured pruning: removes attention heads, hidden units, channels or layers; the config becomes smaller.

A unit's importance is Molchanov et al. 2019, eq. 8, averaged over batches: (sum over its weights of
weight x gradient)^2, the change of the loss to first order. A layer's importance is the loss without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel import trees
from bigmodel.compress import channels, observe, recipe, trained
from bigmodel.compress.channels import Cut, Units
from bigmodel.compress.trained import Trained
from bigmodel.config import InputError


def check(c: Any, unit: str) -> None:
    """Raises InputError if the family of `config.model` c has no such units."""
    if unit not in c.units:
        choices = ", ".join(["weights", *c.units])
        raise InputError(f"recipe step prune: {_refusal(c, unit)}; choose {choices}")


def apply(model: Trained, step: recipe.PruneStep) -> Trained:
    """Removes `step.amount` of the model's units; each layer keeps its most important ones.

    Raises:
        InputError: the family has no such units.
    """
    c = model.config.model
    check(c, step.unit)
    if step.unit == "layers":
        return _without_layers(model, step.amount)
    smaller = dataclasses.replace(c, **channels.fewer(c, step.unit, step.amount))
    config = model.config.replace(model=smaller)
    flat, spec = arrays(vars(model)), trained.build(config, model.program).state_spec
    groups, left = channels.find(c, step.unit, flat), channels.find(smaller, step.unit, arrays(spec))
    keep: dict[tuple[str, int], np.ndarray] = {}
    for group, then, score in zip(groups, left, _importance(model, groups), strict=True):
        worst = np.argsort(-score, axis=-1, kind="stable")[..., then.count :]
        for cut in group.cuts:
            size = flat[cut.path].shape[cut.axis]
            mask = keep.setdefault((cut.path, cut.axis), np.ones((*score.shape[:-1], size), bool))
            removed = cut.places(size, group.count)[worst]
            np.put_along_axis(mask, removed.reshape(*removed.shape[:-2], -1), False, axis=-1)
    for (path, axis), mask in keep.items():
        flat[path] = _take(flat[path], axis, mask)
    parts = (
        {name.removeprefix(f"{part}/"): x for name, x in flat.items() if name.startswith(f"{part}/")}
        for part in PARTS
    )
    changed_parts = (trees.with_leaves(getattr(model, part), x) for part, x in zip(PARTS, parts, strict=True))
    return trained.changed(model, config, *changed_parts)


PARTS = ("params", "rest")


def arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a state's `params` and `rest` by path."""
    return {f"{part}/{path}": x for part in PARTS for path, x in trees.by_path(state[part]).items()}


def _refusal(c: Any, unit: str) -> str:
    """Says why a family has no such units."""
    why = {
        "layers": "each of its layers changes the shape of what it reads",
        "channels": "one stream runs through all its layers, whose norms measure all of it",
    }
    return f"a {c.name} has no unit={unit} that can be taken out" + (f": {why[unit]}" if unit in why else "")


def _importance(model: Trained, groups: list[Units]) -> list[np.ndarray]:
    """Returns the importance of each group's units, [lead..., units]."""
    params = trees.by_path(model.params)

    @jax.jit
    def of_batch(params: dict[str, jax.Array], slope: Any) -> list[jax.Array]:
        slopes, out = trees.by_path(slope), []
        for group in groups:
            total = jnp.float32(0)
            for cut in group.cuts:
                name = cut.path.removeprefix("params/")
                if name in params:  # statistics in `rest` have no gradient
                    total += _per_unit((params[name] * slopes[name]).astype(jnp.float32), cut, group)
            out.append(jnp.square(total))
        return out

    batches = [jax.device_get(of_batch(params, slope)) for slope in observe.slopes(model)]
    return [np.mean(scores, axis=0) for scores in zip(*batches, strict=True)]


def _per_unit(x: jax.Array, cut: Cut, group: Units) -> jax.Array:
    """Sums over all but the leading dimensions and the units: returns [lead..., units]."""
    axis = x.ndim + cut.axis
    along = x.sum(tuple(i for i in range(group.lead, x.ndim) if i != axis))
    return along[..., cut.places(x.shape[axis], group.count)].sum(-1)


def _take(x: jax.Array, axis: int, mask: np.ndarray) -> jax.Array:
    """Returns the entries of x along `axis` where `mask` [lead..., size of the axis] is true.

    Each of the leading dimensions has as many.
    """
    lead = mask.shape[:-1]
    index = np.nonzero(mask)[-1].reshape(*lead, -1)
    before = x.ndim + axis - len(lead)
    index = index.reshape(*lead, *(1,) * before, index.shape[-1], *(1,) * (-axis - 1))
    return jnp.take_along_axis(x, jnp.asarray(index), axis)


# ---------------------------------------------------------------------------------------------------- layers


def _without_layers(model: Trained, amount: float) -> Trained:
    """Removes layers one by one, each time the one without which the loss is lowest."""
    for key, (_, depth) in model.config.model.stacks.items():
        target = max(round(depth * (1 - amount)), 1)
        for _ in range(depth - target):
            model = _without_one(model, key)
    return model


def _without_one(model: Trained, key: str) -> Trained:
    stack, depth = model.config.model.stacks[key]
    changes: dict[str, Any] = {key: depth - 1}
    config = model.config.replace(model=dataclasses.replace(model.config.model, **changes))
    flat = {name: x for name, x in trees.by_path(model.params).items() if name.startswith(stack + "/")}

    def without(layer: int) -> Any:
        others = np.delete(np.arange(depth), layer)
        return trees.with_leaves(model.params, {name: x[others] for name, x in flat.items()})

    smaller = trained.changed(model, config, without(0), model.rest)
    losses = [_loss(dataclasses.replace(smaller, params=without(layer))) for layer in range(depth)]
    return trained.changed(model, config, without(int(np.argmin(losses))), model.rest)


def _loss(model: Trained) -> float:
    """The mean loss of the calibration batches."""
    state = {"params": model.params, "rest": model.rest}
    terms = [jax.device_get(model.program.eval_step(state, b)["loss"]) for b in observe.batches(model)]
    total, weight = np.sum(terms, axis=0)
    return float(total / weight)
