"""Numbers as text (1.2 G, 3.4 GiB, 4.63 ms, 5 min), and text as the most to spend (2h, $50, 3kwh)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# A cap's unit -> (the key of a receipt that counts it, how many of the key's unit it is).
SPENT = {
    "s": ("total_s", 1.0), "min": ("total_s", 60.0), "h": ("total_s", 3600.0), "d": ("total_s", 86400.0),
    "chip-hours": ("chip_hours", 1.0), "$": ("dollars", 1.0), "kwh": ("kwh", 1.0),
    "flop": ("total_flops", 1.0),
}  # fmt: skip
AMOUNTS = "2h, 90min, 512chip-hours, $50, 3kwh or 1e18flop"


@dataclass(frozen=True)
class Cap:
    """The most that may be spent, of one of a price's keys."""

    key: str
    amount: float
    text: str  # as it was given

    def of(self, price: Mapping[str, float]) -> float:
        return price[self.key]

    def __str__(self) -> str:
        return f"{quantity(self.amount)}FLOP" if self.key == "total_flops" else self.text


def cap(given: str | float) -> Cap | None:
    """Reads `2h`, `90min`, `512chip-hours`, `$50`, `3kwh`, `1e18flop`; "" and 0: None.

    Args:
        given: text, or a number of FLOPs.

    Raises:
        ValueError: no such unit, or no number above 0; the message says what to give.
    """
    if not given:
        return None
    text = str(given).strip()
    if isinstance(given, float | int):
        number, unit = text, "flop"
    elif text.startswith("$"):
        number, unit = text[1:], "$"
    else:
        found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([a-z-]+)", text, re.IGNORECASE)
        number, unit = found.groups() if found else ("", "")
    try:
        key, one = SPENT[unit.lower()]
        value = float(number) * one
        if not 0 < value < float("inf"):
            raise ValueError
    except (KeyError, ValueError) as error:
        raise ValueError(f"give an amount above 0 and its unit, such as {AMOUNTS}") from error
    return Cap(key, value, text)


def quantity(x: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(x) < 1000 or unit == "Z":
            return f"{x:.3g} {unit}"
        x /= 1000
    raise AssertionError(x)


def size(n: float) -> str:
    """Bytes -> '12.3 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def time_unit(s: float) -> tuple[float, str]:
    """The unit in which so many seconds read best: how many of it make a second, and its name."""
    return next(((n, unit) for n, unit in ((1, "s"), (1e3, "ms")) if s * n >= 1), (1e6, "us"))


def seconds(s: float) -> str:
    """0.00463 -> '4.63 ms'; 0.00032 -> '320 us'."""
    per_second, unit = time_unit(s)
    return f"{s * per_second:.4g} {unit}"


def duration(s: float) -> str:
    """Seconds -> '45 s', '3 min 20 s', '2 h 5 min', '3 d 4 h'."""
    s = round(s)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
