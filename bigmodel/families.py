"""What shapes a model: one frozen dataclass for each family, the keys of `config.model`.

`resolve` fills in derived sizes, `problems` and `mesh_problems` yield (key, what is wrong and the fix).
The modules that these describe are in bigmodel/models/. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Transformer:
    """A stack of Transformer blocks. GPT-2 and Llama are settings of it; zeros mean "derived"."""

    name: str = "gpt"
    depth: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # grouped-query attention (Ainslie et al. 2023); 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    mlp_width: int = 0  # 0: 4 x width for gelu, 8/3 x width (up to a multiple of 128) for swiglu
    vocab_size: int = 264  # bytes need 257; a multiple of 8 can be sharded
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention_block: int = 0  # rows of a TPU attention kernel's block; 0: 512
    scan: bool = True  # one compiled block scanned over depth; False unrolls (same values)

    def resolve(self) -> Transformer:
        """Fills in the derived sizes (the zeros)."""
        mlp_width = 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 128) * 128
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // max(self.heads, 1),
            mlp_width=self.mlp_width or mlp_width,
        )

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("depth", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab_size"):
            if getattr(self, key) < 1:
                yield key, f"is {getattr(self, key)}: set it to 1 or more"
        if self.width % max(self.heads, 1) and self.head_dim == self.width // max(self.heads, 1):
            yield "heads", f"is {self.heads}, which does not divide model.width={self.width}; take a divisor"
        if self.heads % max(self.kv_heads, 1):
            yield (
                "kv_heads",
                f"is {self.kv_heads}, which does not divide model.heads={self.heads}; take a divisor",
            )
        if self.position == "rope" and self.head_dim % 2:
            yield "head_dim", f"is {self.head_dim}: rope needs an even one"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"is {self.dropout}: choose 0 <= dropout < 1"

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        for key in ("heads", "kv_heads"):
            if getattr(self, key) % tensor:
                yield key, f"is {getattr(self, key)}, which mesh.tensor={tensor} does not divide; lower that"


@dataclass(frozen=True)
class CNN:
    """Conv 3x3 + ReLU for each entry of `channels`, max-pool 2 after the first, then two dense layers."""

    name: str = "cnn"
    channels: tuple[int, ...] = (64, 128)
    width: int = 256
    num_classes: int = 10

    def resolve(self) -> CNN:
        return self

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.channels or min(self.channels) < 1:
            yield "channels", f"is {self.channels}: give one or more positive numbers, e.g. 64,128"
        for key in ("width", "num_classes"):
            if getattr(self, key) < 1:
                yield key, f"is {getattr(self, key)}: set it to 1 or more"

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        return ()


Model = Transformer | CNN
