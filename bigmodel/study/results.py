"""The results of a study as it stands: settings by their metric, states, and what was spent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bigmodel.study import compare, price
from bigmodel.study.price import Price
from bigmodel.study.sweep import Study


@dataclass(frozen=True)
class Results:
    lines: tuple[str, ...]  # for people
    values: dict[str, Any]  # for JSON
    failed: int  # trials that ended by an error


def of(study: Study, spent: Price, planned: Price) -> Results:
    """Collects them.

    Args:
        spent: the price of all that ran, by the ledgers.
        planned: the price of the study as it was planned.
    """
    rows = study.rows()
    groups = compare.groups(study.results(), study.definition.maximize)
    states = Counter(row.state for row in rows)
    lines = [
        *compare.table(groups, study.definition.metric),
        f"trials    {', '.join(f'{n} {state}' for state, n in states.items())}",
        f"spent     {price.line(spent)}",
    ]
    if states["complete"] == len(rows) and spent and planned["total_s"]:
        off = planned["total_s"] / spent["total_s"] - 1
        lines.append(f"          planned {price.line(planned)}: {off:+.1%} off in time")
    values = {
        "trials": [{**vars(row), "directory": str(row.directory)} for row in rows],
        "groups": [vars(group) for group in groups],
        "spent": spent,
        "planned": planned,
        "metric": study.definition.metric,
    }
    return Results(tuple(lines), values, states["failed"])
