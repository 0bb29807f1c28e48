"""Where records come from: any TFDS dataset, the bundled ones, or files; one prefix for each kind.

    source = open_source("mnist", "train", data_dir)
    source.read(np.array([3, 1]))  # {"image": uint8 (2, 28, 28, 1), "label": int64 (2,)}

A source gives random access, so the order of a run can be a pure function of (seed, step). For that a TFDS
dataset has to be prepared as array_record; scripts/prepare_data.py does it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Unpack

from bigmodel.data import delimited, tfds
from bigmodel.data.delimited import TableFiles
from bigmodel.data.source import Feature as Feature
from bigmodel.data.source import Source as Source
from bigmodel.data.text_files import PairFiles, TextFiles

log = logging.getLogger("bigmodel")


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
        name: `mnist`, `name/config:version` (TFDS), a bundled one such as `digits`, `text:GLOB`, `pairs:GLOB`
            or `table:GLOB`.
        split: a split's name, or a TFDS slice of it such as `train[:10%]`.
        data_dir: TFDS's directory; None is its own default.
        keys: the features to read; None reads all plain ones (images, labels, text).
        cache: keep decoded records of fixed size in memory, so each is decoded once.
        table: how a table's columns are read.

    Raises:
        InputError: unknown or not prepared dataset, unknown split, no data, no random access.
    """
    if name.startswith("text:"):
        return TextFiles(name, split)
    if name.startswith("pairs:"):
        return PairFiles(name, split)
    if name.startswith("table:"):
        return TableFiles(name, split, **table)
    return tfds.TfdsSource(name, split, data_dir, keys=keys, cache=cache)


def features_of(
    name: str, data_dir: str | None = None, **table: Unpack[delimited.Reading]
) -> Mapping[str, Feature]:
    """The features of a dataset whose data need not be there (they are part of its TFDS code); a table's
    columns are read from its files.

    Raises:
        InputError: unknown dataset.
    """
    if name.startswith("text:"):
        return TextFiles.features
    if name.startswith("pairs:"):
        return PairFiles.features
    if name.startswith("table:"):
        return delimited.features(name, **table)
    return tfds.features(name, data_dir)
