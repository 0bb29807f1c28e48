"""Recurrent networks over tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

from bigmodel.config.families.base import LABEL_TASKS, Family, at_least_0, positive, rate


@dataclass(frozen=True)
class RNN(Family):
    """LSTM or GRU over tokens: a language model, or a classifier that reads the last state."""

    tasks = ("lm", *LABEL_TASKS)
    inputs = ("text",)
    made_by = "bigmodel.models.recurrent:RNN"
    walked_by = "bigmodel.compress.walks:rnn"
    units = MappingProxyType({"channels": ("width", "embed_width")})
    name: str = "rnn"
    cell: Literal["lstm", "gru"] = "lstm"
    depth: int = 2
    width: int = 512
    embed_width: int = 0  # 0: width
    vocab_size: int = 0  # 0: from data.tokenizer
    dropout: float = 0.0  # between the layers, not from step to step
    tie_embeddings: bool = False  # a language model's output layer is the embedding's table
    num_classes: int = 0  # of a classifier, or numbers of a regression; 0: from the data

    def resolve(self) -> Self:
        return dataclasses.replace(self, embed_width=self.embed_width or self.width)

    def flops_per_token(self, seq_len: int) -> float | None:
        """Training FLOPs per token of a language model: 6 for each weight of a matrix product."""
        gates = {"lstm": 4, "gru": 3}[self.cell]
        inputs = self.embed_width + (self.depth - 1) * self.width
        products = gates * self.width * (inputs + self.depth * self.width)
        products += (self.embed_width if self.tie_embeddings else self.width) * self.vocab_size
        if self.tie_embeddings and self.embed_width != self.width:
            products += self.width * self.embed_width
        return 6.0 * products

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "depth", "width", "embed_width")
        yield from at_least_0(self, "vocab_size", "num_classes")
        yield from rate(self)
