"""CSV and TSV files with a header, as columns of text or numbers; errors name the file and the line."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from bigmodel.config import InputError
from bigmodel.data import files
from bigmodel.data.files import Feature

log = logging.getLogger("bigmodel")

MISSING = {"", "na", "n/a", "nan", "null", "?"}  # cells of a column of numbers that hold none
MOSTLY = 0.9  # of the filled cells are numbers: then the column is one of numbers, and the others are wrong
SPLIT = "split"  # a column of this name says which split a row is of


class Rows(NamedTuple):
    """All rows of some files, column by column."""

    columns: dict[str, np.ndarray]  # str in object arrays (n,), or float64 with NaN for a missing number
    path: np.ndarray  # object (n,)
    line: np.ndarray  # int64 (n,): where a row ends
    hash: np.ndarray  # uint64 (n,), of the cells as written: what decides a row's split, wherever it stands

    def where(self, index: int) -> str:
        return f"{self.path[index]} line {self.line[index]}"

    def digest(self) -> str:
        return hashlib.sha256(self.hash.tobytes()).hexdigest()[:16]

    def of(self, chosen: np.ndarray) -> Rows:
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Rows(columns, self.path[chosen], self.line[chosen], self.hash[chosen])


class _Skips:
    """Counts bad rows; one too many is an error."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def bad(self, where: str, problem: str) -> None:
        if self._count >= self._most:
            told = f"; data.max_skipped={self._most} are skipped already" if self._most else ""
            raise InputError(f"{where} {problem}; correct it, or skip such rows by data.max_skipped{told}")
        self._count += 1
        log.warning("skipped %d of at most %d: %s %s", self._count, self._most, where, problem)


def read(
    name: str, *, text: Collection[str] = (), numbers: Collection[str] = (), max_skipped: int = 0
) -> Rows:
    """The rows of `table:GLOB` or `ratings:GLOB`. A column is of numbers where nearly all its cells are.

    Args:
        text, numbers: columns that are text, or numbers, whatever their cells look like.
        max_skipped: so many bad rows are left out, each with a warning.

    Raises:
        InputError: no file, headers that differ, and one bad row too many: cells missing or over, no UTF-8,
            no number in a column of numbers.
    """
    paths = files.paths(name, f"{name.partition(':')[0]}:data/*.csv")
    stamp = tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)
    return _read(stamp, tuple(sorted(text)), tuple(sorted(numbers)), max_skipped)


@functools.lru_cache(maxsize=4)  # a pipeline asks for each split, and for the columns before
def _read(
    stamp: tuple[tuple[str, int, int], ...], text: tuple[str, ...], numbers: tuple[str, ...], most: int
) -> Rows:
    skips, header, rows = _Skips(most), None, list[tuple[str, int, list[str]]]()
    for path, _, _ in stamp:
        lines = _lines(path, skips)
        _, first = next(lines, (0, []))
        first = [cell.strip() for cell in first]
        if not all(first) or len(set(first)) < len(first) or not first:
            raise InputError(f"{path} line 1 is no header of different names: {first}; write one")
        if header is not None and first != header:
            raise InputError(f"{path} has another header than {stamp[0][0]}; give files of one kind")
        header = first
        for line, cells in lines:
            if len(cells) != len(header):
                skips.bad(f"{path} line {line}", f"has {len(cells)} cells, but the header {len(header)}")
            else:
                rows.append((path, line, cells))
    if header is None or not rows:
        raise InputError(f"{stamp[0][0]} has no rows after its header; give some")
    table = Rows(
        {name: _objects([row[2][at] for row in rows]) for at, name in enumerate(header)},
        _objects([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array(
            [files.content_hash("\x1f".join(row[2]).encode("utf-8", "replace")) for row in rows], np.uint64
        ),
    )
    return _with_numbers(table, text, numbers, skips)


def _objects(values: list[str]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _lines(path: str, skips: _Skips) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row that is not empty, the header first."""
    content = files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        decoded, doubtful = content.decode("utf-8"), False
    except UnicodeDecodeError:
        decoded, doubtful = content.decode("utf-8", "surrogateescape"), True
    first = decoded.partition("\n")[0]
    delimiter = max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(decoded, newline=""), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            skips.bad(f"{path} line {reader.line_num}", f"is no row of a CSV file ({error})")
            continue
        if doubtful and any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
            skips.bad(f"{path} line {reader.line_num}", "is not UTF-8 text")
        elif any(cells):
            yield reader.line_num, cells


def _with_numbers(table: Rows, text: Collection[str], numbers: Collection[str], skips: _Skips) -> Rows:
    """Columns of numbers become float64; the rows of cells that are none are left out."""
    columns, keep = dict(table.columns), np.ones(len(table.line), bool)
    for name, cells in table.columns.items():
        if name in text or name == SPLIT:
            continue
        values, wrong = _numbers(cells, len(cells) if name in numbers else None)
        if values is None:
            continue
        for index in wrong:
            fix = "" if name in numbers else " (name the column in data.categorical if it holds text)"
            if keep[index]:
                problem = f"has {cells[index]!r} in {name!r}, a column of numbers{fix}"
                skips.bad(table.where(index), problem)
            keep[index] = False
        columns[name] = values
    return table._replace(columns=columns).of(keep)


def _numbers(cells: np.ndarray, allowed: int | None) -> tuple[np.ndarray | None, list[int]]:
    """-> (values, NaN where missing or none; which are none), or (None, []) for a column that is text.

    Args: allowed: so many cells may be no numbers; None: a tenth of those that are filled.
    """
    values, wrong, empty = np.full(len(cells), np.nan), list[int](), 0
    most = len(cells) * (1 - MOSTLY) if allowed is None else allowed
    for index, cell in enumerate(cells):
        if cell.strip().lower() in MISSING:
            empty += 1
            continue
        try:
            value = float(cell) if "_" not in cell else math.nan  # Python reads 1_000; other programs do not
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            values[index] = value
        else:
            wrong.append(index)
            if len(wrong) > most:
                return None, []
    filled = len(cells) - empty
    is_text = allowed is None and (not filled or len(wrong) > filled * (1 - MOSTLY))
    return (None, []) if is_text else (values, wrong)


class TableFiles:
    """`table:GLOB`: each row is an example. About a tenth, by a hash of the content, are `test`, the others
    `train`; or a column `split` says so."""

    def __init__(
        self,
        name: str,
        split: str,
        *,
        text: Collection[str] = (),
        numbers: Collection[str] = (),
        max_skipped: int = 0,
    ) -> None:
        table = read(name, text=text, numbers=numbers, max_skipped=max_skipped)
        if SPLIT in table.columns:
            chosen = table.columns[SPLIT] == split
        else:
            files.check_split(name, split)
            chosen = (table.hash % np.uint64(10) == 0) == (split == "test")
        if not chosen.any():
            raise InputError(
                f"data.name={name!r} has no rows in split {split!r}; give more, or another split"
            )
        self._rows = table.of(chosen)
        self.features = features(name, text=text, numbers=numbers, max_skipped=max_skipped)
        self.num_bytes = sum(os.stat(path).st_size for path in set(table.path))
        self.fingerprint = f"table/{split} records={len(self)} sha256={self._rows.digest()}"

    def __len__(self) -> int:
        return len(self._rows.line)

    def where(self, index: int) -> str:
        return self._rows.where(index)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Numbers as float64 or int64, text as UTF-8 bytes."""
        out = {}
        for key, feature in self.features.items():
            cells = self._rows.columns[key][indices]
            if feature.dtype == "text":
                cells = np.array([cell.encode() for cell in cells] + [None], object)[:-1]
            out[key] = cells.astype(object if feature.dtype == "text" else feature.dtype)
        return out


def features(
    name: str, *, text: Collection[str] = (), numbers: Collection[str] = (), max_skipped: int = 0
) -> Mapping[str, Feature]:
    """The columns of `table:GLOB`: text, whole numbers (int64), or numbers (float64). Reads the files."""
    out = {}
    for key, column in read(name, text=text, numbers=numbers, max_skipped=max_skipped).columns.items():
        whole = column.dtype != object and bool((np.floor(column) == column).all())
        dtype = "text" if column.dtype == object else "int64" if whole else "float64"
        if key != SPLIT:
            out[key] = Feature((), dtype)
    return out
