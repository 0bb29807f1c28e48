"""Weights in fewer bits, of a trained model: config.quantize changes, and with it the Program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from bigmodel import mesh
from bigmodel.compress import recipe
from bigmodel.compress.trained import Trained, changed
from bigmodel.config import InputError, Quantize
from bigmodel.models import held, weights

GROUP = {"int4": 64}  # inputs that share a scale, unless the recipe says otherwise: 0.5 bit a weight


def apply(model: Trained, op: recipe.Quantize) -> Trained:
    """The model with its products' weights quantized, each to the nearest code.

    Raises:
        InputError: it is quantized already, or `held.chosen` refuses.
    """
    if model.config.quantize.weights != "none" and not model.config.quantize.aware:
        raise InputError(
            f"recipe step quantize: the model holds {model.config.quantize.weights} already; "
            "start from the dense one"
        )
    how = settings(op)
    sums = held.chosen(model.program.model, how)

    @jax.jit
    def quantized(params: Any) -> Any:
        def leaf(path: Any, w: jax.Array) -> Any:
            name = mesh.path_str(path)
            if name not in sums:
                return w
            search = how.weights == "int4"  # with so few codes, clipping the largest weights pays
            return weights.quantize(w, sums[name], how.weights, how.group, search)

        return held.split(jax.tree_util.tree_map_with_path(leaf, params), how)

    params, codes = quantized(model.params)
    return changed(model, model.config.replace(quantize=how), params, {**model.rest, **codes})


def settings(op: recipe.Quantize) -> Quantize:
    """The step's settings as `config.quantize`."""
    weights_kind: Any = {"w8a8": "int8"}.get(op.kind, op.kind)
    group = GROUP.get(op.kind, 0) if op.group == -1 else op.group
    how = Quantize(weights=weights_kind, group=group, activations="int8" if op.kind == "w8a8" else "none")
    return dataclasses.replace(how, on=op.on) if op.on else how
