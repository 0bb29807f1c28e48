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
from bigmodel.data import columnar, delimited, image_folders, tfds
from bigmodel.data.delimited import TableFiles
from bigmodel.data.pair_files import PairFiles
from bigmodel.data.source import TEST_FRACTION, Reading
from bigmodel.data.source import Feature as Feature
from bigmodel.data.source import Source as Source
from bigmodel.data.text_files import TextFiles

log = logging.getLogger("bigmodel")


# Prefix of data.name -> the class of a split, and the features by name.
FILES: dict[str, tuple[Callable[..., Source], Callable[..., Mapping[str, Feature]]]] = {
    "table": (TableFiles, delimited.features),
    "text": (TextFiles, lambda name, **how: TextFiles.features),
    "pairs": (PairFiles, lambda name, **how: PairFiles.features),
    "folder": (image_folders.ImageFiles, image_folders.features_of),
    "images": (image_folders.ImageFiles, image_folders.features_of),
}


def _prefix(name: str) -> str:
    """Returns the kind of files that a name asks for; "" for a TFDS dataset.

    Raises:
        InputError: a plain path, with the prefix that fits it.
    """
    prefix = name.partition(":")[0]
    if prefix == "text" and columnar.is_columnar(name):
        return "table"
    if prefix in FILES:
        return prefix
    path = pathlib.Path(name)
    plain = path.is_file() or path.suffix in SUFFIXES or name.startswith(("/", "./", "../", "~"))
    if plain and ":" not in name:
        path = path.expanduser()
        kind = "folder" if path.is_dir() else _kind_by_columns(path) or SUFFIXES.get(path.suffix, "text")
        raise InputError(
            f"data.name={name!r} is a path, not a dataset's name; write {kind}:{name} (prefixes are text:, "
            "pairs:, table:, ratings:, folder:, images:)"
        )
    return ""


def _kind_by_columns(path: pathlib.Path) -> str:
    """Returns the prefix that a file's columns speak for; "" if they are any table's, or it is large."""
    is_columnar = columnar.is_columnar(path.name)
    if not path.is_file() or not (is_columnar or path.suffix in (".csv", ".tsv")):
        return ""
    try:
        small = path.stat().st_size < LARGE
        row = set(delimited.rows_of(str(path))[0][1] if small else ())
    except InputError:
        return ""
    pairs = is_columnar and {"source", "target"} <= row
    rates = all(key in row or delimited.known_as(key, row) for key in ("user", "item"))
    return "ratings" if rates else "images" if "path" in row else "pairs" if pairs else ""


LARGE = 1 << 26  # bytes: a file that is not read for a message
SUFFIXES = {  # the likeliest prefix of each
    ".txt": "text", ".md": "text", ".csv": "table", ".tsv": "table", ".parquet": "table",
    ".jsonl": "text", ".ndjson": "text",
}  # fmt: skip


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    keys: Collection[str] | None = None,
    cache: bool = True,
    **how: Unpack[Reading],
) -> Source:
    """Opens a split of a dataset; a bundled one is made first if need be.

    Args:
        name: `mnist`, `name/config:version` (TFDS), a bundled one such as `digits`, `text:GLOB`,
            `pairs:GLOB`, `table:GLOB`, `folder:DIR` or `images:GLOB`.
        split: a split's name, or a TFDS slice of it such as `train[:10%]`.
        data_dir: TFDS's directory; None is its own default.
        keys: the features to read; None reads all plain ones (images, labels, text).
        cache: keep decoded records of fixed size in memory, so each is decoded once.
        how: files are read and divided.

    Raises:
        InputError: unknown or not prepared dataset, unknown split, no data, no random access.
    """
    prefix = _prefix(name)
    if how.get("split_by", "auto") == "blocks" and prefix != "text":
        raise InputError(f"data.split_by=blocks cuts text: files, but data.name={name!r}; set it to auto")
    if prefix:
        return FILES[prefix][0](name, split, **how)
    if how.get("test_fraction", TEST_FRACTION) != TEST_FRACTION or how.get("columns"):
        raise InputError(
            f"data.name={name!r} has splits and names of its own; leave out data.test_fraction and "
            "data.columns"
        )
    return tfds.TfdsSource(name, split, data_dir, keys=keys, cache=cache)


def features_of(name: str, data_dir: str | None = None, **how: Unpack[Reading]) -> Mapping[str, Feature]:
    """The features of a dataset whose data need not be there (they are part of its TFDS code); a table's
    columns are read from its files.

    Raises:
        InputError: unknown dataset.
    """
    prefix = _prefix(name)
    if prefix:
        return FILES[prefix][1](name, **how)
    return tfds.features(name, data_dir)
