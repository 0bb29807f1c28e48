"""Config and target -> a plan: the Program that `train` would run, compiled for the target and walked."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from bigmodel import disk, log, mesh, program, tasks, units
from bigmodel.config import Config, InputError
from bigmodel.machines import chips
from bigmodel.plan import candidates, estimate, flops, receipt, target
from bigmodel.plan import compiled as compiled_lib
from bigmodel.plan import machine as machine_lib
from bigmodel.plan.compiled import Compiled
from bigmodel.plan.receipt import Receipt
from bigmodel.plan.schedule import Schedule
from bigmodel.plan.target import Target
from bigmodel.program import Program


class DoesNotFit(InputError):
    """The program takes more than a device's memory: by `missing_bytes`, where that is known."""

    def __init__(self, message: str, missing_bytes: float) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


@dataclass(frozen=True)
class Plan:
    receipt: Receipt
    schedule: Schedule


def plan(config: Config, spec: str = "", *, assume: dict[str, float] | None = None) -> Plan:
    """The plan of `config` on the target `spec` ("": the devices of this job).

    Raises:
        InputError: no such target, a mesh that does not fit it, or a program that its compiler refuses.
        DoesNotFit: too much memory; how much is missing, and what to change.
    """
    return on(config, target.of(config, spec), assume=assume)


def on(config: Config, aim: Target, *, assume: dict[str, float] | None = None, advise: bool = True) -> Plan:
    """Returns `plan` on a target that is made already. Args: advise: name settings that fit in a refusal."""
    began = time.perf_counter()
    built = build(config, aim)
    compiled = compile_for(built, aim, advise)
    machine = machine_lib.of(aim)
    steps, source = machine.step(built, compiled, calibrated=True)
    made = receipt.make(built, compiled, machine, steps, source, assume=assume)
    if not made["fits"]:
        raise _does_not_fit(-made["headroom_bytes"], built, aim, advise)
    made["plan_time_s"] = time.perf_counter() - began
    return Plan(made, steps)


def of_run(built: Program, compiled: Any, steps_left: int | None = None) -> Receipt:
    """The receipt of a Program that is compiled for this job's own devices."""
    machine = machine_lib.of(target.here(tuple(built.mesh.devices.flat)))
    made = compiled_lib.of(compiled)
    steps, source = machine.step(built, made, calibrated=False)
    return receipt.make(built, made, machine, steps, source, steps_left=steps_left)


def build(config: Config, aim: Target) -> Program:
    """The very Program that `train` runs, on the target's mesh."""
    chips.check_dtype(aim.chip, config.compute_dtype)
    config = tasks.sized(config)
    return program.build(config, mesh.make_mesh(config, aim.devices), tasks.batch_spec(config))


def build_within_budget(config: Config, the_mesh: jax.sharding.Mesh) -> Program:
    """Builds the Program; a budget in FLOPs becomes steps first, which the learning rate's schedule needs.

    Raises:
        InputError: the budget buys more steps than a counter holds; and as `program.build`.
    """
    spec = tasks.batch_spec(config)
    built = program.build(config, the_mesh, spec)
    if not config.budget:
        return built
    config = config.replace(steps=receipt.affordable(config, {"total_flops": flops.model_flops(built)}))
    log.say(f"budget    {units.cap(config.budget)} buys {config.steps:,} steps")
    return program.build(config, the_mesh, spec)


def compile_for(built: Program, aim: Target, advise: bool = True) -> Compiled:
    """Raises as `plan`."""
    try:
        return compiled_lib.compile_for(built, aim, disk.cache_dir())
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(str(error), built, aim, advise) from error


def compile_to_run(built: Program) -> Any:
    """The train step, compiled for this job's own devices and fit to be called. Raises as `plan`."""
    try:
        return built.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(str(error), built, target.here(tuple(built.mesh.devices.flat)), True) from error


def _refusal(said: str, built: Program, aim: Target, advise: bool) -> InputError:
    if compiled_lib.is_out_of_memory(said):
        return _does_not_fit(_missing_bytes(said), built, aim, advise)
    return InputError(
        f"{aim.spec}: the compiler refuses the program ({' '.join(said.split())[:300]}); "
        "check compiler_options, or try another mesh or remat"
    )


def _missing_bytes(said: str) -> float:
    """Bytes a device by which a compiler found no place, as far as it says: "Used 20.1G of 15.7G hbm"."""
    units_of = {"K": 10, "M": 20, "G": 30, "T": 40}
    sizes = [float(n) * 2 ** units_of[unit] for n, unit in re.findall(r"([\d.]+)([KMGT])", said)]
    return max(sizes[0] - sizes[1], 0.0) if len(sizes) > 1 else 0.0


def _does_not_fit(missing: float, built: Program, aim: Target, advise: bool) -> DoesNotFit:
    state, capacity = estimate.tree_bytes(built.state_spec), machine_lib.of(aim).capacity_bytes or 0
    how_much = f"{units.size(missing)} a device too much" if missing else "too much memory a device"
    message = (
        f"{aim.spec}: does not fit: {how_much} (state alone {units.size(state)} of {units.size(capacity)})"
    )
    if not advise:
        return DoesNotFit(message, missing)
    tries = [" ".join(flags) for flags in candidates.nearest_that_fit(built.config, aim, capacity + missing)]
    nothing = "nothing on this target, take a larger one or a smaller batch_size"
    return DoesNotFit(f"{message}; likely to fit: {', or '.join(tries) or nothing}", missing)
