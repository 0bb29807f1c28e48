"""Keys of `config.mesh`: sizes of the device mesh's axes, and a user's own layout of parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; one may be -1, "whatever is left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    pipe: int = 1
    # Where parameters lie, in rules that go before `bigmodel.mesh.RULES`: regular expressions on their paths,
    # each with the axes of the last dimensions, "/embed/table$ -> fsdp,tensor; /head/ -> none,data+tensor".
    rules: str = ""

    def sizes(self) -> dict[str, int]:
        """The axes' sizes by name."""
        return {axis: size for axis, size in dataclasses.asdict(self).items() if axis != "rules"}

    def parsed_rules(self) -> tuple[tuple[str, str], ...]:
        """`rules` as (regular expression, axes), in order."""
        lines = filter(None, map(str.strip, re.split("[;\n]", self.rules)))
        parts = (line.partition("->") for line in lines)
        return tuple((pattern.strip(), axes.strip()) for pattern, _, axes in parts)

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, problem and fix) for each value that makes no mesh."""
        sizes = self.sizes()
        for key, size in sizes.items():
            if size < 1 and size != -1:
                yield key, f"is {size}: set it to 1 or more, or to -1 for whatever devices are left"
        free = [key for key, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield free[1], f"is -1, and so is mesh.{free[0]}; only one axis can take what is left"
        for pattern, axes in self.parsed_rules():
            yield from (("rules", problem) for problem in _rule_problems(pattern, axes, sizes.keys()))


def _rule_problems(pattern: str, axes: str, known: Iterable[str]) -> Iterable[str]:
    rule = f"has the rule {pattern!r} -> {axes!r}"
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{rule}, whose left side is no regular expression ({error}); mend it"
    names = [name.strip() for name in re.split("[,+]", axes)]
    wrong = [name for name in names if name not in (*known, "none")]
    if not pattern or wrong:
        yield f"{rule}; write REGEX -> AXIS,AXIS with axes of {', '.join(known)} or none"
    named = [name for name in names if name != "none"]
    if len(named) > len(set(named)):
        yield f"{rule}, which names an axis twice; an axis splits one dimension"
