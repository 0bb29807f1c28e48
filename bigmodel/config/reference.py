"""All keys with types, defaults and comments, read from the dataclasses; the key that was meant."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from bigmodel.config import parsing
from bigmodel.config.run import Config, flatten, to_dict

# Names that other codebases give to our keys.
ELSEWHERE = {
    "learning_rate": "optim.lr", "wd": "optim.weight_decay", "warmup": "optim.warmup_steps",
    "grad_clip": "optim.clip_norm", "max_grad_norm": "optim.clip_norm", "optimizer": "optim.name",
    "num_layers": "model.depth", "n_layer": "model.depth", "num_hidden_layers": "model.depth",
    "hidden_size": "model.width", "d_model": "model.width", "n_embd": "model.width", "emb_dim": "model.width",
    "num_heads": "model.heads", "n_head": "model.heads", "d_ff": "model.mlp_width",
    "max_steps": "steps", "max_iters": "steps", "total_steps": "steps", "num_train_steps": "steps",
    "block_size": "seq_len", "max_length": "seq_len", "context_length": "seq_len", "bs": "batch_size",
    "gradient_accumulation_steps": "microbatches", "grad_accum_steps": "microbatches",
    "dtype": "compute_dtype", "dataset": "data.name", "eval_interval": "eval.every_steps",
    "log_interval": "log.every_steps", "save_interval": "checkpoint.every_steps",
    "base_num_decoder_layers": "model.depth", "base_emb_dim": "model.width", "remat_policy": "remat",
    "max_target_length": "seq_len", "dataset_name": "data.name", "load_parameters_path": "init.from",
    "init_from": "init.from", "grad_clip_norm": "optim.clip_norm", "adam_weight_decay": "optim.weight_decay",
    "ici_fsdp_parallelism": "mesh.fsdp", "ici_tensor_parallelism": "mesh.tensor", "pp": "data.augment",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config."""

    name: str  # dotted
    type: str
    value: Any
    default: Any
    comment: str


def keys(config: Config) -> list[Key]:
    """All keys of `config`, in the order in which the dataclasses declare them."""
    return list(_keys(config, ""))


def _keys(group: Any, prefix: str, names: str = "") -> Iterator[Key]:
    hints, comments = typing.get_type_hints(type(group), include_extras=True), _comments(type(group))
    for field in dataclasses.fields(group):
        value, hint = getattr(group, field.name), hints[field.name]
        name = prefix + parsing.key_of(field.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{name}.", "|".join(_names(hint)))
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        kind = names if field.name == "name" and names else _type(hint)
        yield Key(name, kind, value, default, comments.get(field.name, ""))


def _names(hint: Any) -> list[str]:
    """The names among which a group's `name` chooses, if it does."""
    if typing.get_origin(hint) is not typing.Annotated:
        return []
    return [cls.name for cls in typing.get_args(typing.get_args(hint)[1])]


def _type(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, options))
    if isinstance(hint, types.UnionType):
        return "|".join("none" if option is type(None) else _type(option) for option in options)
    if typing.get_origin(hint) is tuple:
        return f"{_type(options[0])},..."
    return hint.__name__ if isinstance(hint, type) else "JSON"


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment above it or at its end, for a dataclass and those it derives from."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            out |= _comments_in(textwrap.dedent(inspect.getsource(base)))
    return out


def _comments_in(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, token in found.items() if token.line.strip() == token.string}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    out = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            words = [found[line].string.lstrip("# ") for line in lines if line in found]
            out[node.target.id] = " ".join(words)
    return out


def table(config: Config, given: Collection[str]) -> list[str]:
    """One line for each key, in groups; a star marks those of `given`, dotted keys that something sets."""
    found = keys(config)
    width = max(len(key.name) for key in found)
    lines, group = [], ""
    for key in found:
        if (new := key.name.rpartition(".")[0]) != group:
            group = new
            lines.append("")
        star = "*" if any(name == key.name or name.startswith(f"{key.name}.") for name in given) else " "
        default = "" if key.value == key.default else f", default {_text(key.default)}"
        comment = f"  # {key.comment}" if key.comment else ""
        lines.append(f"{star} {key.name:{width}}  {_text(key.value):10}  {key.type}{default}{comment}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    if isinstance(value, Mapping):
        return json.dumps(value)
    return '""' if value == "" else str(value).lower() if isinstance(value, bool | None) else str(value)


def meant(key: str, tree: Mapping[str, Any]) -> str:
    """The end of a message about an unknown dotted key: the likeliest known one, in whatever group.

    Args:
        tree: the config as given, for the names of its model and task.
    """
    defaults = to_dict(_named(tree))
    group, _, leaf = key.rpartition(".")
    siblings = defaults.get(group, {}) if group else defaults
    leaves: dict[str, list[str]] = {}
    for name in flatten(defaults):
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    elsewhere = ELSEWHERE.get(leaf, "")
    found = leaves.get(leaf) or [
        name for name in leaves.get(elsewhere.rpartition(".")[2], []) if name == elsewhere
    ]
    found = found or [f"{group}.{name}".strip(".") for name in _close(leaf, siblings, 0.6)]
    found = found or [name for other in _close(leaf, leaves, 0.7) for name in leaves[other]]
    if not found:
        return parsing.nearest(leaf, siblings or defaults)
    return f"; did you mean {' or '.join(map(repr, found[:4]))}?"


def _close(word: str, words: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)


def _named(tree: Mapping[str, Any]) -> Config:
    """The default config with the model and the task that `tree` names."""
    names = {
        group: {"name": tree[group]["name"]}
        for group in ("model", "task")
        if isinstance(tree.get(group), Mapping) and "name" in tree[group]
    }
    return parsing.build(Config, names, "")
