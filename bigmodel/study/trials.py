"""The settings that a study tries: values or ranges of config keys, and a name for each trial."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel.config import InputError

Settings = dict[str, str]  # config key -> its value as --config.KEY=VALUE takes it
LONGEST = 120  # characters of a name; a directory's may have 255 bytes
WIDE = 100.0  # a range of positive numbers this many times its start is sampled by its logarithm


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    integer: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= WIDE * self.low

    def __str__(self) -> str:
        scale = ", by its logarithm" if self.log else ""
        return f"{self.low:g} to {self.high:g}{', whole' if self.integer else ''}{scale}"


@dataclass(frozen=True)
class Space:
    """Keys with the values to try, in order, and keys with a range to search."""

    values: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, Range]

    def grid(self) -> list[Settings]:
        """Every combination of the values; the last key changes fastest."""
        return [
            dict(zip(self.values, each, strict=True)) for each in itertools.product(*self.values.values())
        ]


def parse(over: Iterable[str]) -> Space:
    """Reads `optim.lr=5e-3,1e-2`, `seed=0:3` (0, 1, 2) and, for a search, `optim.lr=1e-4..1e-1`.

    Raises:
        InputError: an item that is none of these, or a key that is given twice.
    """
    values: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, Range] = {}
    for item in over:
        key, _, text = item.partition("=")
        if not key or not text:
            raise InputError(f"--over={item}: give KEY=VALUE,VALUE, KEY=FROM:TO or KEY=LOW..HIGH")
        if key in values or key in ranges:
            raise InputError(f"--over={item}: {key} is given twice; put all its values into one --over")
        if ".." in text:
            ranges[key] = _range(item, *text.split("..", 1))
        else:
            values[key] = _values(item, text)
    return Space(values, ranges)


def _range(item: str, low: str, high: str) -> Range:
    try:
        found = Range(float(low), float(high), not re.search(r"[.eE]", low + high))
    except ValueError as error:
        raise InputError(f"--over={item}: give two numbers, such as 1e-4..1e-1") from error
    if not found.low < found.high:
        raise InputError(f"--over={item}: the second number must be larger than the first")
    return found


def _values(item: str, text: str) -> tuple[str, ...]:
    if counted := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        start, stop = map(int, counted.groups())
        if stop <= start:
            raise InputError(
                f"--over={item}: {start}:{stop} has no numbers; the second is left out, as in Python"
            )
        return tuple(map(str, range(start, stop)))
    found = tuple(re.split(r",(?![^\[(]*[\])])", text))  # commas inside [4,8] are part of a value
    if len(set(found)) < len(found) or "" in found:
        raise InputError(f"--over={item}: has an empty value, or one twice")
    return found


def of_config(sweep: Sequence[Mapping[str, Any]]) -> list[Settings]:
    """The settings that a config file's `sweep()` returns, as text."""
    return [{key: as_text(value) for key, value in each.items()} for each in sweep]


def as_text(value: Any) -> str:
    """A value as --config.KEY=VALUE takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def name(settings: Settings) -> str:
    """A directory's name, such as `lr=0.01,seed=2`; unique among trials of the same keys."""
    last = [key.rpartition(".")[2] for key in settings]
    keys = last if len(set(last)) == len(last) else list(settings)
    plain = ",".join(f"{key}={value}" for key, value in zip(keys, settings.values(), strict=True))
    text = re.sub(r"[^\w=,.+\-]", "_", plain)
    if text == plain and 0 < len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return f"{text[: LONGEST - 9].strip(',')}-{digest}"
