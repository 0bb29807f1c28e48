"""Definitions of models: a family's module, with storage, adapters and a teacher around it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import jax

from bigmodel import mesh, workdir
from bigmodel.config import Config
from bigmodel.models import distilled, module, quantized
from bigmodel.models.lora import wrap as with_adapters


def define(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct]) -> module.Definition:
    """The model of `config`, with its teacher if it has one, for batches of `spec`; no array exists yet."""
    rules = mesh.rules_of(config)
    definition = _alone(config, spec, rules)
    if not config.distill.teacher:
        return definition
    taught = workdir.read_config(pathlib.Path(config.distill.teacher))
    return distilled.wrap(definition, _alone(taught, spec, rules), config, taught)


def _alone(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rules: mesh.Rules) -> module.Definition:
    make = config.model.module()
    definition = module.define(lambda rngs: make(config, spec, rngs))
    definition = dataclasses.replace(definition, rules=rules)
    return with_adapters(quantized.wrap(definition, config.quantize), config.lora)
