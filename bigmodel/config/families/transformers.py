"""Keys of the Transformer stack, and of GPT, BERT, T5 and ViT, which are settings of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from bigmodel.config.families.base import LABEL_TASKS, Family, above_0, at_least_0, positive, rate


@dataclass(frozen=True)
class Transformer(Family):
    """A stack of Transformer blocks, as every family below shapes it; zeros mean "derived"."""

    inputs = ("text",)
    remats = True
    walked_by = "bigmodel.compress.walks:transformer"
    units = MappingProxyType({"heads": ("kv_heads",), "mlp": ("mlp_width",), "layers": ()})
    name: str = "transformer"
    depth: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # grouped-query attention (Ainslie et al. 2023); 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    mlp_width: int = 0  # 0: 4 x width, but 8/3 x width (up to a multiple of 128) for swiglu and geglu
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_order: Literal["pre", "post"] = "pre"  # x + f(norm(x)), or norm(x + f(x))
    position: Literal["learned", "rope", "relative"] = "learned"
    rope_theta: float = 10_000.0
    window: int = 0  # a token sees itself and so many before it, less one; 0: all (Beltagy et al. 2020)
    scale_attention: bool = True  # scores times 1 / sqrt(head_dim)
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu"  # gelu: the tanh approximation
    experts: int = 0  # mixture of experts in place of each MLP; 0: none
    experts_per_token: int = 2  # 1 as in Switch, 2 as in GShard and Mixtral
    capacity_factor: float = (
        1.25  # an expert's places in an example, times an even share; what is over is lost
    )
    balance_loss: float = 0.01  # weight of the load-balancing loss (Fedus et al. 2021, eq. 4)
    router_z_loss: float = 0.001  # weight of the router's z-loss (Zoph et al. 2022, eq. 5)
    bias: bool = True
    dropout: float = 0.0
    # muP (Yang et al. 2022, Tensor Programs V, table 8): the width at which optim.lr was tuned; 0: off
    mup_base_width: int = 0
    mup_base_head_dim: int = 0  # head_dim there; 0: as here, with fewer heads
    attention_block: int = 0  # rows of a TPU attention kernel's block; 0: 512
    scan: bool = True  # one compiled block scanned over depth; False unrolls (same values)

    def resolve(self) -> Self:
        """Fills in the derived sizes (the zeros)."""
        mlp_width = -(-8 * self.width // 3 // 128) * 128 if self.gated else 4 * self.width
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // max(self.heads, 1),
            mlp_width=self.mlp_width or mlp_width,
        )

    @property
    def gated(self) -> bool:
        """The MLP multiplies its hidden units by a second projection (Shazeer 2020)."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def mup_ratio(self) -> float:
        """muP's base width / width: the multiplier of the outputs, and of the rates of hidden weights."""
        return self.mup_base_width / self.width if self.mup_base_width else 1.0

    @property
    def rate_scales(self) -> Mapping[str, float]:
        hidden = r"(^|/)(blocks/.*|transform|pooler)/kernel$"  # their inputs and outputs grow with the width
        return {hidden: self.mup_ratio} if self.mup_ratio != 1 else {}

    @property
    def base_head_dim(self) -> int:
        return self.mup_base_head_dim or self.head_dim

    @property
    def score_scale(self) -> float | None:
        """Multiplier of q k in place of 1 / sqrt(head_dim); None: that. muP: 1 / head_dim, as at the base."""
        if self.base_head_dim == self.head_dim:
            return None if self.scale_attention else 1.0
        return (self.base_head_dim**0.5 if self.scale_attention else self.base_head_dim) / self.head_dim

    @property
    def expert_share(self) -> float:
        return self.experts_per_token / self.experts if self.experts else 1.0

    @property
    def cached_layers(self) -> int:
        return self.depth

    @property
    def attends(self) -> Mapping[str, Any] | None:
        return {}

    @property
    def stream(self) -> tuple[int, int]:
        return self.depth, self.width

    @property
    def stacks(self) -> Mapping[str, tuple[str, int]]:
        return {"depth": ("blocks", self.depth)}

    @property
    def divides(self) -> Mapping[str, Mapping[str, int]]:
        experts = {"expert": {"experts": self.experts}} if self.experts else {}
        return {**super().divides, "tensor": {"heads": self.heads, "kv_heads": self.kv_heads}, **experts}

    def activation_bytes(self, remat: str, size: int) -> tuple[float, float]:
        hidden = self.mlp_width * (2 if self.gated else 1)
        projections = (self.heads + 2 * self.kv_heads) * self.head_dim + 2 * self.width + hidden
        widths = {"full": self.width, "minimal": self.width + projections, "dots": self.width + projections}
        saved = widths.get(remat, 2 * self.width + 2 * projections)
        layer = 2 * projections + 2 * self.width
        return self.depth * saved * size, layer * size + self.vocab_size * (4 + size)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "depth", "width", "heads", "kv_heads", "head_dim", "mlp_width")
        if self.width % max(self.heads, 1) and self.head_dim == self.width // max(self.heads, 1):
            yield "heads", f"is {self.heads}, which does not divide model.width={self.width}; take a divisor"
        if self.heads % max(self.kv_heads, 1):
            yield (
                "kv_heads",
                f"is {self.kv_heads}, which does not divide model.heads={self.heads}; take a divisor",
            )
        if self.position == "rope" and self.head_dim % 2:
            yield "head_dim", f"is {self.head_dim}: rope needs an even one"
        if self.window < 0 or (self.window and self.name != "gpt"):
            yield "window", f"is {self.window}: set it to 0, or for model.name=gpt to 1 or more"
        yield from rate(self)
        yield from above_0(self, "norm_eps", "rope_theta")
        yield from positive(self, "experts_per_token")
        yield from at_least_0(self, "attention_block", "mup_base_width", "mup_base_head_dim")
        if self.mup_base_head_dim and not self.mup_base_width:
            yield "mup_base_head_dim", f"is {self.mup_base_head_dim}: set model.mup_base_width too, or 0"
        if self.mup_base_width and self.experts:
            yield "mup_base_width", f"is {self.mup_base_width}: no rule for experts is known; set it to 0"
        yield from self._expert_problems()

    def _expert_problems(self) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "experts", "balance_loss", "router_z_loss")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            yield (
                "experts_per_token",
                f"is {self.experts_per_token}: choose 1 to model.experts={self.experts}",
            )
        if self.capacity_factor <= 0:
            yield "capacity_factor", f"is {self.capacity_factor}: set it above 0, such as 1.25"


@dataclass(frozen=True)
class GPT(Transformer):
    """Decoder-only language model; GPT-2, Llama and Mixtral are settings of it."""

    tasks = ("lm", *LABEL_TASKS)
    made_by = "bigmodel.models.gpt:GPT"
    name: str = "gpt"
    vocab_size: int = 0  # 0: from data.tokenizer
    position: Literal["learned", "rope"] = "learned"
    tie_embeddings: bool = True
    num_classes: int = 0  # of a classifier, or numbers of a regression; 0: from the data

    def attention_flops(self, seq_len: int) -> float:
        """Training FLOPs per token of scores and sums, over all of the window (PaLM, appendix B)."""
        return 12.0 * self.depth * self.heads * self.head_dim * min(self.window or seq_len, seq_len)

    def flops_per_token(self, seq_len: int) -> float | None:
        """6 for each weight of a matrix product, and attention. None: experts."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.gated else 2) * self.width * self.mlp_width
        products = self.depth * (attention + mlp) + self.width * self.vocab_size
        return None if self.experts else 6.0 * products + self.attention_flops(seq_len)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "vocab_size", "num_classes")
        yield from super().problems()


@dataclass(frozen=True)
class BERT(Transformer):
    """Encoder with a masked-word head (Devlin et al. 2018)."""

    tasks = ("mlm", *LABEL_TASKS)
    starts = "cls"
    made_by = "bigmodel.models.bert:BERT"
    name: str = "bert"
    vocab_size: int = 0  # [MASK] and [CLS] are its last two ids; 0: from data.tokenizer
    norm_eps: float = 1e-12
    norm_order: Literal["pre", "post"] = "post"
    position: Literal["learned", "rope"] = "learned"
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu_exact"
    token_types: int = 2  # a type for each sentence of a pair; 0: none
    pooler: bool = False  # Dense + tanh on the first position: what next-sentence prediction reads
    head: Literal["mlm", "none"] = "mlm"  # of the task mlm; none: the encoder alone
    num_classes: int = 0  # of a classifier, or numbers of a regression; 0: from the data

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from at_least_0(self, "vocab_size", "num_classes")
        yield from super().problems()
        if self.token_types < 0:
            yield "token_types", f"is {self.token_types}: set it to 0 or more"


@dataclass(frozen=True)
class T5(Transformer):
    """Encoder and decoder with relative positions (Raffel et al. 2020); `depth` is of each."""

    tasks = ("seq2seq", *LABEL_TASKS)
    starts = ""
    made_by = "bigmodel.models.t5:T5"
    name: str = "t5"
    vocab_size: int = 0  # the sentinels are its last ids, counted down; 0: from data.tokenizer
    decoder_depth: int = 0  # 0: as deep as the encoder
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    position: Literal["relative"] = "relative"
    relative_buckets: int = 32
    relative_distance: int = 128  # from here on, all distances share a bucket
    scale_attention: bool = False
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "relu"  # v1.1: geglu
    bias: bool = False
    tie_embeddings: bool = True  # v1.1: false
    scale_output: bool = True  # a tied table's output is scaled by 1 / sqrt(width), as it is for the input
    num_classes: int = 0  # of a classifier, or numbers of a regression (the encoder's mean); 0: from the data

    @property
    def cached_layers(self) -> int:
        return self.decoder_depth

    @property
    def stacks(self) -> Mapping[str, tuple[str, int]]:
        return {
            "depth": ("encoder/blocks", self.depth),
            "decoder_depth": ("decoder/blocks", self.decoder_depth),
        }

    def resolve(self) -> Self:
        resolved = super().resolve()
        return dataclasses.replace(resolved, decoder_depth=self.decoder_depth or self.depth)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "decoder_depth")
        yield from at_least_0(self, "vocab_size", "num_classes")
        yield from super().problems()
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            yield "relative_buckets", f"is {self.relative_buckets}: choose a multiple of 4"
        if self.relative_distance <= self.relative_buckets // 2:
            yield "relative_distance", f"is {self.relative_distance}: set it above half of relative_buckets"


@dataclass(frozen=True)
class ViT(Transformer):
    """Image classifier on patches (Dosovitskiy et al. 2020)."""

    inputs = ("image",)
    tasks = LABEL_TASKS
    made_by = "bigmodel.models.vit:ViT"
    name: str = "vit"
    patch: int = 4  # pixels a side
    pool: Literal["cls", "mean"] = "cls"  # what the classifier reads: an extra token, or the patches' mean
    num_classes: int = 0  # 0: from the data
    norm_eps: float = 1e-6
    position: Literal["learned"] = "learned"
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu_exact"

    @property
    def attends(self) -> Mapping[str, Any] | None:
        return {"patch": self.patch, "pool": self.pool}

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "patch")
        yield from at_least_0(self, "num_classes")
        yield from super().problems()
