"""The files beside a tokenizer.json that say how texts are encoded, decoded, ended and put into a chat.

A workdir keeps them in `huggingface/`, next to its tokenizer.json.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bigmodel.config import InputError

ORIGIN = "huggingface"  # in a workdir: files of Hugging Face's as they came
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
GENERATION, MODEL = "generation_config.json", "config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
KEPT = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL,
    ADDED,
    GENERATION,
    TEMPLATE,
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files that accompany a tokenizer.json; a missing file is empty."""

    where: str = ""  # their directory, for messages
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    special: Mapping[str, Any] = field(default_factory=dict)  # special_tokens_map.json
    added: Mapping[str, int] = field(default_factory=dict)  # added_tokens.json
    generation: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(
        default_factory=dict
    )  # config.json of the model; {}: it was trained here
    templates: Mapping[str, str] = field(default_factory=dict)  # of chats, by name

    @property
    def imported(self) -> bool:
        """The model came with its tokenizer, rather than learned here with another's."""
        return bool(self.model)


def home(file: pathlib.Path) -> pathlib.Path:
    """Where the files are that belong to a tokenizer.json: in a workdir, its `huggingface/`."""
    origin = file.parent / ORIGIN
    in_workdir = origin.is_dir() or (file.parent / "checkpoints").is_dir()
    return origin if in_workdir else file.parent


def read(directory: pathlib.Path, with_model: bool = True) -> TokenizerFiles:
    """Reads a directory in Hugging Face's layout, or the `huggingface/` of a workdir.

    Raises:
        InputError: a file that is not what it should be.
    """
    if not directory.is_dir():
        return TokenizerFiles()
    config = json_object(directory / TOKENIZER_CONFIG)
    return TokenizerFiles(
        str(directory), config, json_object(directory / SPECIAL), json_object(directory / ADDED),
        json_object(directory / GENERATION), json_object(directory / MODEL) if with_model else {},
        _templates(directory, config),
    )  # fmt: skip


def json_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is not there."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({' '.join(str(error).split())[:120]}); fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again")
    return value


def _templates(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; files of their own come before what tokenizer_config.json has."""
    files = {"default": directory / TEMPLATE} if (directory / TEMPLATE).is_file() else {}
    files |= {path.stem: path for path in sorted((directory / TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: path.read_text("utf-8") for name, path in files.items()}
    value, where = config.get("chat_template"), directory / TOKENIZER_CONFIG
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, list) and not isinstance(value, Mapping):
        pairs = [
            (p.get("name"), p.get("template")) if isinstance(p, Mapping) else (None, None) for p in value
        ]
    if not isinstance(pairs, list) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise InputError(
            f"{where}: chat_template must be a text, or a list of {{name, template}}; fetch it again"
        )
    return dict(pairs)


def keep(source: pathlib.Path, target: pathlib.Path, extra: tuple[str, ...] = ()) -> None:
    """Copies the files of `source` that a tokenizer needs into the directory `target`."""
    names = [name for name in (*KEPT, *extra) if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        (target / TEMPLATES).mkdir(exist_ok=True)
        for path in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, target / TEMPLATES / path.name)
