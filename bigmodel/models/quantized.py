"""Storage of a model's weights: as floats, or quantized with their codes in `rest`, where nothing trains.

`storage` says how by `config.quantize`; the modules do not know.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import trees
from bigmodel.config import InputError, Quantize
from bigmodel.models import weights
from bigmodel.models.module import Definition, Storage, Tree

PARTS = ("codes", "scale", "activation")  # of a quantized weight; in `rest` a tree of each


def storage(definition: Definition, how: Quantize) -> Storage:
    """The storage of a plain model's weights as `how` says.

    Raises:
        InputError: no weight has a name that `quantize.on` finds, or the group does not divide one's inputs.
    """
    if how.weights == "none":
        return Storage()
    sums = chosen(definition, how)

    def as_stored(path: Any, w: Any) -> Any:
        name = trees.path_str(path)
        if name not in sums:
            return w
        if how.aware:
            return weights.Rounded(w, sums[name], how.weights, how.group)
        quantized = weights.quantize(w, sums[name], how.weights, how.group)
        return (
            with_activation(quantized, sums[name], jnp.float32(1))
            if rounds_inputs(how, sums[name])
            else quantized
        )

    def rounded(params: Tree, parts: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(as_stored, params)

    def encode(key: jax.Array, plain: Tree) -> tuple[Tree, Tree]:
        return split(jax.tree_util.tree_map_with_path(as_stored, plain), how)

    def decode(params: Tree, parts: Tree) -> Tree:
        return join(params, parts, definition.plain_spec, how)

    return Storage(decode=rounded) if how.aware else Storage(_parts(how), encode, decode)


def rounds_inputs(how: Quantize, sums: tuple[int, ...]) -> bool:
    """True if a weight with these summed axes has its inputs quantized too: a product's, a convolution's."""
    return how.activations != "none" and sums in ((-2,), (-4, -3, -2))


def with_activation(w: weights.Quantized, sums: tuple[int, ...], scale: jax.Array) -> weights.Quantized:
    """`w` with a scale of its inputs for each of its leading dimensions (a stack's depth)."""
    lead = w.shape[: w.ndim + min(sums)]
    return dataclasses.replace(w, activation=jnp.broadcast_to(scale, lead))


def chosen(definition: Definition, how: Quantize) -> dict[str, tuple[int, ...]]:
    """Path -> summed axes, of the weights that are quantized. Raises as `storage`."""
    known = definition.products
    sums = {name: axes for name, axes in known.items() if re.search(how.on, "/" + name)}
    if not sums:
        raise InputError(
            f"quantize.on={how.on!r} finds no weight of this model; it has {', '.join(sorted(known))}"
        )
    if how.group:
        for name, w in trees.by_path(definition.plain_spec).items():
            inputs = w.shape[max(sums[name])] if name in sums else 0
            if inputs > how.group and inputs % how.group:
                raise InputError(
                    f"quantize.group={how.group} does not divide the {inputs} inputs of {name}; "
                    "choose a divisor, 0 for one scale an output, or leave the weight out with quantize.on"
                )
    return sums


def split(params: Tree, how: Quantize) -> tuple[Tree, Tree]:
    """Parameters, some of them `weights.Quantized` -> (the plain ones, {"codes", "scale", ...})."""
    flat = trees.by_path(params, _is_quantized)
    plain = {name: w for name, w in flat.items() if not _is_quantized(w)}
    parts = {
        part: trees.nest(
            {
                n: getattr(w, part)
                for n, w in flat.items()
                if _is_quantized(w) and getattr(w, part) is not None
            }
        )
        for part in _parts(how)
    }
    return trees.nest(plain), parts


def join(params: Tree, parts: Mapping[str, Tree], spec: Tree, how: Quantize) -> Tree:
    """The inverse of `split`."""
    flat = {part: trees.by_path(tree) for part, tree in {"params": params, **parts}.items()}

    def leaf(path: Any, spec: Any) -> Any:
        name = trees.path_str(path)
        if name in flat["params"]:
            return flat["params"][name]
        activation = flat.get("activation", {}).get(name)
        return weights.Quantized(
            flat["codes"][name], flat["scale"][name], activation, how.weights, spec.shape[-1]
        )  # fmt: skip

    return jax.tree_util.tree_map_with_path(leaf, spec)


def _parts(how: Quantize) -> tuple[str, ...]:
    return PARTS[: 2 + (how.activations != "none")]


def _is_quantized(x: Any) -> bool:
    return isinstance(x, weights.Quantized)
