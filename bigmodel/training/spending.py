"""The budget of a run in time, energy or dollars: how many steps it plans for, and when it is spent.

Spending is measured over all sessions of a run (ledger.json), so a resumed run has what is left.
A budget in FLOPs needs none of this: it is a number of steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bigmodel import log, program, tasks, units
from bigmodel.config import Config, InputError, ranges
from bigmodel.data import Pipeline
from bigmodel.ledger import Ledger
from bigmodel.plan import fits, planner, target
from bigmodel.plan import machine as machine_lib
from bigmodel.plan import receipt as receipts
from bigmodel.program import Program

TIMED, TIMED_S = (
    5,
    10.0,
)  # steps that are timed to plan a run, at most, and seconds after which that is enough
MARGIN = 0.05  # of the time, for saving checkpoints and for steps that are slower than those that were timed
FORWARD = 1 / 3  # of a training step: a batch of an evaluation
START = ("start", "compile", "check", "restore")  # a ledger's buckets that every session has again


class Spending:
    """Measures the price of a run, and says when its budget is spent."""

    def __init__(self, config: Config, before: Mapping[str, Any], ledger: Ledger, mesh: Mesh) -> None:
        """Args:
        before: ledger.json of the earlier sessions.

        Raises:
            InputError: the budget is in dollars or kWh, and their price is not known.
        """
        self.cap = measured_cap(config)
        self.sessions, self.ledger = before, ledger
        machine = machine_lib.of(target.here(tuple(mesh.devices.flat)))
        self.rates = receipts.of_a_second(machine, config.assume.given)
        self.ending_s = 0.0  # the longest evaluation and save: the run's end has one more
        self.evaluated = 0  # batches of an evaluation, for an end that nothing has measured yet
        if self.cap is not None:
            receipts.affordable(config, self.rates)
            self.before = before.get(self.cap.key) or before.get("total_s", 0.0) * self.rates[self.cap.key]

    def price(self, report: Mapping[str, Any]) -> dict[str, float]:
        """Chip-hours, dollars and kWh of a session, of those that are known.

        Args:
            report: `Ledger.report`; joules that were measured count, not the planned watts.
        """
        keys = [key for key in ("chip_hours", "dollars", "kwh") if key in self.rates]
        out: dict[str, float] = {key: report["total_s"] * self.rates[key] for key in keys}
        if str(report.get("joules_from", "")).startswith("measured"):
            out["kwh"] = report["joules"] * jax.process_count() / 3.6e6 * self.rates["pue"]
        return out

    def spent(self) -> float:
        """Spending of all sessions, in the budget's unit."""
        return float(self.before + self._now()[0])

    def _now(self) -> tuple[float, float]:
        """-> what this session has spent, in the budget's unit, and its seconds."""
        assert self.cap is not None
        report = self.ledger.report(0.0)
        return (report | self.price(report))[self.cap.key], report["total_s"]

    def is_spent(self, step_s: float) -> bool:
        """Returns true when one more step, and the last evaluation and save, would exceed the budget.

        All hosts of a job must call it at the same steps; the first one's answer is theirs.
        """
        if self.cap is None:
            return False
        now, total_s = self._now()
        end_s = self.ending_s or FORWARD * step_s * self.evaluated
        further = now / total_s * (step_s + end_s)
        return _as_first_host(bool(self.before + now + further >= self.cap.amount))

    def left_s(self) -> float:
        """Seconds that the budget still pays for, by the prices of a second."""
        assert self.cap is not None
        return (self.cap.amount - self.spent()) / self.rates[self.cap.key]

    def line(self) -> str:
        """`$4.90 of the budget of $5 is spent`."""
        assert self.cap is not None
        return f"{amount(self.cap, self.spent())} of the budget of {self.cap} is spent"


def amount(cap: units.Cap, number: float) -> str:
    """A number of the cap's unit as text."""
    if cap.key == "total_s":
        return units.duration(number) if number >= 60 else units.seconds(number)
    dollars = f"${number:,.2f}" if number >= 1 else f"${number:.3g}"
    return dollars if cap.key == "dollars" else f"{number:.4g} {cap.key.replace('_', '-')}"


def measured_cap(config: Config) -> units.Cap | None:
    """The budget, where a run has to measure what it spends; None without one and for FLOPs."""
    cap = units.cap(config.budget)
    return None if cap is None or cap.key == "total_flops" else cap


def is_used_up(config: Config, before: Mapping[str, Any]) -> bool:
    """Returns true when the budget does not pay for another start of the run.

    Args:
        before: ledger.json of the earlier sessions.
    """
    cap = measured_cap(config)
    if cap is None:
        return False
    used_up = False
    if before.get(cap.key):
        start_s = sum(before["seconds"].get(bucket, 0.0) for bucket in START) / len(before["sessions"])
        share = (before["total_s"] + start_s + (before["step_s"] or 0.0)) / before["total_s"]
        used_up = before[cap.key] * share >= cap.amount
    return _as_first_host(used_up)


def _as_first_host(answer: bool) -> bool:
    """The first host's answer, on every host of a job."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def build(run: Start, config: Config, mesh: Mesh) -> Program:
    """Builds the Program of a run, whose budget decides its steps: the learning rate's schedule needs them.

    In time, energy or dollars a budget buys as many steps as timing some says, with the evaluations between
    them; a resumed run keeps its steps unless its budget changed.

    Raises:
        InputError: as `program.build`, `Spending` and `fits.check_step`.
    """
    if measured_cap(config) is None:
        return planner.build_within_budget(config, mesh)
    spec = tasks.batch_spec(config)
    if run.last is not None and (run.last.budget, run.last.assume) == (config.budget, config.assume):
        return program.build(config.replace(steps=run.last.steps), mesh, spec)
    with log.doing("budget    timing a few steps"):
        count, step_s = _affordable(run, program.build(config, mesh, spec))
    steps = run.newest + count
    log.say(f"budget    {config.budget} is planned as {steps:,} steps of {units.seconds(step_s)}")
    return program.build(config.replace(steps=steps), mesh, spec)


@dataclass(frozen=True)
class Start:
    """Facts of a run that are known before its Program is."""

    last: Config | None  # the last session's
    newest: int  # the newest checkpoint's step
    before: Mapping[str, Any]  # ledger.json
    data: Pipeline
    evaluated: int  # batches of an evaluation
    ledger: Ledger
    force: bool  # train even if it takes more memory than is free


def _affordable(run: Start, built: Program) -> tuple[int, float]:
    """Steps that are left of a budget, at least one, and the seconds of one."""
    spending = Spending(built.config, run.before, run.ledger, built.mesh)
    if not run.force:
        fits.check_state(built)
    began = time.perf_counter()
    compiled = planner.compile_to_run(built)
    compile_s = time.perf_counter() - began  # once more, with the steps
    if not run.force:
        fits.check_step(built, compiled)
    step_s = _step_s(built, compiled, run.data)
    evaluation_s = FORWARD * step_s * run.evaluated
    left_s = spending.left_s() * (1 - MARGIN) - compile_s - evaluation_s
    count = max(int(left_s // (step_s + evaluation_s / built.config.eval.every_steps)), 1)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        count = int(multihost_utils.broadcast_one_to_all(np.int32(min(count, ranges.INT32))))
    if run.newest + count > ranges.INT32:
        raise InputError(f"budget is {spending.cap}, which buys {count:,} steps; set it lower")
    return count, step_s


def _step_s(built: Program, compiled: Any, data: Pipeline) -> float:
    """Median seconds of a few steps of a state that is thrown away."""
    times: list[float] = []
    state, batch = built.init(jax.random.key(0)), built.put(data[0])
    began = time.perf_counter()
    alone = jax.process_count() == 1  # hosts of a job all run as many
    while len(times) < 1 + TIMED and not (alone and len(times) > 1 and time.perf_counter() - began > TIMED_S):
        before = time.perf_counter()
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:])
