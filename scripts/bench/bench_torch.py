"""The models of scripts/bench/bench.py as one writes them in PyTorch, by family; float32, no dropout.

Each is called with a batch's tensors and gives logits where the task has targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bigmodel.config import Config
from bigmodel.config.families import RESNET_STAGES

Batch = Mapping[str, Any]


class GPT(nn.Module):
    """The model of nanoGPT: fused attention, a tied head."""

    def __init__(self, config: Config, batch: Batch) -> None:
        super().__init__()
        c: Any = config.model
        self.embed, self.positions = _tables(c.vocab_size, config.seq_len, width=c.width)
        self.blocks = nn.Sequential(*(Block(c, causal=True) for _ in range(c.depth)))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, batch: Batch) -> Any:
        x = self.embed(batch["tokens"]) + self.positions.weight
        return self.norm(self.blocks(x)) @ self.embed.weight.T


class Block(nn.Module):
    """The norm before attention and MLP (`pre`), or after."""

    def __init__(self, c: Any, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.pre = c.heads, causal, c.norm_order == "pre"
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, c.norm_eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.up, self.down = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
        self.gelu = nn.GELU("tanh" if c.mlp == "gelu" else "none")

    def attention(self, x: Any) -> Any:
        b, length, d = x.shape
        q, k, v = (p.view(b, length, self.heads, -1).transpose(1, 2) for p in self.qkv(x).split(d, dim=2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, length, d))

    def mlp(self, x: Any) -> Any:
        return self.down(self.gelu(self.up(x)))

    def forward(self, x: Any) -> Any:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class BERT(nn.Module):
    """Encoder, and the head on the masked words alone."""

    def __init__(self, config: Config, batch: Batch) -> None:
        super().__init__()
        c: Any = config.model
        tables = _tables(c.vocab_size, config.seq_len, c.token_types, width=c.width)
        self.embed, self.positions, self.types = tables
        self.embed_norm, self.head_norm = (nn.LayerNorm(c.width, c.norm_eps) for _ in range(2))
        self.blocks = nn.Sequential(*(Block(c, causal=False) for _ in range(c.depth)))
        self.transform, self.head_bias = nn.Linear(c.width, c.width), nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, batch: Batch) -> Any:
        tokens, at = batch["tokens"], batch["masked_positions"]
        x = self.embed(tokens) + self.positions.weight + self.types(torch.zeros_like(tokens))
        x = self.blocks(self.embed_norm(x))
        x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        x = self.head_norm(nn.functional.gelu(self.transform(x)))
        return x @ self.embed.weight.T + self.head_bias


class ViT(nn.Module):
    """Patches by a convolution, their mean classified."""

    def __init__(self, config: Config, batch: Batch) -> None:
        super().__init__()
        c: Any = config.model
        _, height, width, channels = batch["image"].shape
        self.embed = nn.Conv2d(channels, c.width, c.patch, c.patch)
        (self.positions,) = _tables(height * width // c.patch**2, width=c.width)
        self.blocks = nn.Sequential(*(Block(c, causal=False) for _ in range(c.depth)))
        self.norm, self.head = nn.LayerNorm(c.width, c.norm_eps), nn.Linear(c.width, c.num_classes)

    def forward(self, batch: Batch) -> Any:
        x = self.embed(batch["image"]).flatten(2).transpose(1, 2) + self.positions.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


class RNN(nn.Module):
    """PyTorch's own LSTM. It has two biases where one is enough: the second stays zero."""

    def __init__(self, config: Config, batch: Batch) -> None:
        super().__init__()
        c: Any = config.model
        self.embed = nn.Embedding(c.vocab_size, c.embed_width)
        self.lstm = nn.LSTM(c.embed_width, c.width, c.depth, batch_first=True)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_hh"):
                nn.init.zeros_(bias).requires_grad_(False)
        self.head = nn.Linear(c.width, c.vocab_size)

    def forward(self, batch: Batch) -> Any:
        return self.head(self.lstm(self.embed(batch["tokens"]))[0])


class ConvNorm(nn.Sequential):
    def __init__(self, i: int, o: int, size: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(i, o, size, stride, size // 2, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(i, o, 3, stride), ConvNorm(o, o, 3)
        self.project = nn.Identity() if i == o and stride == 1 else ConvNorm(i, o, 1, stride)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.project(x))


class ResNet(nn.Module):
    """18 or 34 layers with the small stem, as torchvision writes it; BatchNorm in training mode."""

    def __init__(self, config: Config, batch: Batch) -> None:
        super().__init__()
        c: Any = config.model
        self.stem, blocks, i = ConvNorm(batch["image"].shape[-1], c.channels[0], 3), [], c.channels[0]
        for stage, (o, count) in enumerate(zip(c.channels, RESNET_STAGES[c.depth], strict=True)):
            for index in range(count):
                blocks.append(Residual(i, o, stride=2 if stage and not index else 1))
                i = o
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(i, c.num_classes)

    def forward(self, batch: Batch) -> Any:
        return self.head(self.blocks(torch.relu(self.stem(batch["image"]))).mean((2, 3)))


class CNN(nn.Sequential):
    def __init__(self, config: Config, batch: Batch) -> None:
        c: Any = config.model
        _, height, width, channels = batch["image"].shape
        a, b = c.channels
        super().__init__(
            nn.Conv2d(channels, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(height * width // 4 * b, c.width), nn.ReLU(), nn.Linear(c.width, c.num_classes),
        )  # fmt: skip

    def forward(self, batch: Batch) -> Any:
        return super().forward(batch["image"])


def _tables(*rows: int, width: int) -> list[nn.Embedding]:
    tables = [nn.Embedding(count, width) for count in rows]
    for table in tables:
        nn.init.normal_(table.weight, 0, 0.02)
    return tables


MODELS: dict[str, Callable[[Config, Batch], nn.Module]] = {
    "gpt": GPT, "bert": BERT, "vit": ViT, "rnn": RNN, "resnet": ResNet, "cnn": CNN,
}  # fmt: skip


def tensors(batch: Batch) -> dict[str, Any]:
    """A batch of numpy arrays as PyTorch's models take it: images channels first, whole numbers long."""
    out = {name: torch.from_numpy(x) for name, x in batch.items()}
    out = {name: x.long() if x.dtype == torch.int32 else x for name, x in out.items()}
    return out | ({"image": out["image"].permute(0, 3, 1, 2).contiguous()} if "image" in out else {})
