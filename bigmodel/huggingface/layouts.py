"""Maps our parameters to the tensors of Hugging Face files: one table a family, for both directions.

A row is (our path, their name, their form). {i} counts the blocks of a stack, which is one array with a
leading [depth] here; {j} those of a decoder; {e} counts experts, the next dimension.

Legend: I inputs, O outputs, H height, W width, P patch, C channels, D width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bigmodel.config import MLM, Config, families
from bigmodel.config.families import RESNET_STAGES

Change = Callable[[np.ndarray], np.ndarray]


class Form(NamedTuple):
    """Functions that write our array as theirs and read it back.

    With `pieces`, ours is one of several equal pieces of theirs along the last axis.
    """

    write: Change
    read: Change
    piece: int = 0
    pieces: int = 1


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)  # [I, O] here, [O, I] there
BACK = Form(lambda x: x[::-1], lambda x: x[::-1])  # two classes in the other order
TRANSPOSED_BACK = Form(lambda x: x.T[::-1], lambda x: x[::-1].T)
CONV = Form(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))  # HWIO here, OIHW there
ROW = Form(lambda x: x[None, None], lambda x: x[0, 0])  # [D] here, [1, 1, D] there
ROWS = Form(lambda x: x[None], lambda x: x[0])  # [N, D] here, [1, N, D] there
THIRDS = [Form(SAME.write, SAME.read, piece, 3) for piece in range(3)]  # GPT-2's fused q, k, v


def _patches(size: int) -> Form:
    """[P * P * C, D] here, a convolution's [D, C, P, P] there."""
    return Form(
        lambda x: x.reshape(size, size, -1, x.shape[-1]).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    )


Row = tuple[str, str, Form]


@dataclass(frozen=True)
class Layout:
    """The tensors of a family's files."""

    model_type: str
    architecture: str  # the transformers class that reads it
    rows: tuple[Row, ...]
    sizes: Mapping[str, int]  # the ranges of {i}, {j} and {e}
    prefix: str = ""  # that files of the bare model lack
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that some files repeat -> the original
    unused: str = r"(?!)"  # regex on tensors that the model does not need: counters, masks, frequencies

    def expand(self) -> Iterator[tuple[str, str, tuple[int, ...], Form]]:
        """Yields (our path, their name, index into our array, form) for every tensor."""
        for ours, theirs, form in self.rows:
            letters = re.findall(r"{(\w)}", theirs)
            for index in itertools.product(*(range(self.sizes[letter]) for letter in letters)):
                yield ours, theirs.format(**dict(zip(letters, index, strict=True))), index, form


def _dense(ours: str, theirs: str, bias: bool = True) -> list[Row]:
    rows = [(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED)]
    return [*rows, (f"{ours}/bias", f"{theirs}.bias", SAME)] if bias else rows


def _norm(ours: str, theirs: str, bias: bool = True) -> list[Row]:
    rows = [(f"{ours}/scale", f"{theirs}.weight", SAME)]
    return [*rows, (f"{ours}/bias", f"{theirs}.bias", SAME)] if bias else rows


def _gpt_head(c: families.GPT, classifies: bool, table: str) -> tuple[list[Row], dict[str, str], str]:
    """Returns its rows, the tensors that are copies of another, and the suffix of the class's name."""
    if classifies:
        return _dense("head", "score", bias=False), {}, "ForSequenceClassification"
    if c.tie_embeddings:
        return [], {"lm_head.weight": table}, "ForCausalLM"
    return _dense("head", "lm_head", bias=False), {}, "ForCausalLM"


def _gpt2(c: families.GPT, classifies: bool) -> Layout:
    h, block = "transformer.h.{i}", "blocks"
    rows: list[Row] = [
        ("embed/table", "transformer.wte.weight", SAME),
        ("positions/table", "transformer.wpe.weight", SAME),
        *_norm(f"{block}/attention_norm", f"{h}.ln_1"),
        *_norm(f"{block}/mlp_norm", f"{h}.ln_2"),
        *_norm("norm", "transformer.ln_f"),
    ]
    for name, third in zip("qkv", THIRDS, strict=True):
        rows.append((f"{block}/attention/{name}/kernel", f"{h}.attn.c_attn.weight", third))
        rows.append((f"{block}/attention/{name}/bias", f"{h}.attn.c_attn.bias", third))
    products = {"attention/out": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    for ours, theirs in products.items():  # stored [I, O], as here
        rows.append((f"{block}/{ours}/kernel", f"{h}.{theirs}.weight", SAME))
        rows.append((f"{block}/{ours}/bias", f"{h}.{theirs}.bias", SAME))
    head, copies, kind = _gpt_head(c, classifies, "transformer.wte.weight")
    return Layout(
        "gpt2", "GPT2" + kind.replace("ForCausalLM", "LMHeadModel"), (*rows, *head), {"i": c.depth},
        prefix="transformer.", copies=copies, unused=r"\.attn\.(bias|masked_bias)$",
    )  # fmt: skip


def _llama(c: families.GPT, classifies: bool) -> Layout:
    layer, block = "model.layers.{i}", "blocks"
    rows: list[Row] = [
        ("embed/table", "model.embed_tokens.weight", SAME),
        *_norm(f"{block}/attention_norm", f"{layer}.input_layernorm", bias=False),
        *_norm(f"{block}/mlp_norm", f"{layer}.post_attention_layernorm", bias=False),
        *_norm("norm", "model.norm", bias=False),
    ]
    for ours, theirs in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
        rows += _dense(f"{block}/attention/{ours}", f"{layer}.self_attn.{theirs}_proj", c.bias)
    if c.experts:
        moe = f"{layer}.block_sparse_moe"
        rows += _dense(f"{block}/mlp/router", f"{moe}.gate", bias=False)
        for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            rows += _dense(f"{block}/mlp/experts/{ours}", f"{moe}.experts.{{e}}.{theirs}", bias=False)
    else:
        for name in ("gate", "up", "down"):
            rows += _dense(f"{block}/mlp/{name}", f"{layer}.mlp.{name}_proj", c.bias)
    name = "Mixtral" if c.experts else "Llama"
    head, copies, kind = _gpt_head(c, classifies, "model.embed_tokens.weight")
    return Layout(
        name.lower(), name + kind, (*rows, *head), {"i": c.depth, "e": c.experts}, prefix="model.",
        copies=copies, unused=r"rotary_emb\.inv_freq$",
    )  # fmt: skip


def _bert(c: families.BERT, next_sentence: bool, classifies: bool, goes_on: int = 0) -> Layout:
    layer, block, tables = "bert.encoder.layer.{i}", "blocks", "bert.embeddings"
    rows: list[Row] = [
        ("embed/table", f"{tables}.word_embeddings.weight", SAME),
        ("positions/table", f"{tables}.position_embeddings.weight", SAME),
        ("types/table", f"{tables}.token_type_embeddings.weight", SAME),
        *_norm("embed_norm", f"{tables}.LayerNorm"),
        *_dense(f"{block}/attention/q", f"{layer}.attention.self.query"),
        *_dense(f"{block}/attention/k", f"{layer}.attention.self.key"),
        *_dense(f"{block}/attention/v", f"{layer}.attention.self.value"),
        *_dense(f"{block}/attention/out", f"{layer}.attention.output.dense"),
        *_norm(f"{block}/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *_dense(f"{block}/mlp/up", f"{layer}.intermediate.dense"),
        *_dense(f"{block}/mlp/down", f"{layer}.output.dense"),
        *_norm(f"{block}/mlp_norm", f"{layer}.output.LayerNorm"),
    ]
    if c.pooler:
        rows += _dense("pooler", "bert.pooler.dense")
    if classifies:
        rows += _dense("head", "classifier")
    elif c.head == "mlm":
        rows += _dense("transform", "cls.predictions.transform.dense")
        rows += _norm("transform_norm", "cls.predictions.transform.LayerNorm")
        rows.append(("head_bias", "cls.predictions.bias", SAME))
    if next_sentence:
        kernel, bias = (TRANSPOSED_BACK, BACK) if goes_on else (TRANSPOSED, SAME)
        rows.append(("next_sentence/kernel", "cls.seq_relationship.weight", kernel))
        rows.append(("next_sentence/bias", "cls.seq_relationship.bias", bias))
    mlm = c.head == "mlm" and not classifies
    name = "BertForPreTraining" if next_sentence else "BertForMaskedLM" if mlm else "BertModel"
    decoder = {
        "cls.predictions.decoder.weight": f"{tables}.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return Layout(
        "bert", "BertForSequenceClassification" if classifies else name, tuple(rows), {"i": c.depth},
        prefix="bert.", copies=decoder if mlm else {}, unused=r"embeddings\.position_ids$",
    )  # fmt: skip


def _t5(c: families.T5) -> Layout:
    rows: list[Row] = [("embed/table", "shared.weight", SAME)]
    for stack, letter in (("encoder", "i"), ("decoder", "j")):
        layer, block = f"{stack}.block.{{{letter}}}.layer", f"{stack}/blocks"
        parts = [("attention", f"{layer}.0.SelfAttention", f"{layer}.0.layer_norm")]
        if stack == "decoder":
            parts.append(("cross", f"{layer}.1.EncDecAttention", f"{layer}.1.layer_norm"))
        for ours, theirs, norm in parts:
            for name, other in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
                rows += _dense(f"{block}/{ours}/{name}", f"{theirs}.{other}", bias=False)
            rows += _norm(f"{block}/{ours}_norm", norm, bias=False)
        mlp = f"{layer}.{len(parts)}"
        plain, gated = {"up": "wi", "down": "wo"}, {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        for ours, theirs in (plain if c.mlp == "relu" else gated).items():
            rows += _dense(f"{block}/mlp/{ours}", f"{mlp}.DenseReluDense.{theirs}", bias=False)
        rows += _norm(f"{block}/mlp_norm", f"{mlp}.layer_norm", bias=False)
        rows += _norm(f"{stack}/norm", f"{stack}.final_layer_norm", bias=False)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append((f"{stack}_bias/buckets", bias, SAME))
    copies = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    return Layout(
        "t5", "T5ForConditionalGeneration",
        (*rows, *([] if c.tie_embeddings else _dense("head", "lm_head", bias=False))),
        {"i": c.depth, "j": c.decoder_depth},
        copies=copies | ({"lm_head.weight": "shared.weight"} if c.tie_embeddings else {}),
        unused=r"EncDecAttention\.relative_attention_bias\.weight$",
    )  # fmt: skip


def _vit(c: families.ViT) -> Layout:
    layer, block = "vit.encoder.layer.{i}", "blocks"
    rows: list[Row] = [
        ("first", "vit.embeddings.cls_token", ROW),
        ("positions/table", "vit.embeddings.position_embeddings", ROWS),
        ("embed/kernel", "vit.embeddings.patch_embeddings.projection.weight", _patches(c.patch)),
        ("embed/bias", "vit.embeddings.patch_embeddings.projection.bias", SAME),
        *_norm(f"{block}/attention_norm", f"{layer}.layernorm_before"),
        *_dense(f"{block}/attention/q", f"{layer}.attention.attention.query"),
        *_dense(f"{block}/attention/k", f"{layer}.attention.attention.key"),
        *_dense(f"{block}/attention/v", f"{layer}.attention.attention.value"),
        *_dense(f"{block}/attention/out", f"{layer}.attention.output.dense"),
        *_norm(f"{block}/mlp_norm", f"{layer}.layernorm_after"),
        *_dense(f"{block}/mlp/up", f"{layer}.intermediate.dense"),
        *_dense(f"{block}/mlp/down", f"{layer}.output.dense"),
        *_norm("norm", "vit.layernorm"),
        *_dense("head", "classifier"),
    ]
    return Layout("vit", "ViTForImageClassification", tuple(rows), {"i": c.depth}, prefix="vit.")


def _resnet(c: families.ResNet) -> Layout:
    def conv_norm(ours: str, theirs: str) -> list[Row]:
        statistics = {"mean": "running_mean", "var": "running_var"}
        rows = [(f"{ours}/conv/kernel", f"{theirs}.convolution.weight", CONV)]
        rows += _norm(f"{ours}/norm", f"{theirs}.normalization")
        return [
            *rows, *((f"{ours}/norm/{a}", f"{theirs}.normalization.{b}", SAME) for a, b in statistics.items())
        ]  # fmt: skip

    rows = conv_norm("stem", "resnet.embedder.embedder")
    bottleneck, i, number = c.depth >= 50, c.channels[0], 0
    for stage, (width, count) in enumerate(zip(c.channels, RESNET_STAGES[c.depth], strict=True)):
        for index in range(count):
            ours, theirs = f"blocks/{number}", f"resnet.encoder.stages.{stage}.layers.{index}"
            for k in range(3 if bottleneck else 2):
                rows += conv_norm(f"{ours}/convs/{k}", f"{theirs}.layer.{k}")
            o = 4 * width if bottleneck else width
            if i != o or (stage and not index):
                rows += conv_norm(f"{ours}/project", f"{theirs}.shortcut")
            i, number = o, number + 1
    rows += _dense("head", "classifier.1")
    return Layout(
        "resnet", "ResNetForImageClassification", tuple(rows), {}, prefix="resnet.",
        unused=r"\.num_batches_tracked$",
    )  # fmt: skip


def of(config: Config) -> Layout | None:
    """Returns the layout of `config.model`; None if transformers has no class for such a model."""
    c, classifies = config.model, config.task.one_output
    if isinstance(c, families.GPT):
        gpt2 = {"position": "learned", "norm": "layernorm", "bias": True, "kv_heads": c.heads, "experts": 0}
        if _has(c, gpt2, ACTIVATIONS) and c.head_dim * c.heads == c.width:
            return _gpt2(c, classifies)
        llama = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
        if _has(c, llama, ("swiglu",)) and not (c.experts and c.bias):
            return _llama(c, classifies)
    elif isinstance(c, families.BERT):
        bert = {"position": "learned", "norm": "layernorm", "bias": True, "norm_order": "post", "experts": 0}
        if _has(c, bert, ACTIVATIONS, "post") and c.token_types and c.head_dim * c.heads == c.width:
            task = config.task if isinstance(config.task, MLM) else MLM()
            return _bert(c, task.next_sentence and not classifies, classifies, task.goes_on)
    elif isinstance(c, families.T5):
        if _has(c, {"norm": "rmsnorm", "bias": False, "experts": 0}, T5_ACTIVATIONS) and not classifies:
            return _t5(c)
    elif isinstance(c, families.ViT):
        vit = {"norm": "layernorm", "bias": True, "pool": "cls", "experts": 0}
        if _has(c, vit, ACTIVATIONS) and c.head_dim * c.heads == c.width:
            return _vit(c)
    elif isinstance(c, families.ResNet) and c.stem == "imagenet":
        return _resnet(c)
    return None


# Our activation -> Hugging Face's name for it.
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}
T5_ACTIVATIONS = {"relu": "relu", "geglu": "gated-gelu", "swiglu": "gated-silu"}


def _has(
    c: families.Transformer, settings: Mapping[str, object], mlps: Collection[str], norm_order: str = "pre"
) -> bool:
    mine = all(vars(c)[key] == value for key, value in settings.items())
    same_heads = c.kv_heads == c.heads or isinstance(c, families.GPT)
    return mine and c.mlp in mlps and c.norm_order == norm_order and same_heads
