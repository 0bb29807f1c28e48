"""Sizes of a model that its data decide: ids of tokens, classes, rows of tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Size(NamedTuple):
    """The least size that data need, and what it counts."""

    least: int
    why: str  # "257 of bytes"
    rounded: bool = True  # rows of a table, which a mesh cuts into equal parts

    @property
    def multiple(self) -> int:
        """64, but 8 where that would add over a tenth."""
        return 64 if -self.least % 64 <= self.least / 10 else 8

    @property
    def value(self) -> int:
        return self.least + (-self.least % self.multiple if self.rounded else 0)

    def __str__(self) -> str:
        up = f", rounded up to a multiple of {self.multiple}" if self.value > self.least else ""
        return f"{self.value:,} ({self.why}{up})"


Sizes = Mapping[str, Callable[[], Size]]  # key of the model -> what reads the size from the data


def short(name: str) -> str:
    """Returns `data.name` without its prefix and folders."""
    return os.path.basename(name.partition(":")[2].rstrip("/")) or name
