"""Pairs of texts, packed: several in a row, each its own segment of the input and of the target.

Pairs are encoded once, into one stream of tokens (corpus.py), and rows are made once for a split: so an
example is a row, and which pairs it holds does not change over a run.

Legend: N pairs, R rows.
"""

from __future__ import annotations

import logging

import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import corpus, token_cache
from bigmodel.data.source import Source
from bigmodel.data.tokenizers import Tokenizer

OPEN = 16  # rows that are filled at once: more hold fewer gaps, but take longer to look through

log = logging.getLogger("bigmodel")


class Rows:
    """Rows by index: `pairs`, an object array of lists of (ids of the input, ids of the target).

    Args:
        inputs, targets: tokens that a row has room for, an end for each pair among them.
        mixed: rows hold pairs from all over the split, as training wants; else neighbors.

    Raises:
        InputError: a text with the tokenizer's separator in it.
    """

    def __init__(
        self, config: Config, source: Source, tokenizer: Tokenizer, inputs: int, targets: int, *,
        pack: bool, mixed: bool,
    ) -> None:  # fmt: skip
        self._stream = corpus.token_stream(_Alternating(source), tokenizer, cache=config.data.cache)
        self._bounds = np.flatnonzero(self._stream == tokenizer.separator)
        count = len(source)
        if len(self._bounds) != 2 * count + 1:
            raise InputError(
                f"data.name={config.data.name!r} has a text with the tokenizer's separator in it; remove it "
                "there, or set another data.tokenizer"
            )
        length_N2 = np.diff(self._bounds).reshape(count, 2)  # one of a separator, for the end
        room = np.array([inputs, targets])
        order = np.random.default_rng(0).permutation(count) if mixed else np.arange(count)
        fitting_N2 = np.minimum(length_N2, room)
        self._rows = packed(fitting_N2, room.tolist(), order) if pack else [[n] for n in range(count)]
        cut, filled = int((length_N2 > room).any(1).sum()), fitting_N2.sum() / (len(self._rows) * room.sum())
        log.info(
            f"pairs     {count:,} in {len(self._rows):,} rows, {filled:.0%} of whose positions hold a token; "
            f"{cut:,} of them are cut to {inputs} and {targets} tokens (seq_len, task.target_len)"
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Raises InputError where a token file is damaged."""
        out = np.empty(len(indices), object)
        for at, index in enumerate(indices.tolist()):
            out[at] = [(self._text(2 * n), self._text(2 * n + 1)) for n in self._rows[index]]
        return {"pairs": out}

    def _text(self, number: int) -> np.ndarray:
        first, last = self._bounds[number : number + 2]
        if isinstance(self._stream, token_cache.TokenFile):
            self._stream.check(np.array([first]), np.array([last]))
        return np.asarray(self._stream[first + 1 : last], np.int32)


def packed(length_N2: np.ndarray, room: list[int], order: np.ndarray) -> list[list[int]]:
    """Packs pairs, in this order, each into the first of `OPEN` rows that has room for both its texts; where
    none has, the fullest row is closed. -> the pairs of each row."""
    rows: list[list[int]] = []
    free: list[list[int]] = []  # of the open rows: tokens left of the input and of the target, the row
    for n, (source, target) in zip(order.tolist(), length_N2[order].tolist(), strict=True):
        fits = (row for row in free if row[0] >= source and row[1] >= target)
        row = next(fits, None)
        if row is None:
            if len(free) == OPEN:
                free.remove(min(free, key=lambda row: row[0] + row[1]))
            row = [*room, len(rows)]
            free.append(row)
            rows.append([])
        row[0] -= source
        row[1] -= target
        rows[row[2]].append(n)
    return rows


class _Alternating:
    """A source of pairs as one of texts: input, target, input, target, ..."""

    def __init__(self, source: Source) -> None:
        self._source, self.features = source, {"text": source.features["source"]}
        self.num_bytes, self.split_rule = source.num_bytes, source.split_rule
        self.fingerprint = f"both texts of {source.fingerprint}"

    def __len__(self) -> int:
        return 2 * len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        numbers, at = np.unique(indices // 2, return_inverse=True)
        records = self._source.read(numbers)
        return {"text": np.where(indices % 2 == 1, records["target"][at], records["source"][at])}
