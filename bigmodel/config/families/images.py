"""Image models: classifiers, GANs, detectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

from bigmodel.config.families.base import Family, at_least_0, positive, rate


@dataclass(frozen=True)
class CNN(Family):
    """Conv 3x3 + ReLU for each entry of `channels`, max-pool 2 after the first, then two dense layers."""

    made_by = "bigmodel.models.vision:CNN"
    walked_by = "bigmodel.compress.walks:cnn"
    units = MappingProxyType({"channels": ("channels", "width")})
    name: str = "cnn"
    channels: tuple[int, ...] = (64, 128)
    width: int = 256
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "channels", "width")
        yield from at_least_0(self, "num_classes")


@dataclass(frozen=True)
class MLP(Family):
    """Dense + ReLU for each entry of `widths`, then a dense layer to the classes; without any, linear."""

    inputs = ("image", "table")
    made_by = "bigmodel.models.vision:MLP"
    walked_by = "bigmodel.compress.walks:mlp"
    units = MappingProxyType({"channels": ("widths",)})
    name: str = "mlp"
    widths: tuple[int, ...] = (512, 512)  # of the hidden layers; (): none, a linear model
    dropout: float = 0.0
    num_classes: int = 0  # 0: from the data
    rows: int = 0  # tables: categories over all columns, an unknown one for each; 0: from the data
    embed_width: int = 16  # of a category

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, *(("widths",) if self.widths else ()), "embed_width")
        yield from at_least_0(self, "num_classes", "rows")
        yield from rate(self)


Stem = Literal["imagenet", "small"]  # small: for images of 28 or 32 pixels, no early down-sampling


@dataclass(frozen=True)
class AlexNet(Family):
    """Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks": one tower."""

    made_by = "bigmodel.models.vision:AlexNet"
    walked_by = "bigmodel.compress.walks:alexnet"
    units = MappingProxyType({"channels": ("channels", "width")})
    name: str = "alexnet"
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 192, 384, 256, 256)
    width: int = 4096  # of the two dense layers
    dropout: float = 0.5
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "channels", "width")
        yield from at_least_0(self, "num_classes")
        if len(self.channels) != 5:
            yield "channels", f"is {self.channels}: AlexNet has five convolutions, give five numbers"
        yield from rate(self)


@dataclass(frozen=True)
class VGG(Family):
    """Simonyan and Zisserman 2014: stages of 3x3 convolutions, each ended by a max-pool."""

    made_by = "bigmodel.models.vision:VGG"
    walked_by = "bigmodel.compress.walks:vgg"
    units = MappingProxyType({"channels": ("channels", "width")})
    name: str = "vgg"
    depth: int = 16  # 11, 13, 16, 19
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)  # of the stages
    width: int = 4096  # of the two dense layers
    batch_norm: bool = False
    dropout: float = 0.5
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.depth not in VGG_STAGES:
            yield "depth", f"is {self.depth}: choose one of {', '.join(map(str, VGG_STAGES))}"
        yield from positive(self, "channels", "width")
        yield from at_least_0(self, "num_classes")
        if len(self.channels) != 5:
            yield "channels", f"is {self.channels}: VGG has five stages, give five numbers"
        yield from rate(self)


VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # table 1


@dataclass(frozen=True)
class ResNet(Family):
    """He et al. 2015, v1.5: a bottleneck's stride is on its 3x3 convolution."""

    made_by = "bigmodel.models.resnet:ResNet"
    walked_by = "bigmodel.compress.walks:resnet"
    units = MappingProxyType({"channels": ("channels",)})
    name: str = "resnet"
    depth: int = 50  # 10 (not in the paper), 18, 34 (basic blocks), 50, 101, 152 (bottlenecks)
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of the stages; a bottleneck gives out four times that
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.depth not in RESNET_STAGES:
            yield "depth", f"is {self.depth}: choose one of {', '.join(map(str, RESNET_STAGES))}"
        yield from positive(self, "channels")
        yield from at_least_0(self, "num_classes")
        if len(self.channels) != 4:
            yield "channels", f"is {self.channels}: ResNet has four stages, give four numbers"


RESNET_STAGES = {  # table 1; 10 is of later authors
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@dataclass(frozen=True)
class Inception(Family):
    """GoogLeNet (Szegedy et al. 2014) with BatchNorm, or Inception v3 (Szegedy et al. 2015)."""

    made_by = "bigmodel.models.inception:Inception"
    walked_by = "bigmodel.compress.walks:inception"
    units = MappingProxyType({"channels": ("multiplier",)})
    name: str = "inception"
    version: Literal["v1", "v3"] = "v3"
    stem: Stem = "imagenet"
    multiplier: float = 1.0  # of every layer's channels
    aux: bool = False  # auxiliary classifiers while training; task.aux_weight is their weight
    dropout: float = 0.2
    num_classes: int = 0  # 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "num_classes")
        if self.multiplier <= 0:
            yield "multiplier", f"is {self.multiplier}: set it above 0"
        yield from rate(self)


@dataclass(frozen=True)
class GAN(Family):
    """DCGAN (Radford et al. 2015), or a ResNet GAN (Miyato et al. 2018): a generator and a discriminator."""

    tasks = ("gan",)
    from_data = ()
    made_by = "bigmodel.models.gan:GAN"
    walked_by = "bigmodel.compress.walks:gan"
    units = MappingProxyType({"channels": ("width", "discriminator_width")})
    name: str = "gan"
    arch: Literal["dcgan", "resnet"] = "dcgan"
    latent: int = 100  # numbers that an image is made from
    width: int = 64  # generator's channels: dcgan's last ones, doubled at each coarser size; resnet's all
    discriminator_width: int = 64  # likewise, dcgan's first ones
    norm: Literal["batch", "spectral", "none"] = "batch"  # of the discriminator; spectral: Miyato et al. 2018
    num_classes: int = 0  # above 0: both networks are told the class

    @property
    def mixes_examples(self) -> bool:
        return self.norm == "batch"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "latent", "width", "discriminator_width")
        if self.num_classes < 0:
            yield "num_classes", f"is {self.num_classes}: set it to 0 or more"
        if self.arch == "resnet" and self.norm == "batch":
            yield "norm", "is batch, which model.arch=resnet has no place for; set it to spectral or none"


@dataclass(frozen=True)
class Detector(Family):
    """FCOS (Tian et al. 2019): boxes and classes at every place of a few grids, on a ResNet."""

    tasks = ("detect",)
    made_by = "bigmodel.models.detector:Detector"
    walked_by = "bigmodel.compress.walks:detector"
    units = MappingProxyType({"channels": ("channels", "groups")})
    name: str = "detector"
    depth: int = 50  # of the ResNet, and so are stem and channels
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 128, 256, 512)
    levels: tuple[int, ...] = (2, 3, 4)  # stages that a grid is laid on, 1 to 4; the finest first
    width: int = 256  # channels of the feature pyramid and the heads
    head_depth: int = 4  # 3x3 convolutions in each of the two heads, before the last one
    groups: int = 0  # of channels in a head's GroupNorm; 0: 8, or what of it divides the width
    num_classes: int = 0  # 0: from the data

    def resolve(self) -> Self:
        return dataclasses.replace(self, groups=self.groups or math.gcd(8, self.width))

    def backbone(self) -> ResNet:
        return ResNet(depth=self.depth, stem=self.stem, channels=self.channels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from place to place, of each grid."""
        return tuple((1 if self.stem == "small" else 4) << (stage - 1) for stage in self.levels)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self.backbone().problems()
        yield from positive(self, "width", "head_depth", "groups")
        yield from at_least_0(self, "num_classes")
        if self.groups > 0 and self.width % self.groups:
            yield (
                "groups",
                f"is {self.groups}, which does not divide model.width={self.width}; take a divisor",
            )
        first = self.levels[0] if self.levels else 0
        if (
            self.levels != tuple(range(first, first + len(self.levels)))
            or not 1 <= first <= self.levels[-1] <= 4
        ):
            yield "levels", f"is {self.levels}: give stages in a row out of 1,2,3,4, such as 2,3,4"
