"""The receipt: what a run will cost, as plain values with their units and assumptions, and as lines to read.

`train` writes it as plan.json, and `compare` sets it beside what was measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from bigmodel import units
from bigmodel.config import Config, InputError, ranges
from bigmodel.machines.chips import Chip
from bigmodel.plan import estimate, flops, schedule
from bigmodel.plan.compiled import Compiled
from bigmodel.plan.machine import Machine, TimeSource
from bigmodel.plan.schedule import Schedule
from bigmodel.program import Program
from bigmodel.units import duration, quantity, seconds, size

Receipt = dict[str, Any]  # plain values, fit for JSON

# What a plan assumes of the world; `--assume=KEY=VALUE` replaces any of them.
ASSUMPTIONS: dict[str, tuple[float, str]] = {
    "pue": (1.1, "power usage effectiveness of a large data center (Google's fleet, 2024)"),
    "kg_co2e_per_kwh": (0.45, "world average of electricity (IEA, 2024)"),
}


def make(
    program: Program,
    compiled: Compiled,
    machine: Machine,
    steps: Schedule,
    source: TimeSource,
    *,
    steps_left: int | None = None,
    assume: dict[str, float] | None = None,
) -> Receipt:
    """Keys end in their unit: `_bytes` are per device, `_flops` over the whole mesh, `_s` seconds.

    Args:
        steps, source: as `Machine.step` gives them.
    """
    config, target, spread = program.config, machine.target, source.uncertainty
    unit = "tokens" if "tokens" in program.batch_spec else "examples"
    tokens = config.batch_size * (config.seq_len if unit == "tokens" else 1)
    step_flops = flops.model_flops(program)
    by_formula = flops.by_formula(config)
    r: Receipt = {
        "target": target.spec,
        "time_from": source.name,
        "device_kind": target.chip.name,
        "devices": program.mesh.size,
        "chips": target.chips,
        "compiler": target.compiler,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "remat": config.remat,
        "parameters": estimate.parameters(program.model.plain_spec),
        "active_parameters": estimate.active_parameters(program),
        "trained_parameters": estimate.trained_parameters(program),
        "microbatches": program.pieces,
        "unit": unit,  # which the keys with `token` count
        "tokens_per_step": tokens,
        "model_flops_per_step": step_flops,
        "model_flops_per_token": step_flops / tokens,
        "formula_flops_per_token": by_formula,
        **estimate.memory(program, compiled, machine),
        "step_s": steps.total_s,
        "step_s_range": [steps.total_s / (1 + spread), steps.total_s * (1 + spread)],
        "breakdown_s": steps.breakdown(),
        "collectives": collectives(steps, program),
        "tokens_per_s_per_chip": tokens / steps.total_s / target.chips,
        "time_source": source.text,
    }
    r |= _mfu(program, target.chip, r)
    figures = config.assume.given | (assume or {})
    count = config.steps if steps_left is None else steps_left
    if config.budget and steps_left is None:
        count = affordable(config, _price(machine, r, 1, figures))
    r |= _price(machine, r, count, figures)
    r["total_s_range"] = [r["total_s"] / (1 + spread), r["total_s"] * (1 + spread)]
    r["limited_by"] = limited_by(r)
    r["made_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return r


def _mfu(program: Program, chip: Chip, r: Receipt) -> Receipt:
    """Share of the peak that useful FLOPs reach, attention counted in full and (causal) by half."""
    if program.config.compute_dtype not in chip.flops:
        return {}
    peak = chip.flops[program.config.compute_dtype] * program.mesh.size
    masked = flops.masked_per_token(program.config) * r["tokens_per_step"]
    return {
        "peak_flops_per_s": peak,
        "mfu_full_attention": r["model_flops_per_step"] / peak / r["step_s"],
        "mfu_causal_attention": (r["model_flops_per_step"] - masked) / peak / r["step_s"],
    }


def affordable(config: Config, one: Receipt) -> int:
    """Steps that `config.budget` pays for, at least one. Args: one: the price of a step.

    Raises:
        InputError: the price of these chips is not known, or the budget buys more steps than a counter holds.
    """
    cap = units.cap(config.budget)
    assert cap is not None
    if not one.get(cap.key):
        key = {"dollars": "dollars_per_chip_hour"}.get(cap.key, "watts")
        raise InputError(
            f"budget={cap.text}: its price here is not known; set assume.{key}, for example to 2"
        )
    count = max(int(cap.amount // one[cap.key]), 1)
    if count > ranges.INT32:
        raise InputError(f"budget is {cap}, which buys {count:,} steps; set it lower")
    return count


def of_a_second(machine: Machine, assume: dict[str, float]) -> Receipt:
    """The price of a second on all chips, of the parts that are known."""
    return _price(machine, {"step_s": 1.0, "model_flops_per_step": 0.0}, 1, assume)


def _price(machine: Machine, r: Receipt, steps: int, assume: dict[str, float]) -> Receipt:
    """Time, FLOPs, chip-hours, energy, emissions and dollars of some steps, each with what it assumes."""
    notes = {key: f"{assume.get(key, value)}: {why}" for key, (value, why) in ASSUMPTIONS.items()}
    values = {key: assume.get(key, value) for key, (value, _) in ASSUMPTIONS.items()}
    hours, chips = r["step_s"] * steps / 3600, machine.target.chips
    out: Receipt = {"steps": steps, "total_flops": r["model_flops_per_step"] * steps}
    out |= {"total_s": r["step_s"] * steps, "hours": hours, "chip_hours": hours * chips, "pue": values["pue"]}
    watts, why = (assume["watts"], "as given") if "watts" in assume else machine.watts()
    dollars = assume.get("dollars_per_chip_hour", machine.chip.dollars_per_hour)
    if watts:
        notes["watts"] = f"{watts:g} a chip: {why}"
        out["step_j"] = watts * chips * r["step_s"]
        out["kwh"] = out["chip_hours"] * watts / 1000 * values["pue"]
        out["kg_co2e"] = out["kwh"] * values["kg_co2e_per_kwh"]
    if dollars is not None:
        notes["dollars_per_chip_hour"] = f"{dollars:g}: list price on demand, unless given by --assume"
        out["dollars"] = out["chip_hours"] * dollars
    return {**out, "assumptions": {**notes, **{k: str(v) for k, v in assume.items() if k not in notes}}}


def collectives(steps: Schedule, program: Program) -> list[Receipt]:
    """Collectives and offloads by kind and mesh axes: times, bytes and seconds a step, and what is hidden."""
    rows: defaultdict[tuple[str, str], Receipt] = defaultdict(
        lambda: {"times": 0, "bytes": 0.0, "time_s": 0.0, "exposed_s": 0.0}
    )
    for e in steps.events:
        if e.kind in schedule.COMPUTE or e.kind == "copy":
            continue
        row = rows[e.kind, _axes(e.group, program)]
        row["times"] += e.times
        row["bytes"] += e.times * e.bytes
        row["time_s"] += e.times * e.duration_s
        row["exposed_s"] += e.times * e.exposed_s
    return [
        {
            "kind": kind,
            "axes": axes,
            **row,
            "hidden": max(1 - row["exposed_s"] / max(row["time_s"], 1e-12), 0.0),
        }
        for (kind, axes), row in sorted(rows.items(), key=lambda item: -item[1]["time_s"])
    ]


def _axes(group: tuple[int, ...], program: Program) -> str:
    """The mesh axes along which a group's partitions differ; no group: all of them."""
    shape = program.mesh.shape
    sizes = {axis: size for axis, size in shape.items() if size > 1}
    if not group:
        return "x".join(sizes) or "-"
    found, stride = [], 1
    for axis, count in reversed(shape.items()):
        if count > 1 and len({member // stride % count for member in group}) > 1:
            found.append(axis)
        stride *= count
    return "x".join(reversed(found)) or "-"


def limited_by(r: Receipt) -> str:
    """One line: the kind of work that takes most of the step, and what to change first."""
    if not r["fits"]:
        return f"memory: {size(-r['headroom_bytes'])} too much a device: a stronger remat or more devices"
    kind = max(r["breakdown_s"], key=lambda k: r["breakdown_s"][k], default="matmul")
    share = f"{r['breakdown_s'].get(kind, 0) / max(r['step_s'], 1e-12):.0%} of the step"
    if kind == "communication":
        worst = max(r["collectives"], key=lambda row: row["exposed_s"])
        axis = worst["axes"].split("x")[0]
        return (
            f"communication, {share} (most of it {worst['kind']} over {worst['axes']}): "
            f"more examples a device, or a smaller mesh.{axis}"
        )
    remats = r["remat"] != "none"
    if kind == "matmul":
        spare = remats and (r["headroom_bytes"] or 0) > 0.3 * r["peak_bytes"]
        hint = "memory to spare for a lighter remat, which computes less again" if spare else "little to gain"
        return f"matrix products, {share}: {hint}"
    hints = {
        "memory": "a lower precision, larger matrices" + (", or less remat" if remats else ""),
        "attention": "a shorter seq_len, or fewer heads",
        "optimizer": "more examples a step"
        + (", or mesh.fsdp to share its state" if r["devices"] > 1 else ", or a simpler optim.name"),
    }
    names = {"memory": "memory bandwidth"}
    return f"{names.get(kind, kind)}, {share}: {hints[kind]}"


def table(r: Receipt) -> list[str]:
    """The receipt as lines for a terminal."""
    unit, step_s = r["unit"], max(r["step_s"], 1e-12)
    fastest, slowest = map(seconds, r["step_s_range"])
    low, high = (duration(s) for s in r["total_s_range"])
    mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items()) or "one device"
    room = ""
    if r["capacity_bytes"]:
        room = f"; of {size(r['capacity_bytes'])}, headroom {size(r['headroom_bytes'])}"
    lines = [
        f"plan      {r['devices']} x {r['device_kind']} ({mesh}), {r['microbatches']} microbatches, "
        f"remat {r['remat']}",
        _model(r),
        f"  memory  {size(r['peak_bytes'])} a device: parameters {size(r['params_bytes'])}, optimizer "
        f"{size(r['optimizer_bytes'])}, gradients, activations and temporaries {size(r['temporary_bytes'])}"
        + room,
        f"  time    {seconds(r['step_s'])} a step ({fastest} to {slowest}), "
        f"{quantity(r['tokens_per_s_per_chip'])}{unit}/s a chip: {r['time_source']}",
        "          " + ", ".join(
            f"{kind} {s / step_s:.0%}" for kind, s in sorted(r["breakdown_s"].items(), key=lambda kv: -kv[1])
        ),
    ]  # fmt: skip
    if "mfu_full_attention" in r:
        lines.append(
            f"  MFU     {r['mfu_full_attention']:.1%} (attention counted in full), "
            f"{r['mfu_causal_attention']:.1%} (causal)"
        )
    lines += [
        f"  network {row['kind']} over {row['axes']}: {row['times']:,} a step, {size(row['bytes'])}, "
        f"{seconds(row['time_s'])}, {row['hidden']:.0%} hidden"
        for row in r["collectives"]
        if row["time_s"] > 1e-3 * r["step_s"]
    ]
    lines.append(f"  run     {duration(r['total_s'])} ({low} to {high}) for {r['steps']:,} steps" + _spent(r))
    lines += [f"          assumes {key} {why}" for key, why in r["assumptions"].items() if "kwh" in r]
    return [*lines, f"  limit   {r['limited_by']}"]


def _model(r: Receipt) -> str:
    sparse = r["active_parameters"] != r["parameters"]
    counts = f" ({quantity(r['active_parameters'])} active)" if sparse else ""
    if r["trained_parameters"] != r["parameters"]:
        counts += f" ({quantity(r['trained_parameters'])} trained)"
    formula = r["formula_flops_per_token"]
    agree = f" (by formula {formula / r['model_flops_per_token'] - 1:+.1%})" if formula else ""
    each = "a token" if r["unit"] == "tokens" else "an example"
    return (
        f"  model   {quantity(r['parameters'])} parameters{counts}, "
        f"{quantity(r['model_flops_per_token'])}FLOP {each}{agree}, "
        f"{quantity(r['model_flops_per_step'])}FLOP a step, {quantity(r['total_flops'])}FLOP in all"
    )


def _spent(r: Receipt) -> str:
    parts = [f"{r['chip_hours']:,.4g} chip-hours"] if "kwh" in r or "dollars" in r else []
    parts += [f"{r['kwh']:,.4g} kWh", f"{r['kg_co2e']:,.4g} kg CO2e"] if "kwh" in r else []
    parts += [f"${r['dollars']:,.2f}"] if "dollars" in r else []
    return "".join(f", {part}" for part in parts)


ADDED = ("steps", "total_flops", "total_s", "hours", "chip_hours", "kwh", "kg_co2e", "dollars")


def add_up(before: Receipt, r: Receipt, first_step: int) -> Receipt:
    """plan.json of a run that goes on at `first_step`: what all its sessions were planned to spend.

    Args:
        before: what plan.json held; of each session there, the steps up to the next one's first count.
        r: this session's receipt, of the steps that are left.
    """
    facts = (*ADDED, "step_s", "made_at", "command", "versions")
    session = {"first_step": first_step, **{key: r[key] for key in facts if key in r}}
    earlier = [each for each in before.get("sessions", []) if _is_session(each)]
    sessions = [each for each in earlier if each["first_step"] < first_step] + [session]
    total: defaultdict[str, float] = defaultdict(float)
    for each, end in zip(sessions, [*(s["first_step"] for s in sessions[1:]), None], strict=True):
        done = each["steps"] if end is None else end - each["first_step"]
        for key in (key for key in ADDED if key in each):
            total[key] += each[key] * done / max(each["steps"], 1)
    added: Receipt = {key: total[key] for key in ADDED if all(key in each for each in sessions)}
    spread = r["total_s_range"][1] / r["total_s"]
    added["total_s_range"] = [added["total_s"] / spread, added["total_s"] * spread]
    return r | added | {"steps": round(total["steps"]), "sessions": sessions}


def _is_session(value: Any) -> bool:
    keys = ("first_step", "steps", "total_s", "total_flops")
    return isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in keys)


def compare(r: Receipt, measured: dict[str, tuple[float, str]]) -> list[str]:
    """Predicted beside measured, with the error of each: `measured` maps the receipt's keys to values and how
    they were had."""
    return [
        f"{key}: planned {r[key]:.4g}, measured {value:.4g} ({how}), error {r[key] / value - 1:+.1%}"
        for key, (value, how) in measured.items()
        if r.get(key) and value
    ]
