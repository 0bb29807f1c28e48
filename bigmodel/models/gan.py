"""Generative adversarial networks: DCGAN (Radford et al. 2015) and a ResNet GAN (Miyato et al. 2018).

One call while training gives all that both networks learn from, with gradients stopped so that one gradient
of one summed loss is each network's own: the discriminator never moves the generator, nor the other way.

Legend: B batch, H height, W width, C channels, D features, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel import config as config_lib
from bigmodel import mesh
from bigmodel.config import Config, InputError
from bigmodel.config.families import GAN as GANConfig
from bigmodel.models import layers, module, ops

Spec = Mapping[str, jax.ShapeDtypeStruct]


class GAN(nnx.Module):
    """batch: `image` float [B, H, W, C] in -1..1; with classes `label` int [B]; `serial` int [B].

    -> {"real": [B], "fake": [B]}, the discriminator's logits; while training also "judged" [B], the logits
    that teach the generator, and with task.gan_loss=wgan-gp "slope" [B], the norm of the critic's gradient
    between real and fake; in evaluation also "image", the fakes, each drawn from its example's serial number.
    """

    def __init__(self, config: Config, spec: Spec, rngs: nnx.Rngs):
        assert isinstance(config.model, GANConfig)
        assert isinstance(config.task, config_lib.GAN)
        c = self.c = config.model
        self.compute_dtype, self.wgan = config.compute_dtype, config.task.gan_loss == "wgan-gp"
        _, height, width, channels = spec["image"].shape
        levels = _levels(height, width)
        dc = c.arch == "dcgan"
        generator, discriminator = (DCGenerator, DCDiscriminator) if dc else (ResGenerator, ResDiscriminator)
        small, dtype = (height >> levels, width >> levels), config.param_dtype
        self.generator = generator(c, small, levels, channels, dtype, rngs)
        self.discriminator = discriminator(c, (height, width), levels, channels, dtype, rngs)

    def __call__(self, batch: module.Batch, *, key: jax.Array | None, train: bool) -> module.Outputs:
        real_BHWC = batch["image"].astype(self.compute_dtype)
        class_BK = jax.nn.one_hot(batch["label"], self.c.num_classes) if self.c.num_classes else None
        latent_key, mix_key = (None, None) if key is None else jax.random.split(key)
        z_BZ = self._latent(batch["serial"], latent_key).astype(self.compute_dtype)
        fake_BHWC = self.generator(z_BZ, class_BK, train)
        if not train:
            real_B, fake_B = (self.discriminator(x, class_BK, False) for x in (real_BHWC, fake_BHWC))
            return {"real": real_B, "fake": fake_B, "image": fake_BHWC}
        for layer in self.discriminator.spectral:
            layer.iterate()
        out = {"real": self.discriminator(real_BHWC, class_BK, True)}
        out["fake"], out["judged"] = _parted(self.discriminator, fake_BHWC, class_BK)
        if self.wgan:
            given_BHWC = jax.lax.stop_gradient(fake_BHWC)
            out["slope"] = self._slope(mix_key, real_BHWC, given_BHWC, class_BK)
        return out

    def _latent(self, serial_B: jax.Array, key: jax.Array | None) -> jax.Array:
        """Standard normal [B, Z]: of the step's key, or (no key) of each example's number alone."""
        if key is not None:
            return jax.random.normal(key, (*serial_B.shape, self.c.latent))
        shape = (self.c.latent,)
        draw = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(jax.random.key(0), n), shape))
        return mesh.shard(draw(serial_B), "batch", None)

    def _slope(self, key: Any, real_BHWC: jax.Array, fake_BHWC: jax.Array, class_BK: Any) -> jax.Array:
        """[B] norms of the critic's gradient at random points between real and fake (Gulrajani et al. 2017,
        algorithm 1)."""
        share_B111 = jax.random.uniform(key, (real_BHWC.shape[0], 1, 1, 1), real_BHWC.dtype)
        between_BHWC = share_B111 * real_BHWC + (1 - share_B111) * fake_BHWC
        graph, arrays = nnx.split(self.discriminator)

        def total(x_BHWC: jax.Array) -> jax.Array:
            return nnx.merge(graph, arrays)(x_BHWC, class_BK, True).astype(jnp.float32).sum()

        slope_BHWC = jax.grad(total)(between_BHWC).astype(jnp.float32)
        return jnp.sqrt(jnp.square(slope_BHWC).sum((1, 2, 3)) + 1e-12)


def _levels(height: int, width: int) -> int:
    """Number of times that the generator doubles its size, from 4 to 7 pixels.

    Raises:
        InputError: an odd size, or one below 8.
    """
    levels = next((n for n in range(12) if min(height, width) >> n < 8), 0)
    if not levels or height % 2**levels or width % 2**levels:
        raise InputError(
            f"model.name=gan needs images whose size halves down to 4..7 pixels, these have {height} x "
            f"{width}; set data.image_size, e.g. to 28, 32 or 64"
        )
    return levels


def _parted(discriminator: Any, x_BHWC: jax.Array, class_BK: jax.Array | None) -> tuple[Any, Any]:
    """The logits of x [B], twice, from one forward pass: the gradient of the first goes to the parameters
    alone, that of the second to x alone."""
    states: Any = nnx.split(discriminator, nnx.Param, ...)
    graph, params, rest = states
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def call(params: Any, x_BHWC: jax.Array, others: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, others[0])
        logit_B = model(x_BHWC, others[1], True)
        return logit_B, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    @jax.custom_vjp
    def both(params: Any, x_BHWC: jax.Array, others: Any) -> Any:
        logit_B, rest = call(params, x_BHWC, others)
        return logit_B, logit_B, rest

    def forward(params: Any, x_BHWC: jax.Array, others: Any) -> Any:
        run = lambda params, x_BHWC: call(params, x_BHWC, others)  # noqa: E731
        logit_B, back, rest = jax.vjp(run, params, x_BHWC, has_aux=True)
        return (logit_B, logit_B, rest), (back, others)

    def backward(residuals: Any, slopes: Any) -> Any:
        back, others = residuals
        return back(slopes[0])[0], back(slopes[1])[1], jax.tree.map(jnp.zeros_like, others)

    both.defvjp(forward, backward)
    fake_B, judged_B, rest = both(params, x_BHWC, (rest, class_BK))
    nnx.update(discriminator, rest)
    return fake_B, judged_B


# ------------------------------------------------------------------------------------------------- layers


class Spectral(nnx.Module):
    """A layer without bias whose kernel is divided by its largest singular value, and a bias.

    Miyato et al. 2018, algorithm 1: `u`, the left singular vector, is kept between steps and improved by one
    power iteration a step.
    """

    def __init__(self, layer: layers.Conv | layers.Dense, *, dtype: str, rngs: nnx.Rngs):
        self.layer = layer
        o = layer.kernel[...].shape[-1]
        self.bias = nnx.Param(jnp.zeros((o,), dtype))
        self.u = nnx.BatchStat(_unit(jax.random.normal(rngs.params(), (o,), jnp.float32)))

    def _matrix(self) -> jax.Array:
        kernel = self.layer.kernel[...]
        return kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])

    def iterate(self) -> None:
        w_IO = jax.lax.stop_gradient(self._matrix())
        self.u[...] = _unit(_unit(w_IO @ self.u[...]) @ w_IO)

    def __call__(self, x: jax.Array) -> jax.Array:
        sigma = jnp.sqrt(jnp.square(self._matrix() @ self.u[...]).sum() + 1e-12)
        return self.layer(x) * (1 / sigma).astype(x.dtype) + self.bias[...].astype(x.dtype)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum() + 1e-12)


class Upsample(nnx.Module):
    """Transposed convolution, 4x4, stride 2: x [B, H, W, I] -> [B, 2H, 2W, O].

    Each output pixel sees 2x2 inputs: so it is four convolutions, one for each parity of row and column.
    """

    def __init__(self, i: int, o: int, *, dtype: str, rngs: nnx.Rngs):
        std = (2 / (4 * i)) ** 0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (4, 4, i, o), dtype))

    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        kernel = mesh.shard(self.kernel[...].astype(x_BHWI.dtype), None, None, None, None)
        rows = [jnp.stack([self._part(x_BHWI, kernel, a, b) for b in (0, 1)], 3) for a in (0, 1)]
        y = jnp.stack(rows, 2)  # [B, H, 2, W, 2, O]
        b, h, _, w, _, o = y.shape
        return mesh.shard(y.reshape(b, 2 * h, 2 * w, o), "batch", None, None, None)

    def _part(self, x_BHWI: jax.Array, kernel: jax.Array, a: int, b: int) -> jax.Array:
        pads = ((1 - a, a), (1 - b, b))
        return ops.conv(x_BHWI, kernel[a::2, b::2], (1, 1), pads, mesh.platform())


def _conv(i: int, o: int, size: int, c: GANConfig, dtype: str, rngs: nnx.Rngs, **keys: Any) -> Any:
    """A discriminator's convolution: with spectral norm, or plain (without bias before BatchNorm)."""
    if c.norm == "spectral":
        conv = layers.Conv(i, o, size, dtype=dtype, rngs=rngs, bias=False, **keys)
        return Spectral(conv, dtype=dtype, rngs=rngs)
    return layers.Conv(i, o, size, dtype=dtype, rngs=rngs, bias=c.norm == "none", **keys)


class Verdict(nnx.Module):
    """Features [B, D] -> logits [B]; with classes plus their inner product with the class's own row, the
    projection of Miyato and Koyama 2018."""

    def __init__(self, d: int, c: GANConfig, dtype: str, rngs: nnx.Rngs):
        dense = layers.Dense(d, 1, std=d**-0.5, dtype=dtype, rngs=rngs, bias=c.norm == "none")
        self.dense = Spectral(dense, dtype=dtype, rngs=rngs) if c.norm == "spectral" else dense
        rows = c.num_classes
        self.rows = layers.Dense(rows, d, std=d**-0.5, dtype=dtype, rngs=rngs, bias=False) if rows else None

    def __call__(self, x_BD: jax.Array, class_BK: jax.Array | None) -> jax.Array:
        logit_B = self.dense(x_BD)[:, 0]
        if self.rows is None or class_BK is None:
            return logit_B
        return logit_B + (self.rows(class_BK.astype(x_BD.dtype)) * x_BD).sum(-1)


class Seed(nnx.Module):
    """Latent [B, Z], and the class, -> [B, h, w, C]."""

    def __init__(self, c: GANConfig, small: tuple[int, int], o: int, bias: bool, dtype: str, rngs: nnx.Rngs):
        self.shape = (*small, o)
        i = c.latent + c.num_classes
        self.dense = layers.Dense(i, math.prod(self.shape), std=i**-0.5, dtype=dtype, rngs=rngs, bias=bias)

    def __call__(self, z_BZ: jax.Array, class_BK: jax.Array | None) -> jax.Array:
        if class_BK is not None:
            z_BZ = jnp.concatenate([z_BZ, class_BK.astype(z_BZ.dtype)], -1)
        return mesh.shard(self.dense(z_BZ).reshape(-1, *self.shape), "batch", None, None, None)


# -------------------------------------------------------------------------------------------------- DCGAN


class DCGenerator(nnx.Module):
    """Radford et al. 2015, figure 1: ReLU and BatchNorm after the dense layer and between the transposed
    convolutions, whose channels halve as the size doubles; tanh."""

    def __init__(
        self, c: GANConfig, small: tuple[int, int], levels: int, channels: int, dtype: str, rngs: nnx.Rngs
    ):
        widths = [c.width << n for n in reversed(range(levels))]
        self.seed = Seed(c, small, widths[0], False, dtype, rngs)
        self.norms = nnx.List([layers.BatchNorm(o, dtype=dtype) for o in widths])
        sizes = zip(widths, [*widths[1:], channels], strict=True)
        self.ups = nnx.List([Upsample(i, o, dtype=dtype, rngs=rngs) for i, o in sizes])

    def __call__(self, z_BZ: jax.Array, class_BK: jax.Array | None, train: bool) -> jax.Array:
        x_BHWC = self.seed(z_BZ, class_BK)
        for norm, up in zip(self.norms, self.ups, strict=True):
            x_BHWC = up(jax.nn.relu(norm(x_BHWC, train)))
        return jnp.tanh(x_BHWC)


class DCDiscriminator(nnx.Module):
    """Radford et al. 2015: 4x4 convolutions of stride 2 and leaky ReLU; BatchNorm after all but the first."""

    def __init__(
        self, c: GANConfig, size: tuple[int, int], levels: int, channels: int, dtype: str, rngs: nnx.Rngs
    ):
        widths = [c.discriminator_width << n for n in range(levels)]
        keys: dict[str, Any] = {"stride": 2, "padding": ((1, 1), (1, 1))}
        sizes = zip([channels, *widths], widths, strict=False)
        self.convs = nnx.List([_conv(i, o, 4, c, dtype, rngs, **keys) for i, o in sizes])
        norms = [layers.BatchNorm(o, dtype=dtype) for o in widths[1:]] if c.norm == "batch" else []
        self.norms = nnx.List(norms)
        flat = (size[0] >> levels) * (size[1] >> levels) * widths[-1]
        self.verdict = Verdict(flat, c, dtype, rngs)

    @property
    def spectral(self) -> list[Spectral]:
        return [layer for layer in (*self.convs, self.verdict.dense) if isinstance(layer, Spectral)]

    def __call__(self, x_BHWC: jax.Array, class_BK: jax.Array | None, train: bool) -> jax.Array:
        for index, conv in enumerate(self.convs):
            x_BHWC = conv(x_BHWC)
            if index and len(self.norms):
                x_BHWC = self.norms[index - 1](x_BHWC, train)
            x_BHWC = jax.nn.leaky_relu(x_BHWC, 0.2)
        return self.verdict(x_BHWC.reshape(x_BHWC.shape[0], -1), class_BK)


# ------------------------------------------------------------------------------------------------- ResNet


def _double(x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    return jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _halve(x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class UpBlock(nnx.Module):
    """BatchNorm, ReLU, twice the size, 3x3; BatchNorm, ReLU, 3x3; beside it twice the size and 1x1."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.norms = nnx.List([layers.BatchNorm(width, dtype=dtype) for _ in range(2)])
        self.convs = nnx.List([layers.Conv(width, width, 3, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.project = layers.Conv(width, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        y_BHWC = self.convs[0](_double(jax.nn.relu(self.norms[0](x_BHWC, train))))
        y_BHWC = self.convs[1](jax.nn.relu(self.norms[1](y_BHWC, train)))
        return y_BHWC + _double(self.project(x_BHWC))


class ResGenerator(nnx.Module):
    """Miyato et al. 2018, table 4: a dense layer, blocks that double the size, BatchNorm, ReLU, 3x3, tanh."""

    def __init__(
        self, c: GANConfig, small: tuple[int, int], levels: int, channels: int, dtype: str, rngs: nnx.Rngs
    ):
        self.seed = Seed(c, small, c.width, True, dtype, rngs)
        self.blocks = nnx.List([UpBlock(c.width, dtype, rngs) for _ in range(levels)])
        self.norm = layers.BatchNorm(c.width, dtype=dtype)
        self.last = layers.Conv(c.width, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, z_BZ: jax.Array, class_BK: jax.Array | None, train: bool) -> jax.Array:
        x_BHWC = self.seed(z_BZ, class_BK)
        for block in self.blocks:
            x_BHWC = block(x_BHWC, train)
        return jnp.tanh(self.last(jax.nn.relu(self.norm(x_BHWC, train))))


class DownBlock(nnx.Module):
    """ReLU, 3x3, ReLU, 3x3 and half the size; beside it 1x1 and half the size. The first block of a network
    begins without ReLU; a block that keeps size and width adds its input as it is."""

    def __init__(self, i: int, c: GANConfig, down: bool, dtype: str, rngs: nnx.Rngs, first: bool = False):
        o = c.discriminator_width
        self.down, self.first = down, first
        self.convs = nnx.List([_conv(a, o, 3, c, dtype, rngs) for a in (i, o)])
        self.project = _conv(i, o, 1, c, dtype, rngs) if down or i != o else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = self.convs[0](x_BHWC if self.first else jax.nn.relu(x_BHWC))
        y_BHWC = self.convs[1](jax.nn.relu(y_BHWC))
        if not self.down:
            return y_BHWC + x_BHWC
        assert self.project is not None
        if self.first:
            return _halve(y_BHWC) + self.project(_halve(x_BHWC))
        return _halve(y_BHWC + self.project(x_BHWC))


class ResDiscriminator(nnx.Module):
    """Miyato et al. 2018, table 4: blocks that halve the size down to 8 pixels or fewer, two that do not,
    ReLU, the sum over pixels, and a dense layer."""

    def __init__(
        self, c: GANConfig, size: tuple[int, int], levels: int, channels: int, dtype: str, rngs: nnx.Rngs
    ):
        downs = next(n for n in range(1, levels + 1) if max(size) >> n <= 8 or n == levels)
        width = c.discriminator_width
        blocks = [DownBlock(channels, c, True, dtype, rngs, first=True)]
        blocks += [DownBlock(width, c, index < downs, dtype, rngs) for index in range(1, downs + 2)]
        self.blocks = nnx.List(blocks)
        self.verdict = Verdict(width, c, dtype, rngs)

    @property
    def spectral(self) -> list[Spectral]:
        inside = [layer for block in self.blocks for layer in (*block.convs, block.project)]
        return [layer for layer in (*inside, self.verdict.dense) if isinstance(layer, Spectral)]

    def __call__(self, x_BHWC: jax.Array, class_BK: jax.Array | None, train: bool) -> jax.Array:
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        sum_BD = jax.nn.relu(x_BHWC).astype(jnp.float32).sum((1, 2)).astype(x_BHWC.dtype)
        return self.verdict(sum_BD, class_BK)
