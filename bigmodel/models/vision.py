"""Plain stacks: MLP, CNN, AlexNet and VGG. Legend: B batch, H height, W width, C channels, D features.

Each (except a table's MLP) maps `image` float [B, H, W, C] -> {"logits": [B, classes]}, in the compute dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel.config import Config, InputError
from bigmodel.config.families import CNN as CNNConfig
from bigmodel.config.families import MLP as MLPConfig
from bigmodel.config.families import VGG as VGGConfig
from bigmodel.config.families import VGG_STAGES
from bigmodel.config.families import AlexNet as AlexNetConfig
from bigmodel.models import embedding, layers, module, ops


class CNN(nnx.Module):
    """Conv 3x3 + ReLU for each entry of `channels`, max-pool 2 after the first; Dense + ReLU; Dense."""

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        assert isinstance(config.model, CNNConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype = config.compute_dtype
        _, height, width, channels = spec["image"].shape
        sizes = zip((channels, *c.channels), c.channels, strict=False)
        self.convs = nnx.List([layers.Conv(i, o, 3, dtype=dtype, rngs=rngs) for i, o in sizes])
        flat = (height // 2) * (width // 2) * c.channels[-1]
        self.hidden = layers.Dense(flat, c.width, std=math.sqrt(2 / flat), dtype=dtype, rngs=rngs)
        self.head = layers.Dense(c.width, c.num_classes, std=c.width**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        x_BHWC = batch["image"].astype(self.compute_dtype)
        for index, conv in enumerate(self.convs):
            x_BHWC = jax.nn.relu(conv(x_BHWC))
            if index == 0:
                x_BHWC = ops.max_pool(x_BHWC, (2, 2), (2, 2))
        x_BD = x_BHWC.reshape(x_BHWC.shape[0], -1)
        return module.read_out(self.head, jax.nn.relu(self.hidden(x_BD)))


Spec = Mapping[str, jax.ShapeDtypeStruct]


def room(config: Config, size: int, smallest: int) -> None:
    """Raises InputError for images that a network would shrink to nothing."""
    if size < smallest:
        raise InputError(
            f"model.name={config.model.name} as set needs images of {smallest} pixels or more, these have "
            f"{size}; set data.image_size={smallest} or more, or model.stem=small where there is one"
        )


class Classifier(nnx.Module):
    """x [B, D] -> {"logits"}: Dense + ReLU for each of `widths`, Dense to the classes.

    Dropout comes after each hidden layer, or (`first`) before it.
    """

    def __init__(
        self,
        i: int,
        widths: tuple[int, ...],
        classes: int,
        rate: float,
        dtype: str,
        rngs: nnx.Rngs,
        *,
        first: bool = False,
    ):
        self.rate, self.first = rate, first
        sizes = zip((i, *widths), widths, strict=False)
        self.layers = nnx.List(
            [layers.Dense(a, b, std=math.sqrt(2 / a), dtype=dtype, rngs=rngs) for a, b in sizes]
        )
        std = widths[-1] ** -0.5 if widths else 0.0  # a linear model needs no start that differs
        self.head = layers.Dense((i, *widths)[-1], classes, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BD: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
        for index, dense in enumerate(self.layers):
            drop = functools.partial(
                layers.dropout, rate=self.rate, key=None if key is None else jax.random.fold_in(key, index)
            )
            x_BD = jax.nn.relu(dense(drop(x_BD))) if self.first else drop(jax.nn.relu(dense(x_BD)))
        return module.read_out(self.head, x_BD)


class MLP(nnx.Module):
    """Dense + ReLU and dropout for each entry of `widths`; Dense. Without any it is linear.

    batch: `image`, or a table's `numeric` [B, N] and `categorical` [B, C], whose embeddings join the numbers.
    """

    def __init__(self, config: Config, spec: Spec, rngs: nnx.Rngs):
        assert isinstance(config.model, MLPConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype = config.compute_dtype
        table = functools.partial(embedding.TableInputs, c.rows, c.embed_width, spec, dtype=dtype, rngs=rngs)
        self.table = None if "image" in spec else table()
        if self.table is None:
            flat = math.prod(spec["image"].shape[1:])
        else:
            flat = self.table.numbers + self.table.categories * c.embed_width
        self.classifier = Classifier(flat, c.widths, c.num_classes, c.dropout, dtype, rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        if self.table is None:
            x_BHWC = batch["image"].astype(self.compute_dtype)
            return self.classifier(x_BHWC.reshape(x_BHWC.shape[0], -1), key)
        parts = [x.reshape(x.shape[0], -1) for x in self.table(batch, self.compute_dtype) if x is not None]
        return self.classifier(jnp.concatenate(parts, 1), key)


class AlexNet(nnx.Module):
    """Krizhevsky 2014 (arXiv:1404.5997), as torchvision: five convolutions, three pools, three dense layers.

    Dropout comes before each hidden dense layer. The small stem is a 5x5 convolution without stride, and
    pools of 2 without overlap.
    """

    def __init__(self, config: Config, spec: Spec, rngs: nnx.Rngs):
        assert isinstance(config.model, AlexNetConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype, self.small = config.compute_dtype, c.stem == "small"
        _, height, width, channels = spec["image"].shape
        room(config, min(height, width), 8 if self.small else 63)
        first = (5, 1, 2) if self.small else (11, 4, 2)
        shapes = [first, (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
        ins = (channels, *c.channels)
        self.convs = nnx.List(
            [
                layers.Conv(i, o, k, stride=s, padding=((p, p), (p, p)), dtype=dtype, rngs=rngs)
                for i, o, (k, s, p) in zip(ins, c.channels, shapes, strict=False)
            ]
        )
        flat = math.prod(self._size(n) for n in (height, width)) * c.channels[-1]
        self.classifier = Classifier(
            flat, (c.width, c.width), c.num_classes, c.dropout, dtype, rngs, first=True
        )

    def _size(self, n: int) -> int:
        """Height or width of what the convolutions give out."""
        n = n if self.small else (n + 4 - 11) // 4 + 1
        for _ in range(3):
            n = n // 2 if self.small else (n - 3) // 2 + 1
        return n

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        x_BHWC = batch["image"].astype(self.compute_dtype)
        window = (2, 2) if self.small else (3, 3)
        for index, conv in enumerate(self.convs):
            x_BHWC = jax.nn.relu(conv(x_BHWC))
            if index in (0, 1, 4):
                x_BHWC = ops.max_pool(x_BHWC, window, (2, 2))
        return self.classifier(x_BHWC.reshape(x_BHWC.shape[0], -1), key)


class VGG(nnx.Module):
    """Simonyan and Zisserman 2014 (arXiv:1409.1556), table 1: A, B, D, E by depth; BatchNorm if asked for."""

    def __init__(self, config: Config, spec: Spec, rngs: nnx.Rngs):
        assert isinstance(config.model, VGGConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype, self.stages = config.compute_dtype, VGG_STAGES[c.depth]
        _, height, width, i = spec["image"].shape
        room(config, min(height, width), 32)
        convs, norms = [], []
        for o, count in zip(c.channels, self.stages, strict=True):
            for _ in range(count):
                convs.append(layers.Conv(i, o, 3, dtype=dtype, rngs=rngs))
                norms.append(layers.BatchNorm(o, dtype=dtype))
                i = o
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms) if c.batch_norm else None
        flat = (height // 32) * (width // 32) * i
        self.classifier = Classifier(flat, (c.width, c.width), c.num_classes, c.dropout, dtype, rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        x_BHWC = batch["image"].astype(self.compute_dtype)
        at = 0
        for count in self.stages:
            for index in range(at, at + count):
                x_BHWC = self.convs[index](x_BHWC)
                if self.norms is not None:
                    x_BHWC = self.norms[index](x_BHWC, train)
                x_BHWC = jax.nn.relu(x_BHWC)
            at += count
            x_BHWC = ops.max_pool(x_BHWC, (2, 2), (2, 2))
        return self.classifier(x_BHWC.reshape(x_BHWC.shape[0], -1), key)
