"""Reads and writes models in Hugging Face's layout: config.json and safetensors.

Reads GPT-2, Llama, Mixtral, BERT, T5 (v1.0, v1.1), ViT and ResNet. Checks every tensor's name, shape and
dtype against the model before it reads any, and ignores none silently.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 -- so that numpy knows bfloat16 by name
import numpy as np
from safetensors.numpy import load_file, save_file

from bigmodel import config as config_lib
from bigmodel.config import Config, InputError, families
from bigmodel.huggingface import companions, configs, layouts, names, processors
from bigmodel.huggingface.files import Tensors, read_json, write
from bigmodel.huggingface.layouts import Layout

__all__ = [
    "Layout",
    "Pretrained",
    "as_imported",
    "companions",
    "describes",
    "image_of",
    "names",
    "open_pretrained",
    "tensors_of",
    "write",
    "write_config",
    "write_unused",
]

NAMES, UNUSED = "tensors.json", "unused.safetensors"  # what an export of an imported model puts back
FLOATS = ("float32", "bfloat16", "float16")
Arrays = dict[str, np.ndarray]


class Pretrained(NamedTuple):
    """A Hugging Face model before its parameters are read."""

    directory: pathlib.Path
    config: Config
    hf: dict[str, Any]  # config.json
    layout: Layout
    tensors: Tensors
    files: dict[str, str]  # name in the layout -> name in the file

    def arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Reads parameters and statistics by our paths, in the file's dtypes.

        Args:
            shapes: the arrays' shapes by path; a stack's have a leading [depth].

        Raises:
            InputError: a tensor that is missing, left over, or of another shape or dtype.
        """
        self._check(shapes)
        out: Arrays = {}
        for ours, theirs, index, form in self.layout.expand():
            read = form.read(self.tensors.read(self.files[theirs]))
            x = np.split(read, form.pieces, -1)[form.piece]
            if not index:
                out[ours] = np.array(x)
                continue
            if ours not in out:
                out[ours] = np.empty(shapes[ours], x.dtype)
            out[ours][index] = x
        return out

    def class_names(self) -> tuple[str, ...]:
        """Returns class names by number; () for a model without classes."""
        where = str(self.directory / "config.json")
        return names.classes(self.hf, where) if self.config.task.one_output else ()

    def channels(self) -> int:
        """Returns the number of channels of an image."""
        return configs.number(self.hf, "num_channels", 3, str(self.directory / "config.json"))

    def unused(self) -> Arrays:
        """Reads the tensors that the model does not need, by their names in the file."""
        return {n: self.tensors.read(n) for n in self.tensors.shapes if re.search(self.layout.unused, n)}

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        where, wanted = self.tensors.path, _shapes_there(self.layout, shapes)
        missing_ours = shapes.keys() - {ours for ours, _, _, _ in self.layout.expand()}
        if missing_ours:
            raise InputError(f"{where}: no tensor of this layout holds {min(missing_ours)!r}")
        for name, shape in wanted.items():
            if name not in self.files:
                raise InputError(f"{where} lacks the tensor {name!r} that its config.json needs")
            file = self.files[name]
            if self.tensors.shapes[file] != shape:
                has = list(self.tensors.shapes[file])
                raise InputError(f"{where}: {file!r} is {has}, but its config.json makes it {list(shape)}")
            if self.tensors.dtypes[file] not in FLOATS:
                dtype = self.tensors.dtypes[file]
                raise InputError(f"{where}: {file!r} is {dtype}; it must be one of {', '.join(FLOATS)}")
        for name, file in self.files.items():
            if name in self.layout.copies:
                self._check_copy(file, self.layout.copies[name])
            elif name not in wanted and not re.search(self.layout.unused, name):
                raise InputError(
                    f"{where}: no model here has a place for {file!r}; remove it, or read a file without it"
                )

    def _check_copy(self, file: str, first: str) -> None:
        a, b = self.tensors.read(file), self.tensors.read(self.files[first])
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            raise InputError(
                f"{self.tensors.path}: {file!r} differs from {self.files[first]!r}, though config.json ties "
                "them; set tie_word_embeddings to false there, or remove the former"
            )


def open_pretrained(directory: str | os.PathLike[str]) -> Pretrained:
    """Reads config.json and the headers of the safetensors files, but no tensor yet.

    The config's `param_dtype` is the widest dtype of the file; `data` follows the directory's tokenizer.

    Raises:
        InputError: see `configs.read` and `files.Tensors`.
    """
    path = pathlib.Path(directory)
    where = str(path / "config.json")
    hf, tensors = read_json(path / "config.json"), Tensors(path)
    tree = configs.read(hf, set(tensors.shapes), where)
    dtypes = [dtype for dtype in FLOATS if dtype in tensors.dtypes.values()]
    tree |= {"param_dtype": "float32" if len(dtypes) > 1 else (dtypes or ["float32"])[0], "batch_size": 8}
    if "vocab_size" in tree["model"]:
        named = tree["task"]["name"] in families.LABEL_TASKS
        tree["data"] = {"tokenizer": f"hf:{path.absolute()}"} | ({"name": names.NOWHERE} if named else {})
    else:
        size = 0 if hf["model_type"] == "resnet" else tree["data"]["image_size"]
        channels = configs.number(hf, "num_channels", 3, where)
        tree["data"] |= processors.read(path, hf["model_type"], size, channels)
    depth = max(tree["model"].get(key, 0) for key in ("depth", "decoder_depth"))
    if depth > len(tensors.shapes):
        raise InputError(f"{where} asks for {depth} layers, but there are {len(tensors.shapes)} tensors")
    config = config_lib.from_dict(tree)
    layout = layouts.of(config)
    if layout is None:
        raise InputError(f"{where}: no model here has these settings")
    return Pretrained(path, config, hf, layout, tensors, _files(layout, tensors))


def _files(layout: Layout, tensors: Tensors) -> dict[str, str]:
    """Maps names of the layout to the file's, which may lack the prefix or be TensorFlow's old ones."""
    bare = not any(name.startswith(layout.prefix) for name in tensors.shapes)
    known = {theirs for _, theirs, _, _ in layout.expand()} | layout.copies.keys()
    out = {}
    for file in tensors.shapes:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", file)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        out[layout.prefix + name if bare and name not in known else name] = file
    return out


def _shapes_there(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of their tensors, given the shapes of our arrays."""

    def empty(ours: str, index: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shapes[ours][len(index) :])

    return {name: x.shape for name, x in _joined(layout, empty) if x is not None}


def _joined(layout: Layout, array: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, their tensor) from `array(our path, index)`; the rows list pieces in order."""
    pieces: dict[str, list[np.ndarray]] = {}
    for ours, theirs, index, form in layout.expand():
        x = form.write(array(ours, index))
        if form.pieces == 1:
            yield theirs, x
            continue
        pieces.setdefault(theirs, []).append(x)
        if len(pieces[theirs]) == form.pieces:
            yield theirs, np.concatenate(pieces.pop(theirs), -1)


def tensors_of(config: Config, arrays: Mapping[str, np.ndarray]) -> tuple[Layout | None, Arrays]:
    """Converts parameters and statistics by our paths: returns (layout, tensors by Hugging Face's names).

    A model that transformers has no class for keeps our paths, with dots; its layout is None.
    """
    layout = layouts.of(config)
    if layout is None:
        return None, {path.replace("/", "."): x for path, x in arrays.items()}
    out = dict(_joined(layout, lambda ours, index: arrays[ours][index]))
    return layout, out


def write_config(
    config: Config, layout: Layout, arrays: Mapping[str, np.ndarray], class_names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns the config.json of an export; `arrays` as for `tensors_of`."""
    size, channels = image_of(config, arrays)
    return configs.write(config, layout, channels, size, class_names)


def image_of(config: Config, arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns the size and the channels of the images that a model reads; 0 and 3 if it reads none."""
    c = config.model
    if isinstance(c, families.ViT):
        patches = arrays["positions/table"].shape[0] - 1
        return round(patches**0.5) * c.patch, arrays["embed/kernel"].shape[0] // c.patch**2
    if isinstance(c, families.ResNet):
        return config.data.image_size, arrays["stem/conv/kernel"].shape[2]
    return 0, 3


# ------------------------------------------------------------------------------------- files of an import


def write_unused(pretrained: Pretrained, directory: pathlib.Path) -> None:
    """Stores the file's names and dtypes, and the tensors that the model has no place for."""
    dtypes, shapes = pretrained.tensors.dtypes, pretrained.tensors.shapes
    names = {file: [name, dtypes[file], list(shapes[file])] for name, file in pretrained.files.items()}
    (directory / NAMES).write_text(json.dumps({"param_dtype": pretrained.config.param_dtype, "names": names}))
    if unused := pretrained.unused():
        save_file(unused, directory / UNUSED, metadata={"format": "pt"})
        (directory / UNUSED).chmod(0o644)


def describes(directory: pathlib.Path, config: Config) -> bool:
    """Returns true if the config.json that came with an import still describes its model."""
    stored, hf = read_json(directory / NAMES), read_json(directory / "config.json")
    tensors = {name for name, _, _ in stored["names"].values()}
    tree = configs.read(hf, tensors | stored["names"].keys(), str(directory / "config.json"))
    return config_lib.from_dict(tree).model.filled(config.model) == config.model


def as_imported(directory: pathlib.Path, tensors: Mapping[str, np.ndarray], config: Config) -> Arrays:
    """Returns `tensors` by the names and in the dtypes of the imported file, with its unused tensors."""
    stored = read_json(directory / NAMES)
    aside = load_file(directory / UNUSED) if (directory / UNUSED).is_file() else {}
    layout = layouts.of(config)
    copies = layout.copies if layout else {}
    same_dtype = stored["param_dtype"] == config.param_dtype
    out = {}
    for file, (name, dtype, _) in stored["names"].items():
        x = aside.get(file, tensors.get(copies.get(name, name)))
        if x is None:
            raise InputError(
                f"{directory / NAMES} names {file!r}, which this model lacks; remove {directory}"
            )
        out[file] = x.astype(dtype) if same_dtype else x
    return out
