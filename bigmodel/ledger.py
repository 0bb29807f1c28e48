"""Spending of a run: time by bucket, energy, FLOPs; `goodput` is the share of time in training steps.

ledger.json adds up all sessions of a run (its first start, and each resume); `sessions` has each one's own.
`parts` divides time, dollars and kWh, which it takes to be spent evenly in time. Two of its buckets are of
runs that died: `wasted` is work that had to be done again, `waiting` the time without a trainer in between.
`workload` has the same seconds under the names that MaxText's goodput library gives them.
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
    """Seconds by bucket: start, compile, check, restore, step, input, eval, checkpoint, callbacks, waiting,
    wasted, other."""

    def __init__(
        self,
        entering: Callable[[str], AbstractContextManager[None]] | None = None,
        *,
        waited_s: float = 0.0,
        started_s: float = 0.0,
    ) -> None:
        """Args:
        entering: called with the name of each bucket; entered while that one is timed.
        waited_s, started_s: seconds before now without a trainer, and then of this one's start.
        """
        before_s = waited_s + started_s
        self._began, self._began_at = time.perf_counter() - before_s, time.time() - before_s
        self._entering = entering or (lambda bucket: contextlib.nullcontext())
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.seconds["start"] += started_s
        if waited_s:
            self.seconds["waiting"] += waited_s
        self._joules: defaultdict[str, float] = defaultdict(float)
        self.steps = self.redone_steps = 0
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

    def waste(self, steps: int) -> int:
        """Counts the last `steps` steps as to be done again. -> how many of them earlier sessions did."""
        here = min(steps, self.steps - self.redone_steps)
        if here:
            seconds = self.seconds["step"] * here / (self.steps - self.redone_steps)
            self.seconds["step"] -= seconds
            self.seconds["wasted"] += seconds
            self.redone_steps += here
        return steps - here

    def goodput(self, before: Mapping[str, Any]) -> float:
        """The share of time in training steps, over this session and those of ledger.json, `before`."""
        step_s = self.seconds["step"] + before.get("seconds", {}).get("step", 0.0)
        return float(step_s / (time.perf_counter() - self._began + before.get("total_s", 0.0)))

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
            "redone_steps": self.redone_steps,
            "model_flops": flops_per_step * self.steps,
            "step_s": _step_s(self.seconds, self.steps - self.redone_steps),
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
    redone = sum(each.get("redone_steps", 0) for each in sessions)
    out = session | {
        "total_s": total_s,
        "seconds": seconds,
        "goodput": seconds.get("step", 0.0) / total_s if total_s else 0.0,
        "steps": steps,
        "redone_steps": redone,
        "model_flops": sum(each["model_flops"] for each in sessions),
        "step_s": _step_s(seconds, steps - redone),
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
    return out | {"parts": _parts(out), "workload": _workload(out)}


def _step_s(seconds: Mapping[str, float], steps: int) -> float | None:
    return seconds.get("step", 0.0) / steps if steps else None


def _parts(added: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of each bucket, their share of all, and what they cost at the run's mean price of a second."""
    total_s = added["total_s"] or 1.0
    keys = [key for key in ("dollars", "kwh") if key in added]
    return {
        name: {"s": s, "share": s / total_s} | {key: added[key] * s / total_s for key in keys}
        for name, s in added["seconds"].items()
    }


# Names of ml-goodput-measurement, which MaxText uses; custom ones are by our own names.
BADPUT = {
    "start": "TRAINING_PREP", "check": "TRAINING_PREP", "compile": "PROGRAM_STARTUP",
    "input": "DATA_LOADING_SYNC", "checkpoint": "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME",
    "restore": "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME", "wasted": "WASTED_PROGRESS_FROM_DISRUPTION",
    "waiting": "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION", "other": "OTHER",
}  # fmt: skip


def _workload(added: Mapping[str, Any]) -> dict[str, Any]:
    badput: dict[str, Any] = defaultdict(float)
    custom = {}
    for name, s in added["seconds"].items():
        if name in BADPUT:
            badput[BADPUT[name]] += s
        elif name != "step":
            custom[name] = s
    return {
        "goodput_time": {"TOTAL": added["seconds"].get("step", 0.0)},
        "badput_time": {**badput, "CUSTOM_BADPUT_EVENTS": custom},
        "max_productive_step": added.get("last_step", added["steps"] - added["redone_steps"]),
        "total_elapsed_time": added["total_s"],
        "disruption_count": len(added["sessions"]) - 1,
    }


def lose(before: Mapping[str, Any], step: int, died: tuple[float, int] | None = None) -> dict[str, Any]:
    """Returns ledger.json with the work after `step`, from which the run goes on, as wasted.

    Args:
        before: ledger.json.
        died: when the last session, if it was killed, was last heard of (seconds since 1970), and at which
            step: what it did after it wrote its ledger is wasted, too.
    """
    earlier = before.get("sessions", [before] if before else [])
    sessions = [dict(each) for each in earlier if isinstance(each, dict) and _is_report(each)]
    if not sessions:
        return dict(before)
    last = sessions[-1]
    if died is not None and "ended" not in last and {"began_at", "last_step"} <= last.keys():
        _count_after_the_end(last, *died)
    for each in sessions:
        lost = min(each.get("last_step", 0) - max(step, each.get("first_step", 0)), _useful(each))
        if lost > 0:
            s = each["seconds"]["step"] * lost / _useful(each)
            each["seconds"] = _moved(_moved(each["seconds"], "step", -s), "wasted", s)
            each["redone_steps"] = each.get("redone_steps", 0) + lost
            each["last_step"] -= lost
        each["goodput"] = each["seconds"].get("step", 0.0) / each["total_s"]
    return add_up({"sessions": sessions[:-1]}, last)


def _useful(session: Mapping[str, Any]) -> int:
    """Steps of a session that are still part of the run."""
    return int(session["steps"] - session.get("redone_steps", 0))


def _count_after_the_end(session: dict[str, Any], at: float, step: int) -> None:
    """Adds what a session did between its last ledger and its death."""
    after_s, steps = at - session["began_at"] - session["total_s"], max(step - session["last_step"], 0)
    if after_s <= 0:
        return
    share = 1 + after_s / session["total_s"]
    for key in ("joules", "chip_hours", "dollars", "kwh"):
        if key in session:
            session[key] *= share
    session["total_s"] += after_s
    session["seconds"] = _moved(session["seconds"], "wasted", after_s)
    if session["steps"]:
        session["model_flops"] *= 1 + steps / session["steps"]
    session["steps"] += steps
    session["redone_steps"] = session.get("redone_steps", 0) + steps


def _moved(seconds: Mapping[str, float], bucket: str, by_s: float) -> dict[str, float]:
    return {**seconds, bucket: seconds.get(bucket, 0.0) + by_s}


def _is_report(value: dict[str, Any]) -> bool:
    numbers = [value.get(key) for key in ("steps", "total_s", "model_flops")]
    seconds = value.get("seconds")
    return isinstance(seconds, dict) and all(
        isinstance(x, int | float) for x in [*numbers, *seconds.values()]
    )


MAXTEXT = {
    "train/loss": "learning/loss",
    "train/grad_norm": "learning/grad_norm",
    "train/lr": "learning/current_learning_rate",
    "perf/goodput": "goodput",
}


def maxtext(row: Mapping[str, float], flops: float, devices: int) -> dict[str, float]:
    """Returns the metrics of a line of the log under the names that MaxText gives them, in its units.

    Args:
        flops: of a step, on one device.
    """
    out = {theirs: row[ours] for ours, theirs in MAXTEXT.items() if ours in row}
    step_s = row["perf/step_time_s"] + row["perf/input_wait_s"]
    out |= {"perf/step_time_seconds": step_s, "perf/per_device_tflops": flops / 1e12}
    out["perf/per_device_tflops_per_sec"] = flops / 1e12 / step_s
    if "perf/tokens_per_s" in row:
        out["perf/per_device_tokens_per_sec"] = row["perf/tokens_per_s"] / devices
    return out


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
