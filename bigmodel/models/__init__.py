"""Model families by the name that `config.model.name` gives them."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from bigmodel.config import Config
from bigmodel.models import (
    bert,
    detector,
    gan,
    gpt,
    held,
    inception,
    module,
    recurrent,
    resnet,
    t5,
    vision,
    vit,
)

FAMILIES = {
    "gpt": gpt.GPT,
    "bert": bert.BERT,
    "t5": t5.T5,
    "rnn": recurrent.RNN,
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
    """The model of `config` for batches of `spec`, before any array exists."""
    family = FAMILIES[config.model.name]
    return held.wrap(module.define(lambda rngs: family(config, spec, rngs)), config.quantize)
