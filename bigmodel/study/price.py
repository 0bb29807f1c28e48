"""Prices of trials before they start, and the cap that a study keeps to.

Trials whose programs differ in nothing but numbers, such as a learning rate, are compiled once.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from bigmodel import disk, units
from bigmodel.config import Config, InputError
from bigmodel.plan import machine as machine_lib
from bigmodel.plan import planner, target
from bigmodel.plan import receipt as receipts
from bigmodel.plan.receipt import Receipt

PUE = receipts.ASSUMPTIONS["pue"][0]
Price = dict[str, float]  # total_s, total_flops and, where they are known, kwh and dollars
NUMBER = re.compile(r"dense<-?[\d.]+(?:E[+-]?\d+)?> : tensor<(?:f|bf)\d+>", re.IGNORECASE)  # not a whole one


class Pricer:
    """Prices configs on one target, with a compilation for each program that is new."""

    def __init__(
        self, spec: str = "", assume: Mapping[str, float] | None = None, *, calibrated: bool = True
    ) -> None:
        """Args as `planner.plan`'s, and `Machine.step`'s."""
        self.spec, self.assume, self.calibrated = spec, dict(assume or {}), calibrated
        self._made: dict[str, tuple[Any, Any, Any]] = {}

    @property
    def compilations(self) -> int:
        return len(self._made)

    def receipt(self, config: Config) -> Receipt:
        """The receipt of a run. Raises as `planner.plan`."""
        return self.priced(config)[0]

    def priced(self, config: Config) -> tuple[Receipt, str]:
        """The receipt of a run, and the key of its program. Raises as `planner.plan`."""
        aim = target.of(config, self.spec)
        built, machine = planner.build(config, aim), machine_lib.of(aim)
        text = NUMBER.sub("dense<>", built.lower().as_text())
        key = hashlib.sha256(f"{aim.spec} {dict(config.compiler_options)} {text}".encode()).hexdigest()
        if key not in self._made:
            compiled = planner.compile_for(built, aim)
            self._made[key] = (compiled, *machine.step(built, compiled, calibrated=self.calibrated))
        compiled, steps, source = self._made[key]
        made = receipts.make(built, compiled, machine, steps, source, assume=self.assume)
        if not made["fits"]:
            raise InputError(f"it needs {units.size(-made['headroom_bytes'])} more than a device has")
        return made, key


def of_receipt(made: Mapping[str, Any]) -> Price:
    """The parts of a receipt that a cap can count."""
    return {key: float(made[key]) for key, _ in units.SPENT.values() if made.get(key) is not None}


def spent(directory: pathlib.Path, planned: Mapping[str, float], pue: float = PUE) -> Price:
    """The price that a run has cost so far, by its ledger.json; {} before it has one.

    Args:
        planned: its price by the plan, for the machine's dollars and kWh an hour.
    """
    try:
        ledger = disk.read_json(directory / "ledger.json")
    except FileNotFoundError:
        return {}
    share = ledger["total_s"] / max(planned["total_s"], 1e-12)
    out = {"total_s": ledger["total_s"], "total_flops": ledger["model_flops"]}
    out |= {key: share * planned[key] for key in ("dollars", "kwh", "chip_hours") if key in planned}
    if "joules" in ledger and "kwh" in planned:
        out["kwh"] = ledger["joules"] / 3.6e6 * pue
    return out


def total(prices: list[Price]) -> Price:
    """The sum, of the keys that every price has."""
    keys = set.intersection(*(set(price) for price in prices)) if prices else set()
    return {key: sum(price[key] for price in prices) for key in sorted(keys)}


def line(price: Mapping[str, float]) -> str:
    """`12 min 5 s, 3.2 PFLOP, 0.012 kWh, $1.20`."""
    parts = [_time(price["total_s"])] if "total_s" in price else []
    if "total_flops" in price:
        parts.append(f"{units.quantity(price['total_flops'])}FLOP")
    if "kwh" in price:
        parts.append(f"{price['kwh']:.3g} kWh")
    if "dollars" in price:
        parts.append(f"${price['dollars']:.2f}")
    return ", ".join(parts)


def _time(s: float) -> str:
    return units.duration(s) if s >= 60 else units.seconds(s)
