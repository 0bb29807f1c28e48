"""Spending of a run: time by bucket, energy, FLOPs; `goodput` is the share of time in training steps.

ledger.json adds up all sessions of a run (its first start, and each resume); `sessions` has each one's own.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from bigmodel.machines import energy


class Ledger:
    """Seconds by bucket: start, compile, check, restore, step, input, eval, checkpoint, callbacks, other."""

    def __init__(self, entering: Callable[[str], AbstractContextManager[None]] | None = None) -> None:
        """Args: entering: called with the name of each bucket; entered while that one is timed."""
        self._began, self._began_at = time.perf_counter(), time.time()
        self._entering = entering or (lambda bucket: contextlib.nullcontext())
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._joules: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._meter: energy.Meter | None = None

    def watch(self, devices: Sequence[jax.Device]) -> None:
        """Counts the energy of this host's devices from now on."""
        self._meter = energy.Meter(devices)
        self._watts, self._assumes = energy.watts(devices)

    @contextlib.contextmanager
    def timing(self, bucket: str) -> Iterator[None]:
        began, before_j = time.perf_counter(), self.joules()
        try:
            with self._entering(bucket):
                yield
        finally:
            self.seconds[bucket] += time.perf_counter() - began
            self._joules[bucket] += (self.joules() or 0.0) - (before_j or 0.0)

    def joules(self) -> float | None:
        """Joules since `watch`, by the machine's counters; None without any."""
        return self._meter.joules() if self._meter else None

    def report(self, flops_per_step: float) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        total = time.perf_counter() - self._began
        buckets = dict(self.seconds) | {"other": total - sum(self.seconds.values())}
        return {
            "began_at": round(self._began_at, 3),
            "total_s": total,
            "seconds": {name: round(s, 4) for name, s in buckets.items()},
            "goodput": self.seconds["step"] / total,
            "steps": self.steps,
            "model_flops": flops_per_step * self.steps,
            "step_s": self.seconds["step"] / self.steps if self.steps else None,
            **self._energy(total),
        }

    def _energy(self, total_s: float) -> dict[str, Any]:
        """Joules of this host's devices, in total and for one step with its input, and their source."""
        if self._meter is None:
            return {}
        steps, joules = max(self.steps, 1), self.joules()
        if joules is not None:
            step_j = (joules - sum(self._joules.values())) / steps
            return {"joules": joules, "step_j": step_j, "joules_from": f"measured: {self._meter.source}"}
        step_j = self._watts * (self.seconds["step"] + self.seconds["input"]) / steps
        how = f"modelled: measured time x {self._assumes}"
        return {"joules": self._watts * total_s, "step_j": step_j, "joules_from": how}


def add_up(before: Mapping[str, Any], session: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of ledger.json after a session.

    Args:
        before: the content of ledger.json when the session began; {} if there was none.
        session: `Ledger.report`, and its price.
    """
    earlier = before.get("sessions", [before] if before else [])
    sessions = [each for each in earlier if isinstance(each, dict) and _is_report(each)] + [session]
    steps, total_s = sum(each["steps"] for each in sessions), sum(each["total_s"] for each in sessions)
    names = dict.fromkeys(name for each in sessions for name in each["seconds"])
    seconds = {name: round(sum(each["seconds"].get(name, 0.0) for each in sessions), 4) for name in names}
    out = session | {
        "total_s": total_s,
        "seconds": seconds,
        "goodput": seconds.get("step", 0.0) / total_s if total_s else 0.0,
        "steps": steps,
        "model_flops": sum(each["model_flops"] for each in sessions),
        "step_s": seconds.get("step", 0.0) / steps if steps else None,
        "sessions": sessions,
    }
    for key in ("joules", "chip_hours", "dollars", "kwh"):
        if all(key in each for each in sessions):
            out[key] = sum(each[key] for each in sessions)
        else:
            out.pop(key, None)
    if "joules" in out:
        out["step_j"] = sum(each["step_j"] * each["steps"] for each in sessions) / max(steps, 1)
        out["joules_from"] = "; ".join(dict.fromkeys(each["joules_from"] for each in sessions))
    return out


def _is_report(value: dict[str, Any]) -> bool:
    numbers = [value.get(key) for key in ("steps", "total_s", "model_flops")]
    seconds = value.get("seconds")
    return isinstance(seconds, dict) and all(
        isinstance(x, int | float) for x in [*numbers, *seconds.values()]
    )


class Window:
    """Mean step and input time since the last line of the log, without pauses."""

    def reset(self) -> None:
        self.began, self.steps, self.wait_s = time.perf_counter(), 0, 0.0

    __init__ = reset

    def add(self, wait_s: float) -> None:
        self.steps += 1
        self.wait_s += wait_s

    def means(self) -> tuple[float, float]:
        """-> (seconds a step without input, seconds of waiting for input)."""
        steps = max(self.steps, 1)
        return max((time.perf_counter() - self.began - self.wait_s) / steps, 1e-9), self.wait_s / steps
