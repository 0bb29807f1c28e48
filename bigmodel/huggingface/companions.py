"""Writes the files beside config.json and the weights of an export: tokenizer, generation, preprocessor.

They describe the inputs of training: the tokens around a text, the ids that end an answer, how images are
prepared. With them, transformers gives the model the same ids and pixels.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from bigmodel.config import Config
from bigmodel.data.corpus import special_id
from bigmodel.data.pretrained import Pretrained
from bigmodel.data.tokenizer_files import GENERATION, SPECIAL, TOKENIZER, TOKENIZER_CONFIG
from bigmodel.data.tokenizers import SEPARATOR, Bytes, Tokenizer, byte_alphabet
from bigmodel.huggingface import processors

Tree = dict[str, Any]


def pictures(config: Config, size: int, channels: int) -> dict[str, Tree]:
    """Returns the files (name to JSON) of a model that reads images."""
    return {processors.FILE: processors.write(config.data, size, channels)}


def texts(config: Config, tokenizer: Tokenizer) -> dict[str, Tree]:
    """Returns the files (name to JSON) of a model that reads text."""
    roles = _roles(config, tokenizer)
    tree = _pipeline(tokenizer)
    for name, id in roles.values():
        _place(tree, name, id)
    if config.task.generates == "answer" and not isinstance(tokenizer, Pretrained):
        for number in range(config.model.vocab_size - tokenizer.vocab_size):
            _place(tree, f"<extra_id_{number}>", config.model.vocab_size - 1 - number)
    before, after = _around(config)
    pieces = [*(roles[role] for role in before), None, *(roles[role] for role in after)]
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece is None
        else {"SpecialToken": {"id": piece[0], "type_id": 0}}
        for piece in pieces
    ]  # fmt: skip
    tokens = {piece[0]: piece[1] for piece in pieces if piece is not None}
    tree["post_processor"] = {
        "type": "TemplateProcessing", "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()},
    }  # fmt: skip
    named = {f"{role}_token": name for role, (name, _) in roles.items()}
    settings = named | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    out = {TOKENIZER: tree, TOKENIZER_CONFIG: settings, SPECIAL: named}
    return out | ({GENERATION: ids(config, tokenizer)} if config.task.generates else {})


def ids(config: Config, tokenizer: Tokenizer) -> Tree:
    """Returns the ids that begin, end and pad a text, by their keys in config.json."""
    ends = list(tokenizer.ends)
    out: Tree = {"bos_token_id": tokenizer.first, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    if config.task.one_output:
        return out  # a pad id would hide the separator at a text's end from transformers' classifiers
    out["pad_token_id"] = tokenizer.separator
    if config.task.generates == "answer":
        start = special_id(tokenizer, config.model.vocab_size, "start")
        out |= {"decoder_start_token_id": start, "pad_token_id": start}
    return out


def _roles(config: Config, tokenizer: Tokenizer) -> dict[str, tuple[str, int]]:
    """Maps roles (eos, bos, pad ...) to tokens and their ids."""
    vocab_size = config.model.vocab_size
    end = _name(tokenizer, tokenizer.separator, SEPARATOR)
    out = {"eos": (end, tokenizer.separator), "pad": (end, tokenizer.separator)}
    out["bos"] = (_name(tokenizer, tokenizer.first, end), tokenizer.first)
    if config.model.starts == "cls":
        out["sep"] = out["eos"]
        for role in ("cls", "mask"):
            id = special_id(tokenizer, vocab_size, role)
            out[role] = (_name(tokenizer, id, f"[{role.upper()}]"), id)
    return out


def _around(config: Config) -> tuple[list[str], list[str]]:
    """Returns the roles of the tokens before and after a text, as in training."""
    if config.task.generates == "continuation":
        return ["bos"], []
    starts = {"cls": ["cls"], "separator": ["eos"]}.get(config.model.starts, [])
    return ([] if config.task.generates == "answer" else starts), ["eos"]


def _name(tokenizer: Tokenizer, id: int, default: str) -> str:
    return tokenizer.name(id) or default if isinstance(tokenizer, Pretrained) else default


def _pipeline(tokenizer: Tokenizer) -> Tree:
    """Returns the tree of tokenizer.json."""
    if isinstance(tokenizer, Pretrained):
        tree: Tree = json.loads(tokenizer.model.to_str())
        return tree
    if not isinstance(tokenizer, Bytes):
        tree = json.loads(tokenizer.json)  # type: ignore[attr-defined]
        return tree
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())}
    made: Any = Model(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tree = json.loads(made.to_str())
    return tree


def _place(tree: Tree, name: str, id: int) -> None:
    """Adds a special token at its id."""
    if all(token["content"] != name for token in tree["added_tokens"]):
        if isinstance(tree["model"]["vocab"], dict):
            tree["model"]["vocab"].setdefault(name, id)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": id, "content": name, **flags, "special": True})
        tree["added_tokens"].sort(key=lambda token: token["id"])


def write(directory: pathlib.Path, files: dict[str, Tree]) -> None:
    for name, tree in files.items():
        (directory / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
