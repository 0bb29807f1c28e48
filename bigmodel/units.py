"""Numbers as text: 1.2 G, 3.4 GiB, 4.63 ms, 5 min."""

from __future__ import annotations


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
