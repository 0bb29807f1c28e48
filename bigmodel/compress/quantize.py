"""Weights in fewer bits, of a trained model: config.quantize changes, and with it the Program."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel import log, trees
from bigmodel.compress import observe, recipe, solve
from bigmodel.compress.trained import Trained, changed
from bigmodel.config import InputError, Prune, Quantize
from bigmodel.models import quantized, weights

GROUP = {"int4": 64}  # inputs that share a scale, unless the recipe says otherwise: 0.5 bit a weight
HELD = {"w8a8": "int8"}  # by kind, where the weights are not called so
ACTIVATIONS = {"w8a8": "int8", "fp8": "fp8"}
FLOAT8_CHIPS = ("NVIDIA H100", "NVIDIA H200", "NVIDIA B200", "NVIDIA GB200", "NVIDIA L4", "TPU7x")


def apply(model: Trained, op: recipe.Quantize) -> Trained:
    """The model with its products' weights quantized: each to the nearest code, or by GPTQ where the layer
    shows its inputs. For w8a8 and fp8 the inputs' scales come from the largest on the calibration batches.

    Raises:
        InputError: it is quantized already, the chip has no such units, or `held.chosen` refuses.
    """
    config = model.config
    if config.quantize.weights != "none" and not config.quantize.aware:
        raise InputError(
            f"recipe step quantize: the model holds {config.quantize.weights} already; "
            "start from the dense one"
        )
    how = settings(op)
    _check_chip(op)
    sums = quantized.chosen(model.program.model, how)
    rounded = [name for name, axes in sums.items() if quantized.rounds_inputs(how, axes)]
    if config.quantize.aware:  # the float model, whose weights are looked at
        model = changed(model, config.replace(quantize=Quantize()), model.params, model.rest)
    grams = observe.inputs(model, list(sums), "gram") if op.method == "gptq" else {}
    if op.method == "gptq" and (unseen := sorted(sums.keys() - grams.keys())):
        log.say(f"quantize  GPTQ sees no inputs of {', '.join(unseen)}: to the nearest code")
    largest = observe.inputs(model, rounded, "largest") if rounded else {}
    search = how.weights == "int4" and op.method != "aware"  # with so few codes, clipping the largest pays
    flat, new = trees.by_path(model.params), {}
    for name, axes in sums.items():
        if name in grams:
            w = _gptq(how.weights, how.group)(flat[name], grams[name])
        else:
            w = _nearest(axes, how.weights, how.group, search)(flat[name])
        if name in rounded:
            scale = largest.get(name, jnp.float32(1)) / weights.LARGEST[how.weights]
            w = quantized.with_activation(w, axes, jnp.where(scale > 0, scale, 1.0))
        new[name] = w
    params, codes = quantized.split(trees.with_leaves(model.params, new), how)
    # Codes do not train, so nothing has to keep their zeros.
    return changed(model, config.replace(quantize=how, prune=Prune()), params, {**model.rest, **codes})


def aware(model: Trained, op: recipe.Quantize) -> Trained:
    """The model with a config by which it trains on floats that are rounded wherever they are used."""
    how = dataclasses.replace(settings(op), aware=True)
    quantized.chosen(model.program.model, how)
    return changed(model, model.config.replace(quantize=how), model.params, model.rest)


@functools.cache
def _nearest(axes: tuple[int, ...], kind: str, group: int, search: bool) -> Any:
    return jax.jit(lambda w: weights.quantize(w, axes, kind, group, search))


@functools.cache
def _gptq(kind: str, group: int) -> Any:
    return jax.jit(lambda w, gram: solve.gptq(w, gram, kind, group))


def _check_chip(op: recipe.Quantize) -> None:
    kind = jax.devices()[0].device_kind
    if op.kind == "fp8" and not kind.startswith(FLOAT8_CHIPS):
        raise InputError(
            f"recipe step quantize: this chip ({kind}) multiplies no float8; use int8, int4 or w8a8"
        )


def settings(op: recipe.Quantize) -> Quantize:
    """The step's settings as `config.quantize`."""
    group = GROUP.get(op.kind, 0) if op.group == -1 else op.group
    kind: Any = HELD.get(op.kind, op.kind)
    activations: Any = ACTIVATIONS.get(op.kind, "none")
    how = Quantize(weights=kind, group=group, activations=activations)
    return dataclasses.replace(how, on=op.on) if op.on else how
