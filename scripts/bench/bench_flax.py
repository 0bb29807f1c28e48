"""The models of scripts/bench/bench.py in idiomatic Flax NNX, by family: none of our array functions.

Each is called with a batch and gives logits where the task has targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigmodel.config import Config
from bigmodel.config.families import RESNET_STAGES

Batch = Mapping[str, Any]


class Block(nnx.Module):
    """The norm before attention and MLP (`pre`), or after."""

    def __init__(self, c: Any, rngs: nnx.Rngs, causal: bool) -> None:
        self.heads, self.causal, self.pre, self.tanh = c.heads, causal, c.norm_order == "pre", c.mlp == "gelu"
        self.norm1, self.norm2 = (nnx.LayerNorm(c.width, epsilon=c.norm_eps, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
        self.out = nnx.Linear(c.width, c.width, rngs=rngs)
        self.up = nnx.Linear(c.width, c.mlp_width, rngs=rngs)
        self.down = nnx.Linear(c.mlp_width, c.width, rngs=rngs)

    def attention(self, x: Any) -> Any:
        b, length, _ = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(b, length, 3 * self.heads, -1), 3, axis=2)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(b, length, -1))

    def mlp(self, x: Any) -> Any:
        return self.down(jax.nn.gelu(self.up(x), approximate=self.tanh))

    def __call__(self, x: Any) -> Any:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class GPT(nnx.Module):
    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        self.embed = nnx.Embed(c.vocab_size, c.width, rngs=rngs)
        self.positions = nnx.Embed(config.seq_len, c.width, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs, causal=True) for _ in range(c.depth)])
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)

    def __call__(self, batch: Batch) -> Any:
        x = self.embed(batch["tokens"]) + self.positions.embedding
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class BERT(nnx.Module):
    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        self.embed = nnx.Embed(c.vocab_size, c.width, rngs=rngs)
        self.positions = nnx.Embed(config.seq_len, c.width, rngs=rngs)
        self.types = nnx.Embed(c.token_types, c.width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(c.width, epsilon=c.norm_eps, rngs=rngs) for _ in range(2)])
        self.blocks = nnx.List([Block(c, rngs, causal=False) for _ in range(c.depth)])
        self.transform = nnx.Linear(c.width, c.width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(c.vocab_size))

    def __call__(self, batch: Batch) -> Any:
        tokens, at = batch["tokens"], batch["masked_positions"]
        x = self.norms[0](self.embed(tokens) + self.positions.embedding + self.types(jnp.zeros_like(tokens)))
        for block in self.blocks:
            x = block(x)
        x = jnp.take_along_axis(x, at[..., None], axis=1)
        x = self.norms[1](jax.nn.gelu(self.transform(x), approximate=False))
        return self.embed.attend(x) + self.bias


class ViT(nnx.Module):
    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        _, height, width, channels = batch["image"].shape
        patch = (c.patch, c.patch)
        self.embed = nnx.Conv(channels, c.width, patch, patch, padding="VALID", rngs=rngs)
        self.positions = nnx.Embed(height * width // c.patch**2, c.width, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs, causal=False) for _ in range(c.depth)])
        self.norm = nnx.LayerNorm(c.width, epsilon=c.norm_eps, rngs=rngs)
        self.head = nnx.Linear(c.width, c.num_classes, rngs=rngs)

    def __call__(self, batch: Batch) -> Any:
        x = self.embed(batch["image"])
        x = x.reshape(len(x), -1, x.shape[-1]) + self.positions.embedding
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class RNN(nnx.Module):
    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        self.embed = nnx.Embed(c.vocab_size, c.embed_width, rngs=rngs)
        widths = (c.embed_width, *(c.width,) * (c.depth - 1))
        cells = [nnx.OptimizedLSTMCell(i, c.width, rngs=rngs) for i in widths]
        self.layers = nnx.List([nnx.RNN(cell, rngs=rngs) for cell in cells])
        self.head = nnx.Linear(c.width, c.vocab_size, rngs=rngs)

    def __call__(self, batch: Batch) -> Any:
        x = self.embed(batch["tokens"])
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ConvNorm(nnx.Module):
    def __init__(self, i: int, o: int, size: int, rngs: nnx.Rngs, stride: int = 1) -> None:
        self.conv = nnx.Conv(i, o, (size, size), (stride, stride), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(o, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Residual(nnx.Module):
    def __init__(self, i: int, o: int, stride: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = ConvNorm(i, o, 3, rngs, stride), ConvNorm(o, o, 3, rngs)
        self.project = None if i == o and stride == 1 else ConvNorm(i, o, 1, rngs, stride)

    def __call__(self, x: Any) -> Any:
        y = self.second(jax.nn.relu(self.first(x)))
        return jax.nn.relu(y + (x if self.project is None else self.project(x)))


class ResNet(nnx.Module):
    """18 or 34 layers with the small stem."""

    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        self.stem, blocks, i = ConvNorm(batch["image"].shape[-1], c.channels[0], 3, rngs), [], c.channels[0]
        for stage, (o, count) in enumerate(zip(c.channels, RESNET_STAGES[c.depth], strict=True)):
            for index in range(count):
                blocks.append(Residual(i, o, 2 if stage and not index else 1, rngs))
                i = o
        self.blocks, self.head = nnx.List(blocks), nnx.Linear(i, c.num_classes, rngs=rngs)

    def __call__(self, batch: Batch) -> Any:
        x = jax.nn.relu(self.stem(batch["image"]))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class CNN(nnx.Module):
    def __init__(self, config: Config, batch: Batch, rngs: nnx.Rngs) -> None:
        c: Any = config.model
        _, height, width, channels = batch["image"].shape
        a, b = c.channels
        self.conv1 = nnx.Conv(channels, a, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(a, b, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(height * width // 4 * b, c.width, rngs=rngs)
        self.head = nnx.Linear(c.width, c.num_classes, rngs=rngs)

    def __call__(self, batch: Batch) -> Any:
        x = nnx.max_pool(jax.nn.relu(self.conv1(batch["image"])), (2, 2), (2, 2))
        x = jax.nn.relu(self.conv2(x))
        return self.head(jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1))))


MODELS: dict[str, Callable[[Config, Batch, nnx.Rngs], nnx.Module]] = {
    "gpt": GPT, "bert": BERT, "vit": ViT, "rnn": RNN, "resnet": ResNet, "cnn": CNN,
}  # fmt: skip
