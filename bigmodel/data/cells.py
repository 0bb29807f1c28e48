"""Numbers as files write them: with a decimal point or comma, thousands apart.

What is one number to one program and another to the next (`1,234`, `12 %`, `1_000`) is never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Decimal = Literal[".", ","]

# Cells of a column of numbers that hold none.
MISSING = {"", "na", "n/a", "nan", "null", "?", "<na>", "#n/a", "#na"}
LARGEST = float(np.finfo(np.float32).max)
EXACT = 2**53  # float64 holds every integer up to here
LONGEST = 400  # characters: what is longer is no number

_PLAIN = r"[+-]?(?:\d+(?:{0}\d*)?|{0}\d+)(?:[eE][+-]?\d+)?|[+-]?\d{{1,3}}(?:{1}\d{{3}})+(?:{0}\d+)?"
_NUMBER: dict[Decimal, re.Pattern[str]] = {
    ".": re.compile(_PLAIN.format(r"\.", ","), re.ASCII),
    ",": re.compile(_PLAIN.format(",", r"\."), re.ASCII),
}
_GROUPS = r"\d{1,3}(?:[.,' \u00a0\u202f\u2019]\d{3})+(?:[.,]\d+)?|\d+(?:_\d+)+(?:\.\d*)?"
_CORE = rf"(?:{_GROUPS}|\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?"
# A number to a person or to Python: with a sign of money or per cent, a Unicode digit or minus, underscores.
_ALIKE = re.compile(rf"[+\-\u2212]?\s*[$€£¥]?\s*{_CORE}\s*[%‰$€£¥]?|[+\-\u2212]?inf(?:inity)?", re.IGNORECASE)


def is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def number(cell: str, decimal: Decimal = ".") -> float | int | None:
    """A cell's number; None where it holds none. An integer that float64 would round is an int.

    Thousands may be apart by the other sign: `1,234.5`, or with a decimal comma `1.234,5`.
    """
    text = cell.strip()
    if not _NUMBER[decimal].fullmatch(text):
        return None
    text = text.replace(",", "") if decimal == "." else text.replace(".", "").replace(",", ".")
    value = float(text)
    is_big = math.isfinite(value) and abs(value) >= EXACT and text.lstrip("+-").isdigit()
    return int(text) if is_big and int(text) != value else value


@dataclass
class Look:
    """Evidence from a column's cells: for each kind the first cell that shows it, or None."""

    floats: np.ndarray  # float64 (n,): of the cells that are plain numbers; NaN for the others
    point: int | None = None  # can only have a decimal point
    comma: int | None = None  # can only have a decimal comma
    either: dict[str, int] = field(default_factory=dict)  # "," or ".": may part thousands, or be decimal
    other: int | None = None  # no number at all
    grouped: bool = False  # commas may part thousands
    share: float = 0.0  # of the filled cells are numbers, or look like some


def look(cells: Sequence[str]) -> Look:
    """Looks at each cell of a column; no further than needed where it is text."""
    out, others, empty = Look(np.full(len(cells), np.nan)), 0, 0
    for index, cell in enumerate(cells):
        value = _plain(cell)
        if value is not None:
            out.floats[index] = value
            if out.point is None and "." in cell:
                _note(out, index, cell.strip())
        elif is_missing(cell):
            empty += 1
        elif len(cell) < LONGEST and (_note(out, index, cell.strip()) or _ALIKE.fullmatch(cell.strip())):
            continue
        else:
            others += 1
            out.other = index if out.other is None else out.other
            if others > len(cells) / 2:
                return out
    out.share = 1 - others / (len(cells) - empty) if empty < len(cells) else 0.0
    return out


def _plain(cell: str) -> float | None:
    """A number that Python reads as everybody does."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and cell.isascii() and "_" not in cell else None


def _note(out: Look, index: int, text: str) -> bool:
    """True if a cell is a number with a point or a comma; `out` notes which."""
    point, comma = (bool(_NUMBER[sign].fullmatch(text)) for sign in (".", ","))
    if point and comma:
        for sign in {",", "."} & set(text):
            out.either.setdefault(sign, index)
    elif point and out.point is None:
        out.point = index
    elif comma and "," not in text:  # 192.168.100.200 is as likely no number
        out.either.setdefault(".", index)
    elif comma and out.comma is None:
        out.comma = index
    out.grouped = out.grouped or (point and "," in text)
    return point or comma


def styles(looks: Mapping[str, Look], commas: bool) -> tuple[dict[str, Decimal], dict[str, str]]:
    """Returns the decimal sign of each column -> ({column: sign}, {column: its problem}).

    A column's own cells decide. Where they leave it open, the other columns of the table do.

    Args:
        commas: whether a decimal comma is to be expected, as where no comma parts the cells.
    """
    points = any(each.point is not None and each.comma is None for each in looks.values())
    others = any(each.comma is not None and each.point is None for each in looks.values())
    out: dict[str, Decimal] = {}
    problems: dict[str, str] = {}
    for name, each in looks.items():
        out[name] = "."
        if each.comma is not None and each.point is not None:
            problems[name] = "decimal points and decimal commas"
        elif each.comma is not None:
            out[name] = ","
            if not commas:
                problems[name] = "decimal commas"
        elif each.point is None and "," in each.either:
            if points == others or "." in each.either:
                problems[name] = "a comma that may be decimal or part thousands"
            out[name] = "," if others else "."
        elif each.point is None and "." in each.either and others:
            problems[name] = (
                "a point that may be decimal or, as other columns have decimal commas, part thousands"
            )
    return out, problems


def values(cells: Sequence[str], floats: np.ndarray, decimal: Decimal) -> tuple[np.ndarray, dict[int, str]]:
    """-> (float64, NaN for a missing one, or int64 where float64 would round; {which: what is wrong}).

    Args:
        floats: of the cells that are plain numbers, as `look` gives them.
    """
    out, wrong, exact = floats.copy(), dict[int, str](), dict[int, int]()
    again = np.isnan(floats) | (np.abs(floats) >= EXACT)
    if decimal == ",":
        again |= np.array(["." in cell for cell in cells], bool)
    for index in np.flatnonzero(again).tolist():
        value = None if is_missing(cells[index]) else number(cells[index], decimal)
        out[index] = np.nan if value is None else value
        if isinstance(value, int):
            exact[index] = value
        elif value is None and not is_missing(cells[index]):
            wrong[index] = "no number as this column writes them"
    for index in np.flatnonzero(np.abs(out) > LARGEST).tolist():
        wrong[index] = f"which is more than float32 holds ({LARGEST:.2g})"
    if not exact:
        return out, wrong
    others = np.delete(out, list(exact))
    in_range = all(-(2**63) <= value < 2**63 for value in (*exact.values(), *others))  # False for a NaN
    if not wrong and in_range and (np.floor(others) == others).all():
        integers = np.empty(len(out), np.int64)
        integers[np.isin(np.arange(len(out)), list(exact), invert=True)] = others
        integers[list(exact)] = list(exact.values())
        return integers, wrong
    return out, wrong | dict.fromkeys(exact, "an integer that float64 would round")
