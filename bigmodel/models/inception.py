"""Inception: GoogLeNet (v1) and Inception v3. Legend: B batch, H height, W width, C channels.

Both as torchvision has them: every convolution is without bias and followed by BatchNorm (eps 1e-3) and ReLU.
v1 (Szegedy et al. 2014, arXiv:1409.4842, table 1) has 3x3 where the paper has 5x5 convolutions, as in the
TensorFlow models that its parameter count is known by. v3 is Szegedy et al. 2015, arXiv:1512.00567, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel.config import Config
from bigmodel.config.families import Inception as InceptionConfig
from bigmodel.models import layers, module, ops
from bigmodel.models.vision import room

# A branch: layers (channels, size or (height, width) [, stride]), after a pool if it starts with one's name;
# its last item may be a fork, a tuple of branches.
Branch = Sequence[Any]

# A module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection. "M3", "M2": a max-pool of stride 2.
V1: list[str | tuple[int, int, int, int, int, int]] = [
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), "M3",
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), "M2",
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
]  # fmt: skip
V1_AUX = (2, 5)  # after which of the modules, pools not counted, an auxiliary classifier sits


def _v1(a: int, b: int, c: int, d: int, e: int, f: int) -> list[Branch]:
    return [[(a, 1)], [(b, 1), (c, 3)], [(d, 1), (e, 3)], ["max", (f, 1)]]


def _v3a(pool: int) -> list[Branch]:
    return [[(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], ["avg", (pool, 1)]]


def _v3b(c: int) -> list[Branch]:
    row, column = (1, 7), (7, 1)
    return [
        [(192, 1)],
        [(c, 1), (c, row), (192, column)],
        [(c, 1), (c, column), (c, row), (c, column), (192, row)],
        ["avg", (192, 1)],
    ]


def _v3c() -> list[Branch]:
    fork: tuple[Branch, ...] = ([(384, (1, 3))], [(384, (3, 1))])
    return [[(320, 1)], [(384, 1), fork], [(448, 1), (384, 3), fork], ["avg", (192, 1)]]


REDUCE_A: list[Branch] = [[(384, 3, 2)], [(64, 1), (96, 3), (96, 3, 2)], ["down"]]
REDUCE_B: list[Branch] = [
    [(192, 1), (320, 3, 2)], [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], ["down"],
]  # fmt: skip
V3 = [
    _v3a(32), _v3a(64), _v3a(64), REDUCE_A, _v3b(128), _v3b(160), _v3b(160), _v3b(192), REDUCE_B, _v3c(),
    _v3c(),
]  # fmt: skip
V3_AUX = 7  # the last of the 17x17 modules

POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "max": lambda x: ops.max_pool(x, (3, 3), (1, 1), "SAME"),
    "avg": lambda x: ops.avg_pool(x, (3, 3), (1, 1), "SAME"),
    "down": lambda x: ops.max_pool(x, (3, 3), (2, 2)),
    "M3": lambda x: ops.max_pool(x, (3, 3), (2, 2), _ceil(x, 3)),
    "M2": lambda x: ops.max_pool(x, (2, 2), (2, 2), _ceil(x, 2)),
}


def _ceil(x: jax.Array, size: int) -> ops.Padding:
    """Padding at the end that lets a pool of stride 2 see the last row and column."""
    below, right = ((-(-(n - size) // 2) * 2 + size - n) if n > size else size - n for n in x.shape[1:3])
    return ((0, below), (0, right))


class ConvNorm(nnx.Module):
    """Convolution, BatchNorm, ReLU; padded to the same size without stride, unpadded with one."""

    def __init__(
        self,
        i: int,
        o: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: ops.Padding | None = None,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        padding = padding or ("SAME" if stride == 1 else "VALID")
        self.conv = layers.Conv(
            i, o, size, stride=stride, padding=padding, bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = layers.BatchNorm(o, dtype=dtype, eps=1e-3)

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(x_BHWC), train))


class Module(nnx.Module):
    """Branches side by side, their channels joined; a branch may end in a fork of branches."""

    def __init__(self, i: int, branches: Sequence[Branch], scale: float, dtype: str, rngs: nnx.Rngs):
        self.pools, steps, self.channels = [], [], 0
        for branch in branches:
            width, pool = i, ""
            parts: list[nnx.Module] = []
            for item in branch:
                if isinstance(item, str):
                    pool = item
                elif isinstance(item[0], int):
                    o = _scaled(item[0], scale)
                    parts.append(ConvNorm(width, o, *item[1:], dtype=dtype, rngs=rngs))
                    width = o
                else:
                    fork = Module(width, item, scale, dtype, rngs)
                    parts.append(fork)
                    width = fork.channels
            self.pools.append(pool)
            steps.append(nnx.List(parts))
            self.channels += width
        self.branches = nnx.List(steps)

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        outs = []
        for pool, branch in zip(self.pools, self.branches, strict=True):
            y_BHWC = POOLS[pool](x_BHWC) if pool else x_BHWC
            for part in branch:
                y_BHWC = part(y_BHWC, train)
            outs.append(y_BHWC)
        return jnp.concatenate(outs, -1)


def _scaled(channels: int, scale: float) -> int:
    return max(round(channels * scale), 1)


class Aux(nnx.Module):
    """An auxiliary classifier: its convolutions on an averaged map, then dense layers."""

    def __init__(self, i: int, config: InceptionConfig, dtype: str, rngs: nnx.Rngs):
        def wide(n: int) -> int:
            return _scaled(n, config.multiplier)

        hidden: layers.Dense | None = None
        if config.version == "v1":  # mean to 4 x 4, 1x1, Dense + ReLU, dropout 0.7
            self.grid, first, last = 4, wide(128), wide(1024)
            self.convs = nnx.List([ConvNorm(i, first, 1, dtype=dtype, rngs=rngs)])
            flat = 16 * first
            hidden = layers.Dense(flat, last, std=math.sqrt(2 / flat), dtype=dtype, rngs=rngs)
        else:  # mean to 5 x 5, 1x1, 5x5
            self.grid, first, last = 5, wide(128), wide(768)
            self.convs = nnx.List(
                [
                    ConvNorm(i, first, 1, dtype=dtype, rngs=rngs),
                    ConvNorm(first, last, 5, padding="VALID", dtype=dtype, rngs=rngs),
                ]
            )
        self.hidden = hidden
        self.head = layers.Dense(last, config.num_classes, std=last**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, key: jax.Array | None) -> jax.Array:
        b, _, _, c = x_BHWC.shape
        shape = (b, self.grid, self.grid, c)
        x_BHWC = jax.image.resize(x_BHWC, shape, "linear", antialias=True)
        for conv in self.convs:
            x_BHWC = conv(x_BHWC, True)
        x_BD = x_BHWC.reshape(b, -1)
        if self.hidden is not None:
            x_BD = layers.dropout(jax.nn.relu(self.hidden(x_BD)), 0.7, key)
        return self.head(x_BD)


class Inception(nnx.Module):
    """batch: `image` float [B, H, W, C] -> {"logits": [B, classes] in the compute dtype, "aux_logits": in
    training, with `aux`, those of each auxiliary classifier}. The small stem has no stride and no pool.
    """

    def __init__(self, config: Config, spec: Mapping[str, jax.ShapeDtypeStruct], rngs: nnx.Rngs):
        assert isinstance(config.model, InceptionConfig)
        c, dtype = config.model, config.param_dtype
        self.compute_dtype, self.rate = config.compute_dtype, c.dropout
        _, height, width, i = spec["image"].shape
        smallest = {("v3", "imagenet"): 75, ("v3", "small"): 24, ("v1", "imagenet"): 32, ("v1", "small"): 8}
        room(config, min(height, width), smallest[c.version, c.stem])
        self.order: list[str] = []
        parts: list[nnx.Module] = []
        aux: list[nnx.Module] = []
        for item in order(c):
            self.order.append(item if isinstance(item, str) else "")
            if isinstance(item, tuple):
                o = _scaled(item[0], c.multiplier)
                parts.append(ConvNorm(i, o, *item[1:], dtype=dtype, rngs=rngs))
                i = o
            elif isinstance(item, list):
                part = Module(i, item, c.multiplier, dtype, rngs)
                parts.append(part)
                i = part.channels
            elif item == "aux":
                aux.append(Aux(i, c, dtype, rngs))
        self.parts, self.aux = nnx.List(parts), nnx.List(aux)
        self.head = layers.Dense(i, c.num_classes, std=i**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        x_BHWC = batch["image"].astype(self.compute_dtype)
        parts, aux = iter(self.parts), iter(self.aux)
        outs: list[jax.Array] = []
        for kind in self.order:
            if kind != "aux":
                x_BHWC = POOLS[kind](x_BHWC) if kind else next(parts)(x_BHWC, train)
            elif train:
                outs.append(
                    next(aux)(x_BHWC, None if key is None else jax.random.fold_in(key, len(outs) + 1))
                )
        x_BD = layers.dropout(ops.mean_pool(x_BHWC), self.rate, key)
        return module.read_out(self.head, x_BD) | {"aux_logits": outs}


def order(c: InceptionConfig) -> list[Any]:
    """The network from its first layer to its last: convolutions (channels, size, stride, padding), names of
    POOLS, modules (lists of branches), and "aux" where an auxiliary classifier reads what comes before."""
    v1, out, modules = c.version == "v1", [], 0
    for entry in V1 if v1 else V3:
        out.append(_v1(*entry) if isinstance(entry, tuple) else entry)
        if not isinstance(entry, str):
            out += ["aux"] if c.aux and modules in (V1_AUX if v1 else (V3_AUX,)) else []
            modules += 1
    return [*_stem(v1, c.stem == "small"), *out]


def _stem(v1: bool, small: bool) -> list[Any]:
    """Convolutions (channels, size, stride, padding) and pools before the first module."""
    down: list[Any] = [] if small else ["M3" if v1 else "down"]
    if v1:
        first = (64, 3, 1) if small else (64, 7, 2, ((3, 3), (3, 3)))
        return [first, *down, (64, 1), (192, 3), *down]
    valid, stride = "VALID", 1 if small else 2
    return [(32, 3, stride, valid), (32, 3, 1, valid), (64, 3), *down, (80, 1), (192, 3, 1, valid), *down]
