"""Definitions of models: a family's module, with storage, adapters and a teacher around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from bigmodel import mesh, trees
from bigmodel.config import Config, InputError
from bigmodel.models import distilled, lora, module, quantized


def define(
    config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], taught: Config | None = None
) -> module.Definition:
    """Returns the model of `config` for batches of `spec`; no array exists yet.

    Args:
        taught: the config of its teacher (`distill.teacher`); None: the model alone.
    """
    rules = mesh.rules_of(config)
    definition = _alone(config, spec, rules)
    return definition if taught is None else distilled.wrap(definition, _alone(taught, spec, rules), config)


def _alone(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rules: mesh.Rules) -> module.Definition:
    make = config.model.module()
    definition = module.define(lambda rngs: make(config, spec, rngs))
    empty = [path for path, x in trees.by_path(definition.params_spec).items() if 0 in x.shape]
    if empty:
        raise InputError(
            f"model.{', model.'.join(config.model.open_sizes)}: 0 makes {empty[0]} empty; set the size, or "
            "take it from the data by tasks.sized(config)"
        )
    definition = dataclasses.replace(definition, rules=rules)
    storage = lora.storage(definition, quantized.storage(definition, config.quantize), config.lora)
    return definition.stored(storage)
