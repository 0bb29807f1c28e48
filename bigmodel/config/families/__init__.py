"""Model families: one frozen dataclass each, the keys of `config.model`.

The modules that these describe are in bigmodel/models/. Nothing here imports JAX.
"""

from typing import Annotated

from bigmodel.config.families.base import LABEL_TASKS, TOKEN_TASKS, Family
from bigmodel.config.families.images import (
    CNN,
    GAN,
    MLP,
    RESNET_STAGES,
    VGG,
    VGG_STAGES,
    AlexNet,
    Detector,
    Inception,
    ResNet,
)
from bigmodel.config.families.recommenders import Recommender
from bigmodel.config.families.recurrent import RNN
from bigmodel.config.families.transformers import BERT, GPT, T5, Transformer, ViT

# One of these by its name, or a class of one's own (see parsing.build).
Model = Annotated[
    Family,
    GPT
    | BERT
    | T5
    | RNN
    | ViT
    | CNN
    | MLP
    | AlexNet
    | VGG
    | ResNet
    | Inception
    | GAN
    | Detector
    | Recommender,
]

__all__ = [
    "BERT",
    "CNN",
    "GAN",
    "GPT",
    "LABEL_TASKS",
    "MLP",
    "RESNET_STAGES",
    "RNN",
    "T5",
    "TOKEN_TASKS",
    "VGG",
    "VGG_STAGES",
    "AlexNet",
    "Detector",
    "Family",
    "Inception",
    "Model",
    "Recommender",
    "ResNet",
    "Transformer",
    "ViT",
]
