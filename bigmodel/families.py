"""What shapes a model: one frozen dataclass for each family, the keys of `config.model`.

`resolve` fills in derived sizes, `problems` and `mesh_problems` yield (key, what is wrong and the fix).
The modules that these describe are in bigmodel/models/. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

IMAGE_TASKS = ("classify", "multilabel", "regress")  # of one output an example
TOKEN_TASKS = ("lm", "mlm", "seq2seq")  # on sequences of seq_len tokens


def _positive(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    """Problems of keys that hold a positive number, or one or more of them."""
    for key in keys:
        value = getattr(model, key)
        if isinstance(value, tuple):
            if not value or min(value) < 1:
                yield key, f"is {value}: give one or more positive numbers, e.g. 64,128"
        elif value < 1:
            yield key, f"is {value}: set it to 1 or more"


def _rate(model: object, key: str = "dropout") -> Iterable[tuple[str, str]]:
    if not 0 <= getattr(model, key) < 1:
        yield key, f"is {getattr(model, key)}: choose 0 <= {key} < 1"


@dataclass(frozen=True)
class Transformer:
    """A stack of Transformer blocks, as every family below shapes it; zeros mean "derived"."""

    # The residual stream's width over mesh.tensor, too. Not in T5: there XLA (jax 0.10.2) computes wrong
    # gradients on data x fsdp x tensor, off by percents, without a word; a test holds this.
    STREAM_OVER_TENSOR: ClassVar[bool] = True
    INPUTS: ClassVar[tuple[str, ...]] = ("text",)
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
    attention_block: int = 0  # rows of a TPU attention kernel's block; 0: 512
    scan: bool = True  # one compiled block scanned over depth; False unrolls (same values)

    def resolve(self) -> Self:
        """Fills in the derived sizes (the zeros)."""
        gated = self.mlp in ("swiglu", "geglu")
        mlp_width = -(-8 * self.width // 3 // 128) * 128 if gated else 4 * self.width
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // max(self.heads, 1),
            mlp_width=self.mlp_width or mlp_width,
        )

    @property
    def expert_share(self) -> float:
        """Of an expert layer's parameters, the share that one token passes through."""
        return self.experts_per_token / self.experts if self.experts else 1.0

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "depth", "width", "heads", "kv_heads", "head_dim", "mlp_width")
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
        yield from _rate(self)
        yield from self._expert_problems()

    def _expert_problems(self) -> Iterable[tuple[str, str]]:
        for key in ("experts", "balance_loss", "router_z_loss"):
            if getattr(self, key) < 0:
                yield key, f"is {getattr(self, key)}: set it to 0 or more"
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            yield (
                "experts_per_token",
                f"is {self.experts_per_token}: choose 1 to model.experts={self.experts}",
            )
        if self.capacity_factor <= 0:
            yield "capacity_factor", f"is {self.capacity_factor}: set it above 0, such as 1.25"

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        for key in ("heads", "kv_heads"):
            if getattr(self, key) % tensor:
                yield key, f"is {getattr(self, key)}, which mesh.tensor={tensor} does not divide; lower that"


@dataclass(frozen=True)
class GPT(Transformer):
    """Decoder-only language model; GPT-2, Llama and Mixtral are settings of it."""

    TASKS = ("lm",)
    name: str = "gpt"
    vocab_size: int = 264  # bytes need 257; a multiple of 8 can be sharded
    position: Literal["learned", "rope"] = "learned"
    tie_embeddings: bool = True

    def attention_flops(self, seq_len: int) -> float:
        """Of training on one token, attention's scores and sums alone, nothing masked (PaLM, appendix B)."""
        return 12.0 * self.depth * self.heads * self.head_dim * seq_len

    def formula_flops(self, seq_len: int) -> float | None:
        """Of training on one token: 6 for each weight of a matrix product, and attention. None: experts."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.mlp in ("swiglu", "geglu") else 2) * self.width * self.mlp_width
        products = self.depth * (attention + mlp) + self.width * self.vocab_size
        return None if self.experts else 6.0 * products + self.attention_flops(seq_len)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "vocab_size")
        yield from super().problems()


@dataclass(frozen=True)
class BERT(Transformer):
    """Encoder with a masked-word head (Devlin et al. 2018)."""

    TASKS = ("mlm", *IMAGE_TASKS)
    name: str = "bert"
    vocab_size: int = 264  # [MASK] and [CLS] are its last two ids
    norm_eps: float = 1e-12
    norm_order: Literal["pre", "post"] = "post"
    position: Literal["learned", "rope"] = "learned"
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu_exact"
    token_types: int = 2  # a type for each sentence of a pair; 0: none
    pooler: bool = False  # Dense + tanh on the first position: what next-sentence prediction reads
    head: Literal["mlm", "none"] = "mlm"  # of the task mlm; none: the encoder alone
    num_classes: int = 2  # of a classifier, or numbers of a regression

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "vocab_size", "num_classes")
        yield from super().problems()
        if self.token_types < 0:
            yield "token_types", f"is {self.token_types}: set it to 0 or more"


@dataclass(frozen=True)
class T5(Transformer):
    """Encoder and decoder with relative positions (Raffel et al. 2020); `depth` is of each."""

    TASKS = ("seq2seq",)
    STREAM_OVER_TENSOR = False
    name: str = "t5"
    vocab_size: int = 384  # the sentinels are its last ids, counted down
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

    def resolve(self) -> Self:
        resolved = super().resolve()
        return dataclasses.replace(resolved, decoder_depth=self.decoder_depth or self.depth)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "vocab_size", "decoder_depth")
        yield from super().problems()
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            yield "relative_buckets", f"is {self.relative_buckets}: choose a multiple of 4"
        if self.relative_distance <= self.relative_buckets // 2:
            yield "relative_distance", f"is {self.relative_distance}: set it above half of relative_buckets"


@dataclass(frozen=True)
class ViT(Transformer):
    """Image classifier on patches (Dosovitskiy et al. 2020)."""

    INPUTS = ("image",)
    TASKS = IMAGE_TASKS
    name: str = "vit"
    patch: int = 4  # pixels a side
    pool: Literal["cls", "mean"] = "cls"  # what the classifier reads: an extra token, or the patches' mean
    num_classes: int = 10
    norm_eps: float = 1e-6
    position: Literal["learned"] = "learned"
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu_exact"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "patch", "num_classes")
        yield from super().problems()


@dataclass(frozen=True)
class RNN:
    """LSTM or GRU over tokens: a language model, or a classifier that reads the last state."""

    TASKS = ("lm", "classify")
    INPUTS = ("text",)
    name: str = "rnn"
    cell: Literal["lstm", "gru"] = "lstm"
    depth: int = 2
    width: int = 512
    embed_width: int = 0  # 0: width
    vocab_size: int = 264
    dropout: float = 0.0  # between the layers, not from step to step
    tie_embeddings: bool = False  # a language model's output layer is the embedding's table
    num_classes: int = 2  # of a classifier

    def resolve(self) -> Self:
        return dataclasses.replace(self, embed_width=self.embed_width or self.width)

    def formula_flops(self, seq_len: int) -> float | None:
        """Of training a language model on one token: 6 for each weight of a matrix product."""
        gates = {"lstm": 4, "gru": 3}[self.cell]
        inputs = self.embed_width + (self.depth - 1) * self.width
        products = gates * self.width * (inputs + self.depth * self.width)
        products += (self.embed_width if self.tie_embeddings else self.width) * self.vocab_size
        if self.tie_embeddings and self.embed_width != self.width:
            products += self.width * self.embed_width
        return 6.0 * products

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "depth", "width", "embed_width", "vocab_size", "num_classes")
        yield from _rate(self)

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        return ()


@dataclass(frozen=True)
class ImageModel:
    """An image classifier (or regressor) without derived sizes, whose sizes suit any mesh."""

    TASKS: ClassVar[tuple[str, ...]] = IMAGE_TASKS
    INPUTS: ClassVar[tuple[str, ...]] = ("image",)  # what of a dataset it can take; the first that is there

    def resolve(self) -> Self:
        return self

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        return ()


@dataclass(frozen=True)
class CNN(ImageModel):
    """Conv 3x3 + ReLU for each entry of `channels`, max-pool 2 after the first, then two dense layers."""

    name: str = "cnn"
    channels: tuple[int, ...] = (64, 128)
    width: int = 256
    num_classes: int = 10

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "channels", "width", "num_classes")


@dataclass(frozen=True)
class MLP(ImageModel):
    """Dense + ReLU for each entry of `widths`, then a dense layer to the classes."""

    INPUTS = ("image", "table")
    name: str = "mlp"
    widths: tuple[int, ...] = (512, 512)
    dropout: float = 0.0
    num_classes: int = 10
    rows: int = 0  # tables: categories over all columns, an unknown one for each among them
    embed_width: int = 16  # of a category

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "widths", "num_classes", "embed_width")
        yield from _rate(self)


Stem = Literal["imagenet", "small"]  # small: for images of 28 or 32 pixels, no early down-sampling


@dataclass(frozen=True)
class AlexNet(ImageModel):
    """Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks": one tower."""

    name: str = "alexnet"
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 192, 384, 256, 256)
    width: int = 4096  # of the two dense layers
    dropout: float = 0.5
    num_classes: int = 1000

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "channels", "width", "num_classes")
        if len(self.channels) != 5:
            yield "channels", f"is {self.channels}: AlexNet has five convolutions, give five numbers"
        yield from _rate(self)


@dataclass(frozen=True)
class VGG(ImageModel):
    """Simonyan and Zisserman 2014: stages of 3x3 convolutions, each ended by a max-pool."""

    name: str = "vgg"
    depth: int = 16  # 11, 13, 16, 19
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)  # of the stages
    width: int = 4096  # of the two dense layers
    batch_norm: bool = False
    dropout: float = 0.5
    num_classes: int = 1000

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.depth not in VGG_STAGES:
            yield "depth", f"is {self.depth}: choose one of {', '.join(map(str, VGG_STAGES))}"
        yield from _positive(self, "channels", "width", "num_classes")
        if len(self.channels) != 5:
            yield "channels", f"is {self.channels}: VGG has five stages, give five numbers"
        yield from _rate(self)


VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # table 1


@dataclass(frozen=True)
class ResNet(ImageModel):
    """He et al. 2015, v1.5: a bottleneck's stride is on its 3x3 convolution."""

    name: str = "resnet"
    depth: int = 50  # 10 (not in the paper), 18, 34 (basic blocks), 50, 101, 152 (bottlenecks)
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of the stages; a bottleneck gives out four times that
    num_classes: int = 1000

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.depth not in RESNET_STAGES:
            yield "depth", f"is {self.depth}: choose one of {', '.join(map(str, RESNET_STAGES))}"
        yield from _positive(self, "channels", "num_classes")
        if len(self.channels) != 4:
            yield "channels", f"is {self.channels}: ResNet has four stages, give four numbers"


RESNET_STAGES = {  # table 1; 10 is of later authors
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@dataclass(frozen=True)
class Inception(ImageModel):
    """GoogLeNet (Szegedy et al. 2014) with BatchNorm, or Inception v3 (Szegedy et al. 2015)."""

    name: str = "inception"
    version: Literal["v1", "v3"] = "v3"
    stem: Stem = "imagenet"
    multiplier: float = 1.0  # of every layer's channels
    aux: bool = False  # auxiliary classifiers while training; task.aux_weight is their weight
    dropout: float = 0.2
    num_classes: int = 1000

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "num_classes")
        if self.multiplier <= 0:
            yield "multiplier", f"is {self.multiplier}: set it above 0"
        yield from _rate(self)


@dataclass(frozen=True)
class GAN(ImageModel):
    """DCGAN (Radford et al. 2015), or a ResNet GAN (Miyato et al. 2018): a generator and a discriminator."""

    TASKS = ("gan",)
    name: str = "gan"
    arch: Literal["dcgan", "resnet"] = "dcgan"
    latent: int = 100  # numbers that an image is made from
    width: int = 64  # generator's channels: dcgan's last ones, doubled at each coarser size; resnet's all
    discriminator_width: int = 64  # likewise, dcgan's first ones
    norm: Literal["batch", "spectral", "none"] = "batch"  # of the discriminator; spectral: Miyato et al. 2018
    num_classes: int = 0  # above 0: both networks are told the class

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "latent", "width", "discriminator_width")
        if self.num_classes < 0:
            yield "num_classes", f"is {self.num_classes}: set it to 0 or more"
        if self.arch == "resnet" and self.norm == "batch":
            yield "norm", "is batch, which model.arch=resnet has no place for; set it to spectral or none"


@dataclass(frozen=True)
class Detector(ImageModel):
    """FCOS (Tian et al. 2019): boxes and classes at every place of a few grids, on a ResNet."""

    TASKS = ("detect",)
    name: str = "detector"
    depth: int = 50  # of the ResNet, and so are stem and channels
    stem: Stem = "imagenet"
    channels: tuple[int, ...] = (64, 128, 256, 512)
    levels: tuple[int, ...] = (2, 3, 4)  # stages that a grid is laid on, 1 to 4; the finest first
    width: int = 256  # channels of the feature pyramid and the heads
    head_depth: int = 4  # 3x3 convolutions in each of the two heads, before the last one
    num_classes: int = 80

    def backbone(self) -> ResNet:
        return ResNet(depth=self.depth, stem=self.stem, channels=self.channels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from place to place, of each grid."""
        return tuple((1 if self.stem == "small" else 4) << (stage - 1) for stage in self.levels)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self.backbone().problems()
        yield from _positive(self, "width", "head_depth", "num_classes")
        first = self.levels[0] if self.levels else 0
        if (
            self.levels != tuple(range(first, first + len(self.levels)))
            or not 1 <= first <= self.levels[-1] <= 4
        ):
            yield "levels", f"is {self.levels}: give stages in a row out of 1,2,3,4, such as 2,3,4"


@dataclass(frozen=True)
class Recommender:
    """Who likes what: `mf`, `ncf`, `two_tower` on ids of users and items; `dlrm` on rows of a table."""

    name: str = "recommender"
    kind: Literal["mf", "ncf", "two_tower", "dlrm"] = "mf"
    users: int = 1024  # rows of the users' table: one for whoever is unknown, then one for each user
    items: int = 512
    rows: int = 0  # dlrm: categories over all columns, an unknown one for each among them
    width: int = 16  # of an embedding (ncf: of its product part)
    widths: tuple[int, ...] = (64, 32, 16)  # ncf's network, each tower, dlrm's last network
    bottom: tuple[int, ...] = (64, 32)  # dlrm: hidden layers under the numbers
    temperature: float = 0.1  # two_tower: cosines are divided by it
    num_classes: int = 2  # dlrm

    @property
    def TASKS(self) -> tuple[str, ...]:
        return IMAGE_TASKS if self.kind == "dlrm" else ("rank",)

    @property
    def INPUTS(self) -> tuple[str, ...]:
        return ("table",)

    def resolve(self) -> Self:
        return self

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from _positive(self, "users", "items", "width", "widths", "num_classes")
        if self.bottom:
            yield from _positive(self, "bottom")
        if self.temperature <= 0:
            yield "temperature", f"is {self.temperature}: set it above 0, such as 0.1"

    def mesh_problems(self, tensor: int) -> Iterable[tuple[str, str]]:
        return ()


Model = (
    GPT
    | BERT
    | T5
    | RNN
    | ViT
    | CNN
    | MLP
    | AlexNet
    | VGG
    | ResNet
    | Inception
    | GAN
    | Detector
    | Recommender
)
