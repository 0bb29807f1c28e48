"""Where records come from: any TFDS dataset, the bundled ones, or files; one prefix for each kind.

    source = open_source("mnist", "train", data_dir)
    source.read(np.array([3, 1]))  # {"image": uint8 (2, 28, 28, 1), "label": int64 (2,)}

A source gives random access, so the order of a run can be a pure function of (seed, step). For that a TFDS
dataset has to be prepared as array_record; scripts/prepare_data.py does it.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Unpack

from bigmodel.config import InputError
from bigmodel.data import delimited, image_folders, tfds
from bigmodel.data.delimited import TableFiles
from bigmodel.data.source import Feature as Feature
from bigmodel.data.source import Source as Source
from bigmodel.data.text_files import PairFiles, TextFiles

log = logging.getLogger("bigmodel")


# Prefix of data.name -> the class of a split, and the features by name. `table:` has settings of its own.
FILES: dict[str, tuple[Callable[[str, str], Source], Callable[[str], Mapping[str, Feature]]]] = {
    "text": (TextFiles, lambda name: TextFiles.features),
    "pairs": (PairFiles, lambda name: PairFiles.features),
    "folder": (image_folders.ImageFiles, image_folders.features_of),
    "images": (image_folders.ImageFiles, image_folders.features_of),
}


def _prefix(name: str) -> str:
    """Returns the kind of files that a name asks for; "" for a TFDS dataset.

    Raises:
        InputError: a plain path, with the prefix that fits it.
    """
    prefix = name.partition(":")[0]
    if prefix == "table" or prefix in FILES:
        return prefix
    path = pathlib.Path(name)
    plain = path.is_file() or path.suffix in SUFFIXES or name.startswith(("/", "./", "../", "~"))
    if plain and ":" not in name:
        kind = "folder" if path.expanduser().is_dir() else SUFFIXES.get(path.suffix, "text")
        raise InputError(
            f"data.name={name!r} is a path, not a dataset's name; write {kind}:{name} (prefixes are text:, "
            "pairs:, table:, ratings:, folder:, images:)"
        )
    return ""


SUFFIXES = {".txt": "text", ".md": "text", ".csv": "table", ".tsv": "table"}  # the likeliest prefix of each


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    keys: Collection[str] | None = None,
    cache: bool = True,
    **table: Unpack[delimited.Reading],
) -> Source:
    """Opens a split of a dataset; a bundled one is made first if need be.

    Args:
        name: `mnist`, `name/config:version` (TFDS), a bundled one such as `digits`, `text:GLOB`,
            `pairs:GLOB`, `table:GLOB`, `folder:DIR` or `images:GLOB`.
        split: a split's name, or a TFDS slice of it such as `train[:10%]`.
        data_dir: TFDS's directory; None is its own default.
        keys: the features to read; None reads all plain ones (images, labels, text).
        cache: keep decoded records of fixed size in memory, so each is decoded once.
        table: how a table's columns are read.

    Raises:
        InputError: unknown or not prepared dataset, unknown split, no data, no random access.
    """
    prefix = _prefix(name)
    if prefix == "table":
        return TableFiles(name, split, **table)
    if prefix:
        return FILES[prefix][0](name, split)
    return tfds.TfdsSource(name, split, data_dir, keys=keys, cache=cache)


def features_of(
    name: str, data_dir: str | None = None, **table: Unpack[delimited.Reading]
) -> Mapping[str, Feature]:
    """The features of a dataset whose data need not be there (they are part of its TFDS code); a table's
    columns are read from its files.

    Raises:
        InputError: unknown dataset.
    """
    prefix = _prefix(name)
    if prefix == "table":
        return delimited.features(name, **table)
    if prefix:
        return FILES[prefix][1](name)
    return tfds.features(name, data_dir)
