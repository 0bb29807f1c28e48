"""The protocol of a source: records by index, with named and typed features."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from bigmodel.config import InputError

ALL = "all"  # a split for evaluation on other files than those of training: every record


@dataclass(frozen=True)
class Feature:
    """One column of a source. Text has dtype `text` and shape (); None in `shape` varies by record."""

    shape: tuple[int | None, ...]
    dtype: str
    num_classes: int | None = None
    names: tuple[str, ...] = ()  # of the classes


class Source(Protocol):
    """Records by index."""

    @property
    def features(self) -> Mapping[str, Feature]: ...

    fingerprint: str  # name, version, split, length and bytes: two equal ones hold the same records
    num_bytes: int  # as stored; 0 when unknown
    split_rule: str  # in words, how the records were divided; "" where the dataset has its own splits

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """(n,) int -> {feature: (n, *shape)}; text as an object array of UTF-8 bytes.

        Raises:
            InputError: a record is damaged.
        """
        ...


class Reading(TypedDict, total=False):
    """Settings of reading files. By default a column is numeric where nearly all its cells are numbers."""

    text: Collection[str]  # columns that are text, whatever their cells look like
    numbers: Collection[str]  # and that are numbers
    only: Collection[str] | None  # columns that may be numbers at all; None: all
    required: Collection[str]  # a row without a value there is a bad one
    decimal: str  # the sign before a number's fraction; auto: as the cells tell
    max_skipped: int  # so many bad rows are left out, each with a warning
    columns: Collection[str]  # name:column for each column that is called otherwise in the files
    split_by: str  # blocks: of each text, spread over it; auto
    test_fraction: float  # of the records, or of a text


TEST_FRACTION = 0.1


def is_test(content_hash: int, fraction: float) -> bool:
    """Decides by a hash of its content whether a record is held out; more are where `fraction` is larger."""
    return content_hash % 10 * 1000 + content_hash // 10 % 1000 < fraction * 10_000


def check_split(name: str, split: str) -> None:
    if split not in ("train", "test", ALL):
        raise InputError(
            f"split {split!r} of data.name={name!r} is unknown; set data.split or data.eval_split "
            "to train or test, or to all"
        )


def paths(name: str, example: str) -> list[str]:
    """The files of `text:GLOB` or `pairs:GLOB`, sorted; what exists by that very name is meant."""
    pattern = literal(os.path.expanduser(name.partition(":")[2]))
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise InputError(f"data.name={name!r} matches no file; give a path or a glob such as {example}")
    return found


def literal(pattern: str) -> str:
    """A glob whose longest beginning that exists, file or directory, is meant as it is written."""
    parts = pattern.split(os.sep)
    for count in range(len(parts), 0, -1):
        beginning = os.sep.join(parts[:count])
        if beginning and os.path.exists(beginning):
            return os.sep.join([glob.escape(beginning), *parts[count:]])
    return pattern
