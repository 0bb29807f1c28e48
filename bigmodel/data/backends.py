"""A pipeline of `tokenizers`, as transformers 5 makes it of tokenizer.json and the files beside it.

A generic class takes the file as it is. The classes of one model (GPT-2's, Llama's, BERT's, T5's) take its
vocabulary, merges and post-processor alone, and build the rest from tokenizer_config.json.
"""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bigmodel.config import InputError
from bigmodel.data.tokenizer_files import NAMED, TOKENIZER_CONFIG, TokenizerFiles, json_object

GENERIC = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
REGISTERED = {"gpt2": "GPT2Tokenizer", "bert": "BertTokenizer", "t5": "T5Tokenizer", "mixtral": GENERIC[0]}
# Tokens that a class has where tokenizer_config.json does not name them.
DEFAULTS = {
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "BertTokenizer": {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}  # fmt: skip
MODELS = {
    "GPT2Tokenizer": "BPE", "LlamaTokenizer": "BPE", "BertTokenizer": "WordPiece", "T5Tokenizer": "Unigram",
}  # fmt: skip
# Keys of tokenizer_config.json: read here or by pretrained.py; and those that change no id and no text.
READ = {
    *NAMED, "tokenizer_class", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens", "chat_template", "chat_control_tokens", "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "add_prefix_space", "legacy",
    "do_lower_case", "strip_accents", "tokenize_chinese_chars", "truncation_side", "split_special_tokens",
    "extra_ids",
}  # fmt: skip
NEUTRAL = {
    "add_bos_token", "add_eos_token",  # transformers 5 leaves them to tokenizer.json's post-processor
    "backend", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file",
    "vocab_file", "merges_file", "added_tokens_file", "processor_class", "_processor_class", "padding_side",
    "padding", "truncation", "max_length", "max_len", "stride", "truncation_strategy", "pad_to_multiple_of",
    "pad_token_type_id", "sp_model_kwargs", "use_default_system_prompt", "use_fast", "errors", "trim_offsets",
    "model_max_length", "model_input_names", "response_template", "response_schema", "do_basic_tokenize",
    "never_split", "spaces_between_special_tokens", "transformers_version", "auto_map", "files_loaded",
    "init_inputs", "unk_id", "verbose", "_commit_hash", "language", "fix_mistral_regex", "from_slow",
    "device_map", "mask_token_id", "return_token_type_ids", "full_tokenizer_file", "default_chat_template",
}  # fmt: skip


class Backend(NamedTuple):
    """A pipeline and what its files call its tokens."""

    pipeline: Any  # tokenizers.Tokenizer
    named: dict[str, str]  # bos_token, eos_token and so on -> the token's text
    rebuilt: bool  # it differs from what tokenizer.json alone makes


def build(text: str, where: str, files: TokenizerFiles) -> Backend:
    """The pipeline of a tokenizer.json (`text`).

    Raises:
        InputError: no tokenizer, or a class or a key that is not known.
    """
    _check_keys(files)
    kind = _class_of(text, files)
    stored = _load(text, where)
    if kind in MODELS and (found := type(stored.model).__name__) != MODELS[kind]:
        raise InputError(
            f"{files.where}/{TOKENIZER_CONFIG}: tokenizer_class={kind!r} is of {MODELS[kind]}, but "
            f"tokenizer.json of {found}; set it to PreTrainedTokenizerFast, which takes the file as it is"
        )
    settings = dict(files.config)
    added = _added_tokens(text, files, settings)
    pipeline = stored if kind in GENERIC else BUILDERS[kind](json.loads(text), settings)
    if kind not in GENERIC and stored.post_processor is not None:
        pipeline.post_processor = stored.post_processor
    named = _named(kind, settings)
    count = _add(pipeline, added, named, _extra(kind, settings))
    if kind in FINISHERS:
        FINISHERS[kind](pipeline, {key: str(token) for key, token in named.items()})
    names = {key: str(token) for key, token in named.items()}
    return Backend(pipeline, names, kind not in GENERIC or count > 0)


def _load(text: str, where: str) -> Any:
    from tokenizers import Tokenizer

    try:
        pipeline: Any = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        why = " ".join(str(error).split())[:200]
        raise InputError(f"tokenizer file {where} cannot be read: {why}") from error
    if getattr(pipeline.model, "dropout", None):
        raise InputError(
            f"tokenizer file {where}: BPE with dropout encodes a text anew each time; set it to null"
        )
    return pipeline


def _check_keys(files: TokenizerFiles) -> None:
    for key, value in files.config.items():
        model_token = key.endswith("_token") and isinstance(value, str | Mapping)
        if key not in READ | NEUTRAL and not model_token and value not in (None, False, "", [], {}):
            raise InputError(
                f"{files.where}/{TOKENIZER_CONFIG}: {key}={str(value)[:60]} is unknown; "
                "remove it if it changes nothing"
            )


def _class_of(text: str, files: TokenizerFiles) -> str:
    """The class that transformers' AutoTokenizer takes."""
    model = str(files.model.get("model_type", ""))
    named = files.config.get("tokenizer_class") or files.model.get("tokenizer_class")
    if not named:
        return REGISTERED.get(model, GENERIC[0])
    named = str(named)
    name = GENERIC[0] if named == "PreTrainedTokenizerFast" else named.removesuffix("Fast")
    if name not in BUILDERS and name not in GENERIC:
        known = ", ".join((*BUILDERS, "PreTrainedTokenizerFast", GENERIC[0]))
        raise InputError(
            f"{files.where}/{TOKENIZER_CONFIG}: tokenizer_class={named!r} is not supported; known: "
            f"{known}; save the tokenizer as PreTrainedTokenizerFast"
        )
    if model == "mixtral" or (name == "LlamaTokenizer" and _is_byte_level(text)):
        return GENERIC[0]
    return name


def _is_byte_level(text: str) -> bool:
    tree = json.loads(text)
    return any('"ByteLevel"' in json.dumps(tree.get(part)) for part in ("pre_tokenizer", "decoder"))


def from_vocabulary(directory: pathlib.Path) -> str:
    """tokenizer.json of BERT's vocab.txt, or of GPT-2's vocab.json and merges.txt; "" where there is neither.

    Raises:
        InputError: files that are no vocabulary, or that ask for ends which only tokenizer.json can say.
    """
    from tokenizers import Tokenizer, models

    config = json_object(directory / TOKENIZER_CONFIG)
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key):
            raise InputError(f"{directory}/{TOKENIZER_CONFIG}: {key} needs a tokenizer.json; save one")
    try:
        if (directory / "vocab.txt").is_file():
            lines = (directory / "vocab.txt").read_text("utf-8").split("\n")
            lines = lines[:-1] if lines[-1] == "" else lines
            made: Any = Tokenizer(
                models.WordPiece({name: at for at, name in enumerate(lines)}, unk_token="[UNK]")
            )
            return str(made.to_str())
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            lines = (directory / "merges.txt").read_text("utf-8").split("\n")
            pairs = [
                (a, b)
                for a, b in (line.split() for line in lines if line and not line.startswith("#version"))
            ]
            made = Tokenizer(models.BPE(dict(json_object(directory / "vocab.json")), pairs))
            return str(made.to_str())
    except Exception as error:  # `tokenizers` raises bare Exception
        raise InputError(
            f"{directory}: its vocabulary cannot be read ({' '.join(str(error).split())[:120]})"
        ) from error
    return ""


# ----------------------------------------------------------------------------------------------- tokens


def _token(value: Any, special: bool = False) -> Any:
    from tokenizers import AddedToken

    if isinstance(value, Mapping):
        keys = {key: x for key, x in value.items() if key not in ("__type", "id")}
        return AddedToken(**(keys | ({"special": True} if special else {})))
    return value


def _added_tokens(text: str, files: TokenizerFiles, settings: dict[str, Any]) -> dict[int, Any]:
    """Added tokens by id; without `added_tokens_decoder`, special_tokens_map.json goes into the settings."""
    out: dict[int, Any] = {}
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        return {int(id): _token(value) for id, value in settings["added_tokens_decoder"].items()}
    for key, value in files.special.items():
        key = "extra_special_tokens" if key == "additional_special_tokens" else key
        if key == "extra_special_tokens" and isinstance(value, list):
            there = list(settings.get(key) or [])
            value = there + [token for token in value if token not in there]
        settings[key] = value
    special = {_text(settings[key]) for key in NAMED if settings.get(key)}
    special |= {_text(token) for token in settings.get("extra_special_tokens") or []}
    for name, id in files.added.items():
        plain = {"content": name, "normalized": name not in special, "special": name in special}
        out[id] = _token(plain)
    return out | {each["id"]: _token(each) for each in json.loads(text).get("added_tokens", [])}


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _named(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token and so on, and names that the model alone has -> a text or an AddedToken."""
    found = DEFAULTS.get(kind, {}) | {key: settings[key] for key in NAMED if settings.get(key) is not None}
    other = settings.get("extra_special_tokens")
    found |= other if isinstance(other, Mapping) else {}
    found |= {
        key: value for key, value in settings.items()
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | Mapping)
    }  # fmt: skip
    order = [*(key for key in NAMED if key in found), *(key for key in found if key not in NAMED)]
    return {key: _token(found[key], special=True) for key in order}


def _extra(kind: str, settings: Mapping[str, Any]) -> list[Any]:
    extra = settings.get("extra_special_tokens")
    if extra is None and kind == "T5Tokenizer":
        return [f"<extra_id_{k}>" for k in range(settings.get("extra_ids", 100))]
    return [_token(token, special=True) for token in extra or []] if isinstance(extra, list) else []


def _add(pipeline: Any, added: Mapping[int, Any], named: dict[str, Any], extra: list[Any]) -> int:
    """Adds what the pipeline has not yet, in transformers' order -> how many were added or changed."""
    from tokenizers import AddedToken

    by_text = {str(token): token for token in added.values()}
    for key, token in named.items():
        if key in NAMED:
            named[key] = by_text.get(str(token), token)
    there = {repr(token) for token in pipeline.get_added_tokens_decoder().values()}
    texts = {str(token) for token in pipeline.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(added.items()) if repr(token) not in there]
    texts |= {str(token) for token in new}
    for token in (*named.values(), *extra):
        if str(token) not in texts:
            new.append(token)
            texts.add(str(token))
    names = {str(token) for token in named.values()}
    tokens = []
    for token in new:
        token = AddedToken(token, special=True) if isinstance(token, str) else token
        token.special = token.special or str(token) in names
        tokens.append(token)
    pipeline.add_tokens(tokens)
    return len(tokens)


# ---------------------------------------------------------------------------------------------- classes


def _vocabulary(tree: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    model = tree["model"]
    merges = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges", []))
    return model["vocab"], [(first, second) for first, second in merges]


def _gpt2(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = _vocabulary(tree)
    pipeline: Any = Tokenizer(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    prefix = bool(settings.get("add_prefix_space", False))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _llama(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = _vocabulary(tree)
    pipeline: Any = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if prefix else []
    pipeline.decoder = decoders.Sequence(steps)
    return pipeline


def _bert(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, _ = _vocabulary(tree)
    unknown = _text(settings.get("unk_token") or "[UNK]")
    pipeline: Any = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    pipeline.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece(prefix="##")
    return pipeline


def _t5(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, _ = _vocabulary(tree)
    pipeline: Any = Tokenizer(models.Unigram([tuple(pair) for pair in vocab], unk_id=2, byte_fallback=False))
    normalizer = tree.get("normalizer") or {}
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            pipeline.normalizer = normalizers.Precompiled(base64.b64decode(part["precompiled_charsmap"]))
            break
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    pipeline.decoder = decoders.Metaspace(**space)
    return pipeline


def _bert_ends(pipeline: Any, named: Mapping[str, str]) -> None:
    from tokenizers import processors

    cls, sep = named["cls_token"], named["sep_token"]
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, pipeline.token_to_id(token)) for token in dict.fromkeys((cls, sep))],
    )


def _t5_ends(pipeline: Any, named: Mapping[str, str]) -> None:
    from tokenizers import processors

    end = pipeline.token_to_id(named["eos_token"])
    pipeline.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", end)]
    )


BUILDERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "GPT2Tokenizer": _gpt2, "LlamaTokenizer": _llama, "BertTokenizer": _bert, "T5Tokenizer": _t5,
}  # fmt: skip
FINISHERS: dict[str, Callable[[Any, Mapping[str, str]], None]] = {
    "BertTokenizer": _bert_ends, "T5Tokenizer": _t5_ends,
}  # fmt: skip
