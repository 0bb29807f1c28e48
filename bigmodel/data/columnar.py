"""Parquet and JSON lines as rows of text cells, as a CSV file has them; whole numbers keep all digits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from bigmodel.config import InputError
from bigmodel.data import text_files

log = logging.getLogger("bigmodel")

SUFFIXES = (".parquet", ".jsonl", ".ndjson")


class Cells(NamedTuple):
    """All rows of a file."""

    header: list[str]
    rows: list[tuple[int, list[str]]]  # with the number of the line (parquet: of the row), from 1
    text: set[str]  # columns that hold text, whatever it looks like


def is_columnar(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_ragged(path: str) -> bool:
    """Returns true for JSON lines, where a file names only the columns that its rows have."""
    return path.lower().endswith((".jsonl", ".ndjson"))


def laid_out(row: list[str], header: list[str], names: list[str]) -> list[str]:
    """Returns a row's cells in another order of columns; those that it lacks are empty."""
    cells = dict(zip(header, row, strict=True))
    return [cells.get(name, "") for name in names]


def where(path: str, number: int) -> str:
    """Names the place of a row, for messages."""
    return f"{path} {'row' if path.lower().endswith('.parquet') else 'line'} {number}"


def read(path: str, bad: Callable[[str, str], None]) -> Cells:
    """Reads a file.

    Args:
        bad: called with the place of a bad row and what is wrong; the row is left out.

    Raises:
        InputError: no such file, or no file of its kind.
    """
    return _parquet(path) if path.lower().endswith(".parquet") else _json_lines(path, bad)


def _json_lines(path: str, bad: Callable[[str, str], None]) -> Cells:
    records: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text_files.read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            json.dumps(record, ensure_ascii=False).encode()
            problem = "" if isinstance(record, dict) else "is no JSON object"
        except UnicodeError:
            problem = "is not UTF-8 text"
        except ValueError as error:
            problem = f"is no JSON ({error})"
        if problem:
            bad(where(path, number), problem)
        else:
            records.append((number, record))
    names = dict.fromkeys(name for _, record in records for name in record)
    nested = {name for _, record in records for name, x in record.items() if isinstance(x, dict | list)}
    _say_left_out(path, nested)
    header = [name for name in names if name not in nested]
    text = {name for _, record in records for name in header if isinstance(record.get(name), str | bool)}
    rows = [(number, [_cell(record.get(name)) for name in header]) for number, record in records]
    return Cells(header, rows, text)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parquet(path: str) -> Cells:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow; run: pip install pyarrow") from error
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as parquet: {problem}; write it again") from error
    columns, text, nested = dict[str, list[str]](), set[str](), set[str]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_nested(kind):
            nested.add(name)
            continue
        if pa.types.is_temporal(kind):  # as the whole number that it is stored as
            column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
            kind = column.type
        try:
            columns[name] = column.cast(pa.string()).fill_null("").to_pylist()
        except (pa.ArrowException, UnicodeDecodeError):
            nested.add(name)  # binary
            continue
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            text.add(name)
    _say_left_out(path, nested)
    rows = [(number, list(row)) for number, row in enumerate(zip(*columns.values(), strict=True), 1)]
    return Cells(list(columns), rows, text)


def _say_left_out(path: str, names: set[str]) -> None:
    if names:
        log.info("%s: %s left out: not numbers or text", path, ", ".join(sorted(names)))
