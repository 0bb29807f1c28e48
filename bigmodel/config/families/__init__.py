"""What shapes each model family: one frozen dataclass each, the keys of `config.model`.

`resolve` fills in derived sizes, `problems` and `mesh_problems` yield (key, what is wrong and the fix).
The modules that these describe are in bigmodel/models/. Nothing here imports JAX.
"""

from bigmodel.config.families.base import LABEL_TASKS, TOKEN_TASKS
from bigmodel.config.families.images import (
    CNN,
    GAN,
    MLP,
    RESNET_STAGES,
    VGG,
    VGG_STAGES,
    AlexNet,
    Detector,
    ImageModel,
    Inception,
    ResNet,
)
from bigmodel.config.families.recommenders import Recommender
from bigmodel.config.families.recurrent import RNN
from bigmodel.config.families.transformers import BERT, GPT, T5, Transformer, ViT

Model = (
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
    | Recommender
)

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
    "ImageModel",
    "Inception",
    "Model",
    "Recommender",
    "ResNet",
    "Transformer",
    "ViT",
]
