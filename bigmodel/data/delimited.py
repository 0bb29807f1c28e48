"""CSV, TSV, parquet and JSON lines as columns of text or numbers; errors name the file and the line."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import numpy as np

from bigmodel.config import InputError
from bigmodel.data import cells, columnar, source, text_files
from bigmodel.data.source import ALL, Feature, Reading

log = logging.getLogger("bigmodel")

Row = dict[str, Any]

MOSTLY = 0.9  # of the filled cells are numbers: then the column is one of numbers, and the others are wrong
MANY = 0.5  # are numbers, but not so many: the column is text, and that is said
SPLIT = "split"  # a column of this name says which split a row is of


class Rows(NamedTuple):
    """All rows of some files, column by column."""

    # str in object arrays (n,), float64 with NaN for a missing number, or int64 where float64 would round
    columns: dict[str, np.ndarray]
    path: np.ndarray  # object (n,)
    line: np.ndarray  # int64 (n,): where a row ends
    hash: np.ndarray  # uint64 (n,), of the cells as written: what decides a row's split, wherever it stands

    def where(self, index: int) -> str:
        return columnar.where(self.path[index], self.line[index])

    def digest(self) -> str:
        return hashlib.sha256(self.hash.tobytes()).hexdigest()[:16]

    def of(self, chosen: np.ndarray) -> Rows:
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Rows(columns, self.path[chosen], self.line[chosen], self.hash[chosen])


class _Skips:
    """Counts bad rows; one too many is an error."""

    def __init__(self, most: int, fix: str) -> None:
        self._most, self._count, self._fix = most, 0, fix

    def bad(self, where: str, problem: str) -> None:
        if self._count >= self._most:
            reported = f"; data.max_skipped={self._most} are skipped already" if self._most else ""
            raise InputError(f"{where} {problem}; {self._fix}{reported}")
        self._count += 1
        log.warning("skipped %d of at most %d: %s %s", self._count, self._most, where, problem)


class _How(NamedTuple):
    """`Reading` as a key of a cache."""

    text: frozenset[str]
    numbers: frozenset[str]
    only: frozenset[str] | None
    required: frozenset[str]
    decimal: str
    max_skipped: int
    columns: tuple[str, ...]
    empty: bool  # rows whose cells are all empty count, too
    fix: str  # of a bad row


def _how(empty: bool = False, **how: Unpack[Reading]) -> _How:
    text, numbers, required = (frozenset(how.get(key, ())) for key in ("text", "numbers", "required"))  # type: ignore[call-overload]
    only = how.get("only")
    return _How(
        text, numbers, None if only is None else frozenset(only), required,
        how.get("decimal", "auto"), how.get("max_skipped", 0), tuple(how.get("columns", ())), empty,
        "correct it" if empty else "correct it, or skip such rows by data.max_skipped",
    )  # fmt: skip


def read(name: str, **how: Unpack[Reading]) -> Rows:
    """The rows of `table:GLOB`, `ratings:GLOB` and other files with columns.

    Raises:
        InputError: no file, headers that differ, numbers that may be read in two ways, quotes that do not
            close, and one bad row too many: cells missing or over, no UTF-8, no number where one has to be.
    """
    paths = source.paths(name, f"{name.partition(':')[0]}:data/*.csv")
    return _read(tuple(map(_stamp, paths)), _how(**how))


def rows_of(
    path: str, numbers: Collection[str] = (), decimal: str = "auto", columns: Collection[str] = ()
) -> list[tuple[int, Row]]:
    """(line, {column: its number or text}) of each row of one file, read as `read` does; NaN is a missing
    number. Raises InputError as `read`."""
    how = _how(empty=True, numbers=numbers, only=numbers, decimal=decimal, columns=columns)
    table = _read((_stamp(path),), how)
    cells_of = [column.tolist() for column in table.columns.values()]
    rows = (dict(zip(table.columns, cells, strict=True)) for cells in zip(*cells_of, strict=True))
    return list(zip(table.line.tolist(), rows, strict=True))


def _stamp(path: str) -> tuple[str, int, int]:
    return path, os.stat(path).st_size, os.stat(path).st_mtime_ns


@functools.lru_cache(maxsize=4)  # a pipeline asks for each split, and for the columns before
def _read(stamp: tuple[tuple[str, int, int], ...], how: _How) -> Rows:
    skips, header, rows, signs = (
        _Skips(how.max_skipped, how.fix),
        None,
        list[tuple[str, int, list[str]]](),
        set[str](),
    )
    text = set[str]()
    for path, _, _ in stamp:
        if columnar.is_columnar(path):
            found = columnar.read(path, skips.bad)
            first, lines = found.header, iter(found.rows)
            signs.add(",")  # numbers have decimal points
        else:
            delimiter, lines = _lines(path, skips, how.empty)
            signs.add(delimiter)
            first = [cell.strip() for cell in next(lines, (0, []))[1]]
        if not all(first) or len(set(first)) < len(first) or not first:
            raise InputError(f"{path} line 1 is no header of different names: {first}; write one")
        calls = _calls(path, first, how)
        first = [calls.get(name, name) for name in first]
        if columnar.is_columnar(path):
            text |= {calls.get(name, name) for name in found.text}
        if header is not None and columnar.is_ragged(path):
            names = list(dict.fromkeys([*header, *first]))
            rows = [(at, line, columnar.laid_out(row, header, names)) for at, line, row in rows]
            lines = iter([(line, columnar.laid_out(row, first, names)) for line, row in lines])
            header = first = names
        if header is not None and first != header:
            raise InputError(f"{path} has another header than {stamp[0][0]}; give files of one kind")
        header = first
        for line, row in lines:
            if len(row) != len(header):
                skips.bad(f"{path} line {line}", f"has {len(row)} cells, but the header {len(header)}")
            else:
                rows.append((path, line, row))
    if header is None or not rows:
        raise InputError(f"{stamp[0][0]} has no rows after its header; give some")
    table = Rows(
        {name: _objects([row[2][at] for row in rows]) for at, name in enumerate(header)},
        _objects([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array(
            [text_files.content_hash("\x1f".join(row[2]).encode("utf-8", "replace")) for row in rows],
            np.uint64,
        ),
    )
    if lacking := how.required - set(header):
        how = how._replace(required=how.required - lacking)  # who asks for such a column says so
    how = how._replace(text=how.text | (text - how.numbers))
    return _with_numbers(_complete(table, how, skips), how, "," not in signs, skips)


# Other names of columns that a task needs, in lower case and without underscores.
ALIASES = {
    "user": ("userid", "uid", "reviewerid"), "item": ("itemid", "movieid", "productid", "bookid", "asin"),
    "rating": ("score", "stars", "overall"), "timestamp": ("time", "date", "unixreviewtime"),
}  # fmt: skip


def _calls(path: str, header: list[str], how: _How) -> dict[str, str]:
    """Returns what columns of the file are called here: as data.columns says, or by a well-known name.

    Raises:
        InputError: data.columns names a column that is not there, or makes two of one name.
    """
    calls = {}
    for pair in how.columns:
        name, _, column = pair.partition(":")
        if column not in header:
            raise InputError(f"data.columns has {pair!r}, but {path} has {', '.join(header)}; correct it")
        if name in header and name != column:
            raise InputError(f"data.columns has {pair!r}, but {path} has a column {name!r} too; rename one")
        calls[column] = name
    for name in sorted(how.required - set(header) - set(calls.values())):
        if column := known_as(name, header):
            calls[column] = name
    return calls


def known_as(name: str, header: Collection[str]) -> str:
    """Returns the one column with a well-known other name of `name`; "" where none or several have one."""
    alike = [x for x in header if x.lower().replace("_", "") in (name, *ALIASES.get(name, ()))]
    return alike[0] if len(alike) == 1 else ""


def _objects(values: list[str]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _lines(path: str, skips: _Skips, empty: bool) -> tuple[str, Iterator[tuple[int, list[str]]]]:
    """-> (the delimiter; number of its last line, cells of each row, the header first).

    Args:
        empty: rows whose cells are all empty count, too.
    """
    content = text_files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        decoded, doubtful = content.decode("utf-8"), False
    except UnicodeDecodeError:
        decoded, doubtful = content.decode("utf-8", "surrogateescape"), True
    first = re.sub(r'"[^"]*"', "", decoded.partition("\n")[0])
    delimiter = max(",\t;", key=first.count)

    def rows() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(decoded, newline=""), delimiter=delimiter, strict=True)
        begin, named = 1, False  # named: the header has come
        while (row := _row(reader, path, begin)) is not None:
            if doubtful and any("\udc80" <= char <= "\udcff" for cell in row for char in cell):
                if not named:
                    raise InputError(f"{path} line {reader.line_num} is not UTF-8 text; convert the file")
                skips.bad(f"{path} line {reader.line_num}", "is not UTF-8 text")
            elif any(row) or (empty and row):
                yield reader.line_num, row
                named = True
            begin = reader.line_num + 1

    return delimiter, rows()


def _row(reader: Any, path: str, begin: int) -> list[str] | None:
    """The next row, of cells of any length; None after the last.

    Raises:
        InputError: quotes that nobody can follow. Such a row is never skipped: it may end anywhere, so lines
            of a text could be taken for rows.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise InputError(
            f"{path} line {begin} is no row of a CSV file ({error}); correct its quotes: where the row ends "
            "is not known, so data.max_skipped does not skip it"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _complete(table: Rows, how: _How, skips: _Skips) -> Rows:
    """Without the rows that lack a required value."""
    keep = np.ones(len(table.line), bool)
    for name in sorted(how.required):
        for index, cell in enumerate(table.columns[name].tolist()):
            if not cell.strip() and keep[index]:
                skips.bad(table.where(index), f"has no {name}; fill it in, or take the line out")
                keep[index] = False
    return table if keep.all() else table.of(keep)


def _with_numbers(table: Rows, how: _How, commas: bool, skips: _Skips) -> Rows:
    """Columns of numbers become numbers; rows whose cells are none are left out.

    Args:
        commas: whether numbers may have decimal commas: no comma parts the cells.
    """
    names = set(table.columns) if how.only is None else how.only
    looks = {
        name: cells.look(column.tolist())
        for name, column in table.columns.items()
        if name in names - how.text - {SPLIT}
    }
    for name, each in list(looks.items()):
        if name not in how.numbers and each.share < MOSTLY:
            if each.share >= MANY and each.other is not None:
                cell = _brief(table.columns[name][each.other])
                log.warning("%s has %s in %r: the column is text, though %.0f %% of its cells are numbers",
                            table.where(each.other), cell, name, 100 * each.share)  # fmt: skip
            del looks[name]
    signs = _signs(table, looks, how.decimal, commas)
    columns, keep = dict(table.columns), np.ones(len(table.line), bool)
    for name, each in looks.items():
        columns[name], wrong = cells.values(table.columns[name].tolist(), each.floats, signs[name])
        if name in how.required:
            lacking = np.flatnonzero(columns[name] != columns[name])  # NaN
            wrong = dict.fromkeys(lacking.tolist(), "no value") | wrong
        fix = "" if name in how.numbers else " (name the column in data.categorical if it holds text)"
        for index, why in sorted(wrong.items()):
            if keep[index]:
                cell = _brief(table.columns[name][index])
                skips.bad(table.where(index), f"has {cell} in {name!r}, a column of numbers: {why}{fix}")
            keep[index] = False
    return table._replace(columns=columns).of(keep)


def _brief(cell: str) -> str:
    """A cell as messages show it."""
    return repr(cell) if len(cell) <= 60 else f"{cell[:60]!r}..."


def _signs(
    table: Rows, looks: Mapping[str, cells.Look], decimal: str, commas: bool
) -> Mapping[str, cells.Decimal]:
    """The decimal sign of each column of numbers. Raises InputError where nobody can tell."""
    if decimal in (".", ","):
        return dict.fromkeys(looks, "." if decimal == "." else ",")
    signs, problems = cells.styles(looks, commas)
    for name, problem in problems.items():
        each = looks[name]
        at = next(index for index in (each.comma, *each.either.values(), each.point) if index is not None)
        raise InputError(
            f"{table.where(at)} has {_brief(table.columns[name][at])} in {name!r}, a column of numbers with "
            f"{problem}; set data.decimal to , or . (or name the column in data.categorical if it holds text)"
        )
    for name, sign in signs.items():
        if sign == "," or looks[name].grouped:
            commas_are = "decimal" if sign == "," else "between thousands"
            log.info("%s: the commas of the numbers in %r are %s", table.path[0], name, commas_are)
    return signs


class TableFiles:
    """`table:GLOB`: each row is an example. About a tenth, by a hash of the content, are `test`, the others
    `train`; or a column `split` says so."""

    def __init__(
        self,
        name: str,
        split: str,
        **how: Unpack[Reading],
    ) -> None:
        table = read(name, **how)
        if split == ALL:
            chosen = np.ones(len(table.line), bool)
        elif SPLIT in table.columns:
            chosen = table.columns[SPLIT] == split
        else:
            source.check_split(name, split)
            fraction = how.get("test_fraction", source.TEST_FRACTION)
            tests = np.array([source.is_test(each, fraction) for each in table.hash.tolist()])
            chosen = tests == (split == "test")
        self.split_rule = "as the column 'split' says" if SPLIT in table.columns else "by a hash of each row"
        if not chosen.any():
            raise InputError(
                f"data.name={name!r} has no rows in split {split!r}; give more, or another split"
            )
        self._rows = table.of(chosen)
        self.features = features(name, **how)
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


def features(name: str, **how: Unpack[Reading]) -> Mapping[str, Feature]:
    """The columns of `table:GLOB`: text, whole numbers (int64), or numbers (float64). Reads the files."""
    out = {}
    for key, column in read(name, **how).columns.items():
        digits = column.dtype == np.int64 or (
            column.dtype != object
            and bool((np.floor(column) == column).all() and np.abs(column).max() < 2**63)
        )
        dtype = "text" if column.dtype == object else "int64" if digits else "float64"
        if key != SPLIT:
            out[key] = Feature((), dtype)
    return out
