"""Where parameters lie on a mesh: their shapes, mesh axes and bytes on one device, as lines to read."""

from __future__ import annotations

import math
from typing import Any

from bigmodel import mesh, trees
from bigmodel.plan import estimate
from bigmodel.program import Program
from bigmodel.units import size


def table(built: Program) -> list[str]:
    """One line for each parameter, in the tree's order, then sums.

    `-` stands for a dimension that is on every device in full. An axis that a rule names but that does not
    divide its dimension is given after the table.
    """
    rows = [("parameter", "shape", "dtype", "mesh axes", "a device")]
    dropped = []
    for path, s in trees.by_path(built.state_spec["params"]).items():
        spec = (*s.sharding.spec, *(None,) * (len(s.shape) - len(s.sharding.spec)))
        rows.append((path, _joined(s.shape), s.dtype.name, _joined(map(_axes, spec)), size(_bytes(s))))
        wanted = mesh.spec(*mesh.rule(built.model.rules, path))[-len(s.shape) :] if s.shape else ()
        for entry, actual, n in zip(wanted[::-1], spec[::-1], s.shape[::-1], strict=False):
            pieces = math.prod(built.mesh.shape[axis] for axis in _names(entry))
            if entry != actual and pieces > 1:
                dropped.append(f"{path}: {_axes(entry)} ({pieces}) does not divide {n}: replicated over it")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([*(cell.ljust(n) for cell, n in zip(row[:-1], widths, strict=False)), row[-1].rjust(9)])
        for row in rows
    ]
    return [*lines, "", *dropped, *_sums(built)]


def _sums(built: Program) -> list[str]:
    sizes = ", ".join(f"{axis} {n}" for axis, n in built.mesh.shape.items() if n > 1)
    lines = [f"mesh       {sizes or 'one device'}"]
    names = {"params": "parameters", "opt": "optimizer", "ema": "average", "rest": "rest"}
    for part, name in names.items():
        leaves = trees.by_path(built.state_spec.get(part, {})).values()
        total = sum(float(math.prod(s.shape) * s.dtype.itemsize) for s in leaves)
        if total:
            lines.append(f"{name:<10} {size(total)} in all, {size(sum(map(_bytes, leaves)))} a device")
    lines.append(f"state      {size(estimate.tree_bytes(built.state_spec))} a device")
    return lines


def _bytes(s: Any) -> float:
    return float(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize)


def _joined(parts: Any) -> str:
    return f"[{', '.join(map(str, parts))}]"


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _axes(entry: str | tuple[str, ...] | None) -> str:
    return "+".join(_names(entry)) or "-"
