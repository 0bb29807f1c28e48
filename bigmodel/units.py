"""How numbers are printed: 1.2 G, 3.4 GiB, 5 min."""

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
