"""Model families by the name that `config.model.name` gives them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax

from bigmodel import workdir
from bigmodel.config import Config
from bigmodel.models import (
    bert,
    detector,
    distilled,
    gan,
    gpt,
    inception,
    module,
    quantized,
    recommender,
    recurrent,
    resnet,
    t5,
    vision,
    vit,
)
from bigmodel.models.lora import wrap as with_adapters

FAMILIES = {
    "gpt": gpt.GPT,
    "bert": bert.BERT,
    "t5": t5.T5,
    "rnn": recurrent.RNN,
    "recommender": recommender.make,
    "vit": vit.ViT,
    "cnn": vision.CNN,
    "mlp": vision.MLP,
    "alexnet": vision.AlexNet,
    "vgg": vision.VGG,
    "resnet": resnet.ResNet,
    "inception": inception.Inception,
    "gan": gan.GAN,
    "detector": detector.Detector,
}


def define(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct]) -> module.Definition:
    """The model of `config`, with its teacher if it has one, for batches of `spec`; no array exists yet."""
    definition = _alone(config, spec)
    if not config.distill.teacher:
        return definition
    taught = workdir.read_config(pathlib.Path(config.distill.teacher))
    return distilled.wrap(definition, _alone(taught, spec), config, taught)


def _alone(config: Config, spec: Mapping[str, jax.ShapeDtypeStruct]) -> module.Definition:
    family = FAMILIES[config.model.name]
    definition = quantized.wrap(module.define(lambda rngs: family(config, spec, rngs)), config.quantize)
    return with_adapters(definition, config.lora)
