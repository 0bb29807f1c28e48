"""Converts a Hugging Face config.json to our config, and back.

`KEYS` lists the values that both sides have under different names; a function per family and direction does
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bigmodel.config import Config, InputError, families
from bigmodel.config.families import RESNET_STAGES
from bigmodel.huggingface import known, names
from bigmodel.huggingface.layouts import ACTIVATIONS, T5_ACTIVATIONS, Layout

HF = Mapping[str, Any]  # a config.json
Tree = dict[str, Any]  # our config, as `config.from_dict` takes it

# model_type -> {their key: (our key, the default if config.json lacks it; None: it must be there)}
KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {
        "n_layer": ("depth", None), "n_embd": ("width", None), "n_head": ("heads", None),
        "vocab_size": ("vocab_size", None), "layer_norm_epsilon": ("norm_eps", 1e-5),
        "resid_pdrop": ("dropout", 0.1),
    },
    "llama": {
        "num_hidden_layers": ("depth", None), "hidden_size": ("width", None),
        "num_attention_heads": ("heads", None), "intermediate_size": ("mlp_width", None),
        "vocab_size": ("vocab_size", None), "rms_norm_eps": ("norm_eps", 1e-6),
    },
    "bert": {
        "num_hidden_layers": ("depth", None), "hidden_size": ("width", None),
        "num_attention_heads": ("heads", None), "intermediate_size": ("mlp_width", None),
        "vocab_size": ("vocab_size", None), "layer_norm_eps": ("norm_eps", 1e-12),
        "type_vocab_size": ("token_types", 2), "hidden_dropout_prob": ("dropout", 0.1),
    },
    "t5": {
        "num_layers": ("depth", None), "d_model": ("width", None), "num_heads": ("heads", None),
        "d_kv": ("head_dim", None), "d_ff": ("mlp_width", None), "vocab_size": ("vocab_size", None),
        "layer_norm_epsilon": ("norm_eps", 1e-6), "dropout_rate": ("dropout", 0.1),
        "relative_attention_num_buckets": ("relative_buckets", 32),
        "relative_attention_max_distance": ("relative_distance", 128),
    },
    "vit": {
        "num_hidden_layers": ("depth", None), "hidden_size": ("width", None),
        "num_attention_heads": ("heads", None), "intermediate_size": ("mlp_width", None),
        "layer_norm_eps": ("norm_eps", 1e-12), "patch_size": ("patch", 16),
        "hidden_dropout_prob": ("dropout", 0.0),
    },
    "resnet": {},
}  # fmt: skip
KEYS["mixtral"] = KEYS["llama"] | {
    "num_local_experts": ("experts", None), "num_experts_per_tok": ("experts_per_token", 2),
    "rms_norm_eps": ("norm_eps", 1e-5),
}  # fmt: skip


def read(hf: HF, tensors: set[str], where: str) -> Tree:
    """Converts config.json to a config: the model, its task, and its lengths and sizes.

    Args:
        tensors: names of the file's tensors, which tell the model's heads.
        where: the file's name, for messages.

    Raises:
        InputError: a model or a setting that is not supported, or a value that is missing or no number.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in KEYS:
        raise InputError(f"{where}: model_type={kind!r} is not supported; known: {', '.join(sorted(KEYS))}")
    known.check(hf, kind, where)
    model: Tree = {}
    for theirs, (ours, default) in KEYS[kind].items():
        model[ours] = number(hf, theirs, default, where)
    try:
        return READERS[kind](hf, model, tensors, where)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{where} is no sound {kind} config ({error!r}); fetch it again") from error


def number(hf: HF, key: str, default: Any, where: str) -> Any:
    """Returns a number of config.json, or its default."""
    value = default if hf.get(key) is None else hf[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
        fault = "lacks" if value is None else f"has {key}={value!r} in place of"
        raise InputError(f"{where} {fault} a number {key}; fetch it again")
    return value


def _refuse(hf: HF, where: str, **expected: Any) -> None:
    """Raises InputError for settings that our models do not support, unless they have the given value."""
    for key, value in expected.items():
        if hf.get(key, value) not in (value, None):
            raise InputError(f"{where}: {key}={hf[key]!r} is not supported; only {value!r} is")


def _named(table: Mapping[str, str], hf: HF, key: str, default: str, where: str) -> str:
    """Returns our name for their activation."""
    name = {"gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}.get(hf.get(key, default), hf.get(key))
    name = name or default
    for ours, theirs in table.items():
        if theirs == name:
            return ours
    raise InputError(f"{where}: {key}={name!r} is not supported; known: {', '.join(table.values())}")


def _gpt2(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    _refuse(
        hf, where, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    model |= {"name": "gpt", "mlp": _named(ACTIVATIONS, hf, "activation_function", "gelu_new", where)}
    model["mlp_width"] = number(hf, "n_inner", 4 * model["width"], where)
    model["tie_embeddings"] = hf.get("tie_word_embeddings", True)
    task = _task(hf, model, tensors, "score.weight", where) or {"name": "lm"}
    return {"model": model, "seq_len": number(hf, "n_positions", 1024, where), "task": task}


def _llama(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    _refuse(hf, where, hidden_act="silu")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{where}: rope_type={kind!r} is not supported; only plain rope is")
    mixtral = hf["model_type"] == "mixtral"
    for key in rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        raise InputError(
            f"{where}: rope_parameters has {key}={rope[key]!r}, which is not supported; remove it"
        )
    _refuse(rope, where, partial_rotary_factor=1.0)
    length = number(hf, "max_position_embeddings", 131072 if mixtral else 2048, where)
    if (hf.get("sliding_window") or length) < length:
        raise InputError(
            f"{where}: sliding_window={hf['sliding_window']} is not supported; set it to null and "
            f"max_position_embeddings to {hf['sliding_window']}, within which it changes nothing"
        )
    bias = bool(hf.get("attention_bias", False))
    if bias != bool(hf.get("mlp_bias", False)):
        raise InputError(f"{where}: attention_bias and mlp_bias differ, which is not supported")
    default = 1e6 if mixtral else 1e4
    theta = rope.get("rope_theta") or hf.get("rope_theta") or default
    model |= {"name": "gpt", "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": bias}
    model["rope_theta"] = number({"rope_theta": theta}, "rope_theta", None, where)
    model["kv_heads"] = number(hf, "num_key_value_heads", 8 if mixtral else model["heads"], where)
    model["head_dim"] = number(hf, "head_dim", model["width"] // max(model["heads"], 1), where)
    model["tie_embeddings"] = hf.get("tie_word_embeddings", False)
    if "experts" in model:  # room for every token: Mixtral drops none
        model["capacity_factor"] = model["experts"] / max(model["experts_per_token"], 1)
    task = _task(hf, model, tensors, "score.weight", where) or {"name": "lm"}
    return {"model": model, "seq_len": length, "task": task}


def _bert(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    _refuse(hf, where, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    has = {name: any(part in tensor for tensor in tensors) for name, part in BERT_PARTS.items()}
    if has["next_sentence"] and not (has["mlm"] and has["pooler"]):
        raise InputError(f"{where}: a next-sentence head without a pooler and an mlm head is not supported")
    model |= {"name": "bert", "mlp": _named(ACTIVATIONS, hf, "hidden_act", "gelu", where)}
    model |= {"pooler": has["pooler"], "head": "mlm" if has["mlm"] else "none"}
    task = _task(hf, model, tensors, "classifier.weight", where)
    task = task or {"name": "mlm", "next_sentence": has["next_sentence"]}
    return {"model": model, "seq_len": number(hf, "max_position_embeddings", 512, where), "task": task}


def _task(hf: HF, model: Tree, tensors: set[str], head: str, where: str) -> Tree:
    """Returns the task of a classification head if its tensor exists; sets the model's num_classes."""
    if head not in tensors:
        return {}
    count = model["num_classes"] = len(names.classes(hf, where))
    kinds = {"regression": "regress", "multi_label_classification": "multilabel"}
    kinds |= {"single_label_classification": "classify", "None": "regress" if count == 1 else "classify"}
    if (problem := str(hf.get("problem_type"))) not in kinds:
        raise InputError(f"{where}: problem_type={problem!r} is not supported; known: {', '.join(kinds)}")
    return {"name": kinds[problem]}


BERT_PARTS = {"mlm": "cls.predictions.", "pooler": "pooler.dense.", "next_sentence": "cls.seq_relationship."}


def _t5(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    model |= {"name": "t5", "mlp": _named(T5_ACTIVATIONS, hf, "feed_forward_proj", "relu", where)}
    model["decoder_depth"] = number(hf, "num_decoder_layers", model["depth"], where)
    # In transformers 5 tie_word_embeddings is always true, and another key tells v1.0 and v1.1 apart.
    forward = str(hf.get("feed_forward_proj") or "relu")
    gated = forward.startswith("gated-")
    inner = {"gated-gelu": "gelu_new"}.get(forward, forward.removeprefix("gated-"))
    _refuse(hf, where, is_gated_act=gated, dense_act_fn=inner)
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    model |= {"scale_output": bool(scaled), "tie_embeddings": scaled or "lm_head.weight" not in tensors}
    return {"model": model, "seq_len": 512, "task": {"name": "seq2seq"}}


def _vit(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    _refuse(hf, where, qkv_bias=True)
    size = number(hf, "image_size", 224, where)
    model |= {"name": "vit", "mlp": _named(ACTIVATIONS, hf, "hidden_act", "gelu", where), "pool": "cls"}
    return _images(hf, model, size, where)


def _resnet(hf: HF, model: Tree, tensors: set[str], where: str) -> Tree:
    _refuse(hf, where, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
    bottleneck = hf.get("layer_type", "bottleneck") == "bottleneck"
    sizes, depths = tuple(hf["hidden_sizes"]), tuple(hf["depths"])
    known = {stages: depth for depth, stages in RESNET_STAGES.items() if (depth >= 50) == bottleneck}
    if depths not in known:
        kind = "bottleneck" if bottleneck else "basic"
        raise InputError(f"{where}: {kind} depths={list(depths)} are no ResNet's; known: {list(known)}")
    channels = tuple(size // 4 if bottleneck else size for size in sizes)
    if hf.get("embedding_size", 64) != channels[0]:
        raise InputError(f"{where}: embedding_size={hf.get('embedding_size', 64)} must be {channels[0]}")
    model |= {"name": "resnet", "depth": known[depths], "stem": "imagenet", "channels": channels}
    return _images(hf, model, 224, where)


def _images(hf: HF, model: Tree, size: int, where: str) -> Tree:
    task = _task(hf, model, {"classifier"}, "classifier", where)
    name = "imagenet2012" if model["num_classes"] == 1000 and task["name"] == "classify" else names.NOWHERE
    return {"model": model, "task": task, "data": {"name": name, "image_size": size}}


READERS: dict[str, Callable[[HF, Tree, set[str], str], Tree]] = {
    "gpt2": _gpt2, "llama": _llama, "mixtral": _llama, "bert": _bert, "t5": _t5, "vit": _vit,
    "resnet": _resnet,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ writing


PROBLEMS = {
    "classify": "single_label_classification", "multilabel": "multi_label_classification",
    "regress": "regression",
}  # fmt: skip


def write(
    config: Config, layout: Layout, channels: int = 3, size: int = 0, class_names: tuple[str, ...] = ()
) -> Tree:
    """Converts `config` to the config.json with which transformers reads a model in this layout.

    Args:
        channels, size: the images' channels and size.
        class_names: by number; none: LABEL_0 and so on.
    """
    c = config.model
    if isinstance(c, families.Transformer) and (c.mup_ratio != 1 or c.base_head_dim != c.head_dim):
        raise InputError(
            f"model.mup_base_width={c.mup_base_width}: transformers has no multiplier of the logits; "
            "export with --format=stablehlo"
        )
    out: Tree = {"model_type": layout.model_type, "architectures": [layout.architecture]}
    out["dtype"] = config.param_dtype
    out |= {theirs: vars(c)[ours] for theirs, (ours, _) in KEYS[layout.model_type].items()}
    if isinstance(c, families.GPT):
        out["tie_word_embeddings"] = c.tie_embeddings
        if layout.model_type == "gpt2":
            out |= {"n_positions": config.seq_len, "n_inner": c.mlp_width, "embd_pdrop": c.dropout}
            out |= {"activation_function": ACTIVATIONS[c.mlp], "attn_pdrop": 0.0}
        else:
            out |= {"max_position_embeddings": config.seq_len, "num_key_value_heads": c.kv_heads}
            out |= {"head_dim": c.head_dim, "hidden_act": "silu", "rope_theta": c.rope_theta}
            out |= {"rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"}}
            out |= {} if c.experts else {"attention_bias": c.bias, "mlp_bias": c.bias}
    elif isinstance(c, families.BERT):
        out |= {"max_position_embeddings": config.seq_len, "hidden_act": ACTIVATIONS[c.mlp]}
        out |= {"attention_probs_dropout_prob": 0.0}
    elif isinstance(c, families.T5):
        out |= {"num_decoder_layers": c.decoder_depth, "feed_forward_proj": T5_ACTIVATIONS[c.mlp]}
        out |= {"tie_word_embeddings": c.tie_embeddings, "scale_decoder_outputs": c.scale_output}
    elif isinstance(c, families.ViT):
        out |= {"image_size": size, "hidden_act": ACTIVATIONS[c.mlp]}
        out |= {"attention_probs_dropout_prob": 0.0, "num_channels": channels}
    elif isinstance(c, families.ResNet):
        bottleneck = c.depth >= 50
        out |= {"embedding_size": c.channels[0], "depths": list(RESNET_STAGES[c.depth])}
        out["hidden_sizes"] = [width * (4 if bottleneck else 1) for width in c.channels]
        out |= {"layer_type": "bottleneck" if bottleneck else "basic", "num_channels": channels}
    if config.task.one_output:
        labels = class_names or tuple(f"LABEL_{k}" for k in range(c.num_classes))
        out["id2label"] = {str(k): name for k, name in enumerate(labels)}
        out["label2id"] = {name: k for k, name in enumerate(labels)}
        out["problem_type"] = PROBLEMS[config.task.name]
    return out
