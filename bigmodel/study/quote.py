"""Prices of a study before its first trial starts: a table of trials, the sum, and what a cap pays for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel import tasks
from bigmodel.config import InputError
from bigmodel.study import overhead, price, trials
from bigmodel.study.order import Order, described
from bigmodel.study.overhead import Overhead
from bigmodel.study.price import Price, Pricer
from bigmodel.study.trials import Settings
from bigmodel.units import Cap


class Prices:
    """Prices of an order's trials, each computed once."""

    def __init__(self, order: Order, pricer: Pricer, cap: Cap | None, command: Sequence[str] = ()) -> None:
        """Args:
        command: trains; it measures what a run takes beyond its steps. (): steps alone are priced.
        """
        self.order, self.pricer, self.cap, self.command = order, pricer, cap, command
        self._made: dict[tuple[tuple[str, str], ...], Price] = {}
        self._overheads: dict[float, Overhead] = {}  # by the seconds of a step

    def prepare(self, all_settings: Sequence[Settings]) -> None:
        """Prices trials; where there is a command, measures the overhead of up to overhead.MOST programs."""
        programs: dict[str, tuple[float, Settings]] = {}
        sized = {}
        for settings in all_settings:
            lengths, found, key, step_s = self._steps(settings)
            sized[_key(settings)] = (lengths, found, step_s)
            programs.setdefault(key, (step_s, settings))
        known = {step_s: (key, settings) for key, (step_s, settings) in programs.items()}
        if self.command:
            steps_s = sorted(known)
            for index in overhead.spread(steps_s):
                key, settings = known[steps_s[index]]
                command = self.order.command(self.command, settings)
                self._overheads[steps_s[index]] = overhead.measure(command, key)
        for name, (lengths, found, step_s) in sized.items():
            self._made[name] = self._of_run(*lengths, found, step_s)

    def __call__(self, settings: Settings) -> Price:
        """The price of a trial. Raises InputError, which names it."""
        key = _key(settings)
        if key not in self._made:
            lengths, found, _, step_s = self._steps(settings)
            self._made[key] = self._of_run(*lengths, found, step_s)
        return self._made[key]

    def _of_run(self, steps: int, every: int, found: Price, step_s: float) -> Price:
        if not self._overheads:
            return found
        return overhead.with_overhead(found, overhead.between(step_s, self._overheads).of(steps, every))

    def _steps(self, settings: Settings) -> tuple[tuple[int, int], Price, str, float]:
        try:
            config = tasks.sized(self.order.config(settings))
            made, key = self.pricer.priced(config)
        except InputError as error:
            raise InputError(f"trial {described(settings)}: {error}") from error
        found = price.of_receipt(made)
        if self.cap and self.cap.key not in found:
            raise InputError(
                f"--cap={self.cap}: the price of this machine is not known; give "
                "--assume=dollars_per_chip_hour=2 or --assume=watts=200"
            )
        return (int(made["steps"]), config.eval.every_steps), found, key, float(made["step_s"])

    def parts(self) -> str:
        """Says in words what the prices count."""
        compiled = f"{self.pricer.compilations} compiled"
        if not self._overheads:
            return f"in steps alone; {compiled}"
        return f"with starts and evaluations as measured here; {compiled}"


@dataclass(frozen=True)
class Quote:
    """The price of a study."""

    rows: tuple[dict[str, Any], ...]  # one a trial of a grid; one for all trials of a search
    total: Price
    lines: tuple[str, ...]  # for people


def make(order: Order, prices: Prices) -> Quote:
    """Prices a study.

    Raises:
        InputError: a trial cannot be priced, or does not fit into memory; the trial is named.
    """
    corners = order.corners()
    prices.prepare([*order.grid, *corners])
    found = _of_search(order, prices, corners) if corners else _of_grid(order, prices)
    definition, cap = order.definition, prices.cap
    lines = [*found.lines]
    best = "highest" if definition.maximize else "lowest"
    lines.append(f"metric    {definition.metric}, the {best} is best")
    if cap and cap.of(found.total) > cap.amount:
        lines.append(f"cap       {cap} is less than the sum: the study will end before its last trial")
    return Quote(found.rows, found.total, tuple(lines))


def _of_grid(order: Order, prices: Prices) -> Quote:
    rows, sums, lines, cap = [], [], [f"study     {len(order.grid)} trials"], prices.cap
    for settings in order.grid:
        sums.append(prices(settings))
        paid = cap is None or cap.of(price.total(sums)) <= cap.amount
        name, note = trials.name(settings), "" if paid else "   the cap does not pay for it"
        lines.append(f"  {name}: {price.line(sums[-1])}{note}")
        rows.append({"name": name, "settings": settings, "paid": paid, **sums[-1]})
    each = price.total(sums)
    lines.append(f"sum       {price.line(each)}, {prices.parts()}")
    return Quote(tuple(rows), each, tuple(lines))


def _of_search(order: Order, prices: Prices, corners: Sequence[Settings]) -> Quote:
    found = [prices(settings) for settings in corners]
    dearest = {key: max(each[key] for each in found) for key in found[0]}
    total = {key: value * order.count for key, value in dearest.items()}
    space = [*(f"{key} {each}" for key, each in order.space.ranges.items())]
    space += [f"{key} {', '.join(values)}" for key, values in order.space.values.items()]
    lines = (
        f"study     {order.count} trials by {order.definition.sampler} over {'; '.join(space)}",
        f"          at most {price.line(dearest)} a trial, {price.line(total)} in all, {prices.parts()}",
    )
    return Quote(({"trials": order.count, **dearest},), total, lines)


def _key(settings: Settings) -> tuple[tuple[str, str], ...]:
    return tuple(settings.items())
