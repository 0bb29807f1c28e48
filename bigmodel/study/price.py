"""Prices of trials before they start, and the cap that a study keeps to.

Trials whose programs differ in nothing but numbers, such as a learning rate, are compiled once.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigmodel import disk, units
from bigmodel.config import Config, InputError
from bigmodel.plan import estimate, planner, receipt, target
from bigmodel.plan import machine as machine_lib

# A cap's unit -> (the key of a price, what one of it is in the key's unit).
UNITS = {
    "s": ("total_s", 1.0), "min": ("total_s", 60.0), "h": ("total_s", 3600.0), "d": ("total_s", 86400.0),
    "$": ("dollars", 1.0), "kwh": ("kwh", 1.0), "flop": ("total_flops", 1.0),
}  # fmt: skip
PUE = receipt.ASSUMPTIONS["pue"][0]
Price = dict[str, float]  # total_s, total_flops and, where they are known, kwh and dollars
NUMBER = re.compile(r"dense<-?[\d.]+(?:E[+-]?\d+)?> : tensor<(?:f|bf)\d+>", re.IGNORECASE)  # not a whole one


@dataclass(frozen=True)
class Cap:
    """The most that a study may spend: of one of a price's keys."""

    key: str
    amount: float
    text: str  # as it was given

    def of(self, price: Mapping[str, float]) -> float:
        return price[self.key]


def parse_cap(text: str) -> Cap | None:
    """`2h`, `90min`, `$50`, `3kwh`, `1e18flop` -> a Cap; "": None.

    Raises:
        InputError: no such unit, or an amount that is not above 0.
    """
    if not text:
        return None
    number, unit = (text[1:], "$") if text.startswith("$") else _divided(text)
    try:
        key, one = UNITS[unit.lower()]
        amount = float(number) * one
        if not 0 < amount < float("inf"):
            raise ValueError
    except (KeyError, ValueError) as error:
        raise InputError(
            f"--cap={text}: give an amount above 0 and its unit, such as 2h, 90min, $50, 3kwh or 1e18flop"
        ) from error
    return Cap(key, amount, text)


def _divided(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    return (found[1], found[2]) if found else ("", "")


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

    def receipt(self, config: Config) -> receipt.Receipt:
        """The receipt of a run. Raises as `planner.plan`."""
        aim = target.of(config, self.spec)
        built, machine = planner.build(config, aim), machine_lib.of(aim)
        text = NUMBER.sub("dense<>", built.lower().as_text())
        key = hashlib.sha256(f"{aim.spec} {dict(config.compiler_options)} {text}".encode()).hexdigest()
        if key not in self._made:
            compiled = planner.compile_for(built, aim)
            self._made[key] = (compiled, *machine.step(built, compiled, calibrated=self.calibrated))
        compiled, steps, source = self._made[key]
        count = estimate.steps_for_budget(built) if config.budget else None
        made = receipt.make(built, compiled, machine, steps, source, steps_left=count, assume=self.assume)
        if not made["fits"]:
            raise InputError(f"it needs {units.size(-made['headroom_bytes'])} more than a device has")
        return made


def of_receipt(made: Mapping[str, Any]) -> Price:
    """The parts of a receipt that a cap can count."""
    return {key: float(made[key]) for key, _ in UNITS.values() if made.get(key) is not None}


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
    out |= {key: share * planned[key] for key in ("dollars", "kwh") if key in planned}
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
