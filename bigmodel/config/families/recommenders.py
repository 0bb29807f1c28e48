"""Recommenders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from bigmodel.config.families.base import LABEL_TASKS, Family, at_least_0, positive


@dataclass(frozen=True)
class Recommender(Family):
    """Who likes what: `mf`, `ncf`, `two_tower` on ids of users and items; `dlrm` on rows of a table."""

    inputs = ("table",)
    made_by = "bigmodel.models.recommender:make"
    walked_by = "bigmodel.compress.walks:recommender"
    units = MappingProxyType({"channels": ("width", "widths", "bottom")})
    name: str = "recommender"
    kind: Literal["mf", "ncf", "two_tower", "dlrm"] = "mf"
    users: int = 0  # rows of the users' table: one for whoever is unknown, one for each; 0: from the data
    items: int = 0  # likewise
    rows: int = 0  # dlrm: categories over all columns, an unknown one for each; 0: from the data
    width: int = 16  # of an embedding (ncf: of its product part)
    widths: tuple[int, ...] = (64, 32, 16)  # ncf's network, each tower, dlrm's last network
    bottom: tuple[int, ...] = (64, 32)  # dlrm: hidden layers under the numbers
    temperature: float = 0.1  # two_tower: cosines are divided by it
    num_classes: int = 0  # dlrm; 0: from the data

    @property
    def tasks(self) -> tuple[str, ...]:
        return LABEL_TASKS if self.kind == "dlrm" else ("rank",)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from positive(self, "width", "widths")
        yield from at_least_0(self, "users", "items", "rows", "num_classes")
        if self.bottom:
            yield from positive(self, "bottom")
        if self.temperature <= 0:
            yield "temperature", f"is {self.temperature}: set it above 0, such as 0.1"
