"""Parallel text: a source and its target in each record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Unpack

import numpy as np

from bigmodel.config import InputError
from bigmodel.data import columnar, delimited
from bigmodel.data.source import ALL, TEST_FRACTION, Feature, Reading, check_split, is_test, paths
from bigmodel.data.text_files import content_hash, read_bytes


class PairFiles:
    """`pairs:GLOB`: files with a source and its target on each line, a tab between them, or parquet and JSON
    lines with these columns.

    Every line is a record: `source`, `target`, and `text`, which is both (for a tokenizer to learn from).

    About `test_fraction` of the lines, by a hash of the content, are `test`, the others `train`.
    """

    features: Mapping[str, Feature] = {name: Feature((), "text") for name in ("source", "target", "text")}

    def __init__(self, name: str, split: str, **how: Unpack[Reading]) -> None:
        """Reads all lines.

        Raises:
            InputError: no file, an unknown split, a line that is no pair or no UTF-8.
        """
        check_split(name, split)
        if columnar.is_columnar(name):
            pairs = _columns(name, how)
        else:
            pairs = [pair for path in paths(name, "pairs:data/*.tsv") for pair in _lines(path)]
        self.split_rule, fraction = "by a hash of each line", how.get("test_fraction", TEST_FRACTION)
        self._pairs = [
            pair
            for pair in pairs
            if split == ALL or is_test(content_hash(b"\t".join(pair)), fraction) == (split == "test")
        ]
        if not self._pairs:
            raise InputError(f"data.name={name!r} has no line in split {split!r}; give more lines")
        lines = [b"\t".join(pair) for pair in self._pairs]
        self.num_bytes = sum(map(len, lines))
        digest = hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]
        self.fingerprint = f"pairs/{split} records={len(self)} bytes={self.num_bytes} sha256={digest}"

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        out = {key: np.empty(len(indices), object) for key in self.features}
        for row, index in enumerate(indices):
            source, target = self._pairs[index]
            out["source"][row], out["target"][row], out["text"][row] = source, target, source + b"\t" + target
        return out


def _columns(name: str, how: Reading) -> list[tuple[bytes, bytes]]:
    """Reads the columns source and target. Raises InputError where one is missing, or a cell of it empty."""
    both, columns, skipped = ("source", "target"), how.get("columns", ()), how.get("max_skipped", 0)
    table = delimited.read(name, only=(), required=both, columns=columns, max_skipped=skipped)
    if missing := [key for key in both if key not in table.columns]:
        raise InputError(
            f"data.name={name!r} has no column {missing[0]!r}, but {', '.join(table.columns)}; set "
            "data.columns, e.g. source:en,target:fr"
        )
    texts = (table.columns[key].tolist() for key in both)
    return [(source.encode(), target.encode()) for source, target in zip(*texts, strict=True)]


def _lines(path: str) -> list[tuple[bytes, bytes]]:
    """The pairs of a file, each checked; empty lines are left out."""
    lines, pairs = read_bytes(path).split(b"\n"), list[tuple[bytes, bytes]]()
    for number, line in enumerate(lines, 1):
        columns = line.removesuffix(b"\r").split(b"\t")
        if columns == [b""]:
            continue
        if len(columns) != 2 or not columns[0].strip() or not columns[1].strip():
            found = f"{len(columns)} columns" if len(columns) != 2 else "an empty column"
            raise InputError(f"{path} line {number} has {found}; write source, one tab, target")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} line {number} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
            ) from None
        pairs.append((columns[0], columns[1]))
    return pairs
