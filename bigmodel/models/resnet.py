"""ResNet v1.5 (He et al. 2015, arXiv:1512.03385). Legend: B batch, H height, W width, C channels.

A bottleneck's stride is on its 3x3 convolution (v1.5, as torchvision and NVIDIA train it). The last BatchNorm
of each block starts with scale 0, so that a block starts as the identity (Goyal et al. 2017, section 5.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
from flax import nnx

from bigmodel.config import Config
from bigmodel.config.families import RESNET_STAGES
from bigmodel.config.families import ResNet as ResNetConfig
from bigmodel.models import layers, module, ops


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half its size, and BatchNorm."""

    def __init__(
        self, i: int, o: int, size: int, *, dtype: str, rngs: nnx.Rngs, stride: int = 1, scale: float = 1.0
    ):
        pad = (size // 2, size // 2)
        self.conv = layers.Conv(
            i, o, size, stride=stride, padding=(pad, pad), bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = layers.BatchNorm(o, dtype=dtype, scale=scale)

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        return self.norm(self.conv(x_BHWC), train)


class Block(nnx.Module):
    """relu(x + f(x)); f is two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels at the end."""

    def __init__(self, i: int, c: int, *, bottleneck: bool, stride: int, dtype: str, rngs: nnx.Rngs):
        o = 4 * c if bottleneck else c
        shapes = (
            [(i, c, 1, 1), (c, c, 3, stride), (c, o, 1, 1)]
            if bottleneck
            else ([(i, c, 3, stride), (c, o, 3, 1)])
        )
        self.convs = nnx.List(
            [
                ConvNorm(a, b, k, stride=s, dtype=dtype, rngs=rngs, scale=float(n < len(shapes)))
                for n, (a, b, k, s) in enumerate(shapes, 1)
            ]
        )
        same = stride == 1 and i == o
        self.project = None if same else ConvNorm(i, o, 1, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        y_BHWC = x_BHWC
        for index, conv in enumerate(self.convs):
            y_BHWC = conv(jax.nn.relu(y_BHWC) if index else y_BHWC, train)
        return jax.nn.relu(y_BHWC + (x_BHWC if self.project is None else self.project(x_BHWC, train)))


class ResNet(nnx.Module):
    """batch: `image` float [B, H, W, C] -> {"logits": [B, classes]} in the compute dtype.

    The small stem is a 3x3 convolution without stride and without pool (He et al. 2015, section 4.2).
    As a backbone (`trunk`) it ends after so many stages and has no head: only `stages` is called.
    """

    def __init__(
        self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs, trunk: int = 0
    ):
        assert isinstance(config.model, ResNetConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype, self.small = config.compute_dtype, c.stem == "small"
        size, stride = (3, 1) if self.small else (7, 2)
        channels = spec["image"].shape[-1]
        self.stem = ConvNorm(channels, c.channels[0], size, stride=stride, dtype=dtype, rngs=rngs)
        bottleneck, i = c.depth >= 50, c.channels[0]
        self.widths = tuple(4 * width if c.depth >= 50 else width for width in c.channels)
        counts = RESNET_STAGES[c.depth][: trunk or None]
        blocks, self.ends = [], (0, *itertools.accumulate(counts))
        for stage, (width, count) in enumerate(zip(c.channels, counts, strict=False)):
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(Block(i, width, bottleneck=bottleneck, stride=stride, dtype=dtype, rngs=rngs))
                i = 4 * width if bottleneck else width
        self.blocks = nnx.List(blocks)
        self.head = layers.Dense(i, c.num_classes, std=i**-0.5, dtype=dtype, rngs=rngs) if not trunk else None

    def stages(self, image_BHWC: jax.Array, train: bool) -> list[jax.Array]:
        """Outputs of the stages, each half as high and wide as the one before."""
        x_BHWC = jax.nn.relu(self.stem(image_BHWC.astype(self.compute_dtype), train))
        if not self.small:
            x_BHWC = ops.max_pool(x_BHWC, (3, 3), (2, 2), ((1, 1), (1, 1)))
        out = []
        for first, end in itertools.pairwise(self.ends):
            for index in range(first, end):
                x_BHWC = self.blocks[index](x_BHWC, train)
            out.append(x_BHWC)
        return out

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        assert self.head is not None
        return module.read_out(self.head, ops.mean_pool(self.stages(batch["image"], train)[-1]))
