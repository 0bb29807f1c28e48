"""Reads and writes safetensors files: one, or several with an index.

Checks all headers before it reads a tensor. Never opens pickled weights (`*.bin`, `*.pt`), because
unpickling runs whatever code a file contains.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bigmodel.config import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30  # most bytes of tensors in a file, as in transformers
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Tensors:
    """The tensors of a directory (or of one file) by name; reads only headers until `read`.

    Raises InputError, which names the file, if it is missing, pickled, damaged, or has a dtype not in DTYPES.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        promised = _promised(self.path)
        for file in sorted(set(promised.values())) or [_single(self.path)]:
            self._open(file)
        if lost := sorted(promised.keys() - self.dtypes.keys()):
            raise InputError(
                f"{self.path / INDEX} names {lost[0]!r}, which {promised[lost[0]]} lacks; fetch both again"
            )

    def _open(self, file: pathlib.Path) -> None:
        try:
            opened: Any = safe_open(file, "np")
            for name in opened.keys():  # noqa: SIM118 -- it is no dict
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{file}: tensor {name!r} is {part.get_dtype()}, which is not supported; "
                        f"convert it to one of {', '.join(DTYPES)}"
                    )
                self.dtypes[name] = DTYPES[part.get_dtype()]
                self.shapes[name], self._files[name] = tuple(part.get_shape()), opened
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is no sound safetensors file ({' '.join(str(error).split())[:120]}); fetch it again"
            ) from error

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def _promised(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the index of several files (tensor name to file); {} if there is no index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no weight_map of tensor names to files; fetch it again")
    for name in names.values():
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names the file {name!r}; only safetensors files beside it are read")
        if not (path / name).is_file():
            raise InputError(f"{path / name} does not exist, but {INDEX} names it; fetch it")
    return {tensor: path / name for tensor, name in names.items()}


def _single(path: pathlib.Path) -> pathlib.Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.exists():
        raise InputError(f"{path} does not exist; give a directory that holds {SINGLE}")
    found = [path] if path.is_file() else sorted(path.iterdir())
    safe = [file for file in found if file.suffix == ".safetensors"]
    if (path / SINGLE).is_file() or len(safe) == 1:
        return path / SINGLE if (path / SINGLE).is_file() else safe[0]
    if safe:
        raise InputError(f"{path} holds {len(safe)} safetensors files and no {INDEX}; fetch that too")
    if pickled := [f for f in found if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")]:
        raise InputError(
            f"{pickled[0]} is pickled, and opening it would run code that it contains; give {SINGLE} instead "
            "(transformers' save_pretrained writes it)"
        )
    raise InputError(f"{path} holds no safetensors file; give a directory with {SINGLE}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object. Raises InputError if the file is missing or has none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a directory in Hugging Face's layout") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; give a model's config.json")
    return value


def write(directory: pathlib.Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or several files of up to `shard_bytes` and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, x in tensors.items():
        if x.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = np.ascontiguousarray(x).reshape(x.shape)
        room -= x.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
        total = {"total_size": sum(x.nbytes for x in tensors.values())}
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (directory / INDEX).write_text(json.dumps({"metadata": total, "weight_map": weight_map}, indent=2))
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
