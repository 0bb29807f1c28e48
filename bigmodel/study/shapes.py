"""Transformers of many sizes, evenly spaced in parameters, with depth, width and heads as published ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bigmodel.config import Config, InputError
from bigmodel.config.families import GPT

STEP = 1.25  # from one size to the next, in parameters
ASPECT = (
    32.0,
    128.0,
)  # width / depth: GPT-2 has 64, GPT-3 and Llama 128 (Kaplan et al. 2020, figure 5: no matter)
KEYS = ("depth", "width", "heads", "kv_heads", "head_dim", "mlp_width")


@dataclass(frozen=True)
class Shape:
    """A Transformer's size."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int

    def keys(self) -> dict[str, str]:
        """The settings that make it."""
        return {f"model.{key}": str(getattr(self, key)) for key in KEYS}

    def __str__(self) -> str:
        return f"depth {self.depth}, width {self.width}, {self.heads} heads"


def between(config: Config, least: float, most: float) -> list[Shape]:
    """Shapes like `config.model` with about `least` to `most` active parameters, the smallest first.

    Queries for a head of keys, and the MLP's width for the model's, are the config's.

    Raises:
        InputError: the model is no decoder-only Transformer.
    """
    model = config.model
    if not isinstance(model, GPT) or config.task.name != "lm":
        raise InputError(
            f"model.name={model.name} for task.name={config.task.name}: scaling laws predict the loss of gpt "
            "and lm; take such a config, as configs/gpt.py"
        )
    sized = sorted((parameters(model, config.seq_len, each), each.width, each) for each in _shapes(model))
    found: dict[int, Shape] = {}
    for count, _, shape in sized:
        if least <= count <= most:
            found.setdefault(round(math.log(count, STEP)), shape)
    return list(found.values())


def parameters(model: GPT, seq_len: int, shape: Shape) -> float:
    """Active parameters, nearly: no biases and norms."""
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    mlp = (3 if model.gated else 2) * shape.mlp_width * (model.experts_per_token if model.experts else 1)
    tables = model.vocab_size * (1 if model.tie_embeddings else 2)
    tables += seq_len if model.position == "learned" else 0
    return shape.width * (shape.depth * (heads + mlp) + tables)


def _shapes(model: GPT) -> Iterator[Shape]:
    per_key, wide = model.heads // model.kv_heads, model.mlp_width / model.width
    for width in _widths():
        head_dim = 128 if width >= 2048 else 64 if width >= 256 else 32
        heads = width // head_dim
        if heads % per_key:
            continue
        aspect = min(max(2 * math.sqrt(width), ASPECT[0]), ASPECT[1])
        mlp_width = max(round(wide * width / 64), 1) * 64
        for depth in sorted({max(round(width / aspect * share), 2) for share in (0.8, 1.0, 1.25)}):
            yield Shape(depth, width, heads, heads // per_key, head_dim, mlp_width)


def _widths() -> Iterator[int]:
    """Multiples of a head's size, about an eighth apart or as near as those are."""
    width = 32
    while width <= 32_768:
        yield width
        unit = 32 if width < 256 else 64 if width < 2048 else 256
        width += max(round(width / 8 / unit), 1) * unit
