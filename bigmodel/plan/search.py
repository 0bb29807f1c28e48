"""Finds mesh, remat and microbatches for a target: a closed form orders all, the compiler ranks the best.

A candidate that does not fit when compiled is never first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from bigmodel import tasks, units
from bigmodel.config import Config, InputError
from bigmodel.plan import machine as machine_lib
from bigmodel.plan import planner
from bigmodel.plan import target as target_lib
from bigmodel.plan.candidates import OVER, Candidate, candidates, name, overrides
from bigmodel.plan.receipt import Receipt
from bigmodel.plan.target import Target

MOST_LISTED = 40  # candidates that were not compiled, in the table


@dataclass(frozen=True)
class Row:
    """A candidate that was compiled: its receipt, or why it has none."""

    candidate: Candidate
    receipt: Receipt | None
    failed: str = ""


@dataclass(frozen=True)
class Result:
    """Compiled candidates, the others, and their numbers."""

    rows: tuple[Row, ...]  # those that fit first, the fastest per example first
    others: tuple[Candidate, ...]  # not compiled: those that are likely to fit first, by the closed form
    considered: int
    dropped: int  # cannot fit, by the closed form
    least_bytes: float  # of one device, the least that any candidate needs

    @property
    def best(self) -> Row:
        """Raises InputError where nothing that was compiled fits."""
        if not self.considered:
            raise InputError("--search: no mesh divides batch_size and the model's heads; change batch_size")
        if not self.rows:
            raise InputError(
                f"--search: nothing fits: the least of {self.considered:,} candidates needs "
                f"{units.size(self.least_bytes)} a device; take a larger target or a smaller batch_size"
            )
        if self.rows[0].receipt is None:
            raise InputError(f"--search: nothing fits: {self.rows[0].failed}")
        return self.rows[0]


def search(
    config: Config,
    spec: str,
    *,
    compile_best: int = 4,
    over: Collection[str] = OVER[:2],
    assume: dict[str, float] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Ranks meshes, remat and microbatches of `config` on the target `spec` (as `planner.plan` takes it).

    Args:
        compile_best: number of candidates that fit to compile (at most three times as many are tried).
        over: which of OVER may change with the mesh; the ranking is by seconds an example.
        say: called with a line before each compilation.

    Raises:
        InputError: no such target.
    """
    config = tasks.sized(config)
    aim = target_lib.of(config, spec)
    found = list(candidates(config, aim, over))
    capacity = machine_lib.of(aim).capacity_bytes or math.inf
    possible = [c for c in found if c.least_bytes <= capacity]
    ranked = sorted(possible, key=lambda c: (c.likely_bytes > capacity, c.example_s))
    order = thinned(ranked, capacity)
    rows: list[Row] = []
    for candidate in order[: 3 * compile_best]:
        say(f"compiling {name(candidate.config)} ...")
        rows.append(_compile(candidate, aim, assume))
        if sum(row.receipt is not None for row in rows) == compile_best:
            break
    rows.sort(key=lambda row: row.receipt["step_s"] / row.candidate.config.batch_size if row.receipt else 1e9)
    least = min((c.least_bytes for c in found), default=0.0)
    tried = {id(row.candidate) for row in rows}
    others = tuple(c for c in ranked if id(c) not in tried)
    return Result(tuple(rows), others, len(found), len(found) - len(possible), least)


def _compile(candidate: Candidate, aim: Target, assume: dict[str, float] | None) -> Row:
    try:
        return Row(candidate, planner.on(candidate.config, aim, assume=assume, advise=False).receipt)
    except InputError as error:
        return Row(candidate, None, str(error))


def thinned(order: list[Candidate], capacity: float) -> list[Candidate]:
    """Keeps the best of each mesh and remat: where it is likely to fit, more microbatches only cost."""
    done, out = set(), []
    for c in order:
        key = (c.config.mesh, c.config.remat, c.config.batch_size, c.likely_bytes <= capacity)
        if key not in done:
            done.add(key)
            out.append(c)
    return out


def table(result: Result) -> list[str]:
    """The ranking as lines: what was compiled, the flags of the first, and the closed form of the others."""
    best = result.best
    made = best.receipt or {}
    size = made["tokens_per_step"] / best.candidate.config.batch_size  # of an example

    def line(mark: object, config: Config, step_s: float, mfu: str, peak_bytes: float) -> str:
        per_s = units.quantity(size * config.batch_size / step_s).strip()
        return (
            f"  {mark:<3}{units.seconds(step_s):>10}  {per_s:>10}  {mfu:>6}  "
            f"{units.size(peak_bytes):>9}  {name(config)}"
        )

    lines = [
        f"search    {result.considered:,} candidates, {result.dropped:,} cannot fit; "
        f"{len(result.rows)} compiled:",
        f"  {'':3}{'step':>10}  {made['unit'] + '/s':>10}  {'MFU':>6}  {'memory':>9}",
    ]
    for rank, row in enumerate(result.rows, 1):
        r = row.receipt
        if r is None:
            lines.append(f"  -  does not fit: {name(row.candidate.config)}")
            continue
        mfu = f"{r['mfu_full_attention']:.1%}" if "mfu_full_attention" in r else "-"
        lines.append(line(rank, row.candidate.config, r["step_s"], mfu, r["peak_bytes"]))
    lines.append(f"  take    {' '.join(overrides(best.candidate.config))}")
    if result.others:
        lines.append(f"  {len(result.others):,} not compiled, by the closed form (a rough one):")
    lines += [line("~", c.config, c.step_s, "-", c.likely_bytes) for c in result.others[:MOST_LISTED]]
    if (rest := len(result.others) - MOST_LISTED) > 0:
        lines.append(f"  and {rest:,} slower or larger ones, which --json lists")
    return lines


def ranking(result: Result) -> list[dict[str, Any]]:
    """The candidates as plain values, fit for JSON: those that were compiled, then the others."""
    rows = [*result.rows, *(Row(c, None, "not compiled") for c in result.others)]
    return [
        {
            "overrides": overrides(row.candidate.config),
            "estimated_step_s": row.candidate.step_s,
            "estimated_bytes": row.candidate.likely_bytes,
            "step_s": row.receipt and row.receipt["step_s"],
            "peak_bytes": row.receipt and row.receipt["peak_bytes"],
            "failed": row.failed,
        }
        for row in rows
    ]
