"""Quantizes a trained model's weights: config.quantize changes, and with it the Program."""

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
from bigmodel.machines import chips
from bigmodel.models import quantized, rounding, weights

GROUP = {"int4": 64}  # inputs that share a scale, unless the recipe says otherwise: 0.5 bit a weight
WEIGHTS = {"w8a8": "int8"}  # by kind, where config.quantize.weights has another name
ACTIVATIONS = {"w8a8": "int8", "fp8": "fp8"}


def apply(model: Trained, step: recipe.QuantizeStep) -> Trained:
    """Quantizes the weights of matrix products: to the nearest code, or by GPTQ where a layer's inputs can
    be observed. For w8a8 and fp8, the largest input on the calibration batches sets the inputs' scale.

    Raises:
        InputError: the chip has no such number format, or `quantized.chosen` refuses.
    """
    config = model.config
    how = settings(step)
    check_chip(step)
    sums = quantized.chosen(model.program.model, how)
    rounded = [name for name, axes in sums.items() if quantized.rounds_inputs(how, axes)]
    if config.quantize.aware:  # back to the float model
        model = changed(model, config.replace(quantize=Quantize()), model.params, model.rest)
    grams = observe.inputs(model, list(sums), "gram") if step.method == "gptq" else {}
    if step.method == "gptq" and (others := sorted(sums.keys() - grams.keys())):
        log.say(f"quantize  GPTQ cannot observe the inputs of {', '.join(others)}: to the nearest code")
    largest = observe.inputs(model, rounded, "largest") if rounded else {}
    search = how.weights == "int4" and step.method != "aware"  # with so few codes, clipping the largest pays
    flat, new = trees.by_path(model.params), {}
    for name, axes in sums.items():
        if name in grams:
            w = _gptq(how.weights, how.group)(flat[name], grams[name])
        else:
            w = _nearest(axes, how.weights, how.group, search)(flat[name])
        if name in rounded:
            scale = largest.get(name, jnp.float32(1)) / rounding.LARGEST[how.weights]
            w = quantized.with_activation(w, axes, jnp.where(scale > 0, scale, 1.0))
        new[name] = w
    params, codes = quantized.split(trees.with_leaves(model.params, new), how)
    # Codes do not train, so pruned zeros need no mask any more.
    return changed(model, config.replace(quantize=how, prune=Prune()), params, {**model.rest, **codes})


def aware(model: Trained, step: recipe.QuantizeStep) -> Trained:
    """Returns the model with a config for quantization-aware training: floats, rounded at use."""
    how = dataclasses.replace(settings(step), aware=True)
    quantized.chosen(model.program.model, how)
    return changed(model, model.config.replace(quantize=how), model.params, model.rest)


@functools.cache
def _nearest(axes: tuple[int, ...], kind: str, group: int, search: bool) -> Any:
    return jax.jit(lambda w: weights.quantize(w, axes, kind, group, search))


@functools.cache
def _gptq(kind: str, group: int) -> Any:
    return jax.jit(lambda w, gram: solve.gptq(w, gram, kind, group))


def check_chip(step: recipe.QuantizeStep) -> None:
    """Raises InputError if this machine's chips have no units for the step's number format."""
    chip = chips.chip(jax.devices()[0])
    if step.kind == "fp8" and not chip.float8:
        raise InputError(
            f"recipe step quantize: this chip ({chip.name}) multiplies no float8; use int8, int4 or w8a8"
        )


def settings(step: recipe.QuantizeStep) -> Quantize:
    """Returns the step's settings as `config.quantize`."""
    group = GROUP.get(step.kind, 0) if step.group == -1 else step.group
    kind: Any = WEIGHTS.get(step.kind, step.kind)
    activations: Any = ACTIVATIONS.get(step.kind, "none")
    how = Quantize(weights=kind, group=group, activations=activations)
    return dataclasses.replace(how, on=step.on) if step.on else how
