"""What a compiled Program holds and takes: parameters, bytes on a device, a step on a target's clock."""

from __future__ import annotations

import math
from typing import Any

import jax

from bigmodel import disk, optim, trees
from bigmodel.plan import calibrate, cpu_schedule, flops, hlo, schedule
from bigmodel.plan.compiled import Compiled
from bigmodel.plan.costs_chip import ChipCosts, attention_flops, gemm_flops
from bigmodel.plan.costs_cpu import CpuCosts
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.schedule import Event, Schedule, Transfer
from bigmodel.plan.target import Target
from bigmodel.program import Program

RESERVED = {"tpu": 0.25 * 2**30, "gpu": 1.5e9}  # what the runtime keeps of a device's memory for itself
GUESSED_EFFICIENCY = 0.45  # of a lone matrix product's speed, for a step: 0.3-0.7 was measured on CPUs


def tree_bytes(spec: Any) -> int:
    """Bytes that ONE device holds of a tree of specs or arrays, as their shardings cut them."""

    def shard_bytes(s: Any) -> int:
        return math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize

    return sum(shard_bytes(s) for s in jax.tree.leaves(spec))


def parameters(spec: Any) -> int:
    """How many numbers a tree of specs or arrays holds, over the whole mesh."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(spec))


def weights(program: Program) -> Any:
    """Of the state's spec, what holds the parameters: where they are quantized, parts of `rest` too."""
    spec = program.state_spec
    return spec["params"], [spec["rest"][part] for part in program.model.held]


def active_parameters(program: Program) -> int:
    """Parameters that one token passes through: of experts, its own share."""
    spec, share = program.model.whole_spec, program.config.model.expert_share
    experts = sum(
        math.prod(s.shape)
        for path, s in jax.tree_util.tree_leaves_with_path(spec)
        if "/experts/" in trees.path_str(path)
    )
    return parameters(spec) - round(experts * (1 - share))


def trained_parameters(program: Program) -> int:
    """Parameters that training changes: not those that are frozen."""
    return parameters(optim.split(program.config, program.state_spec["params"])[0])


def memory(program: Program, compiled: Compiled, target: Target) -> dict[str, Any]:
    """Bytes on one device: what the state takes, and the compiler's own peak against the memory there is."""
    spec = program.state_spec
    arguments, outputs = compiled.argument_bytes, compiled.output_bytes - compiled.alias_bytes
    peak, capacity = peak_bytes(compiled, target.compiler), capacity_bytes(target)
    return {
        "params_bytes": tree_bytes(weights(program)),
        "optimizer_bytes": tree_bytes(spec["opt"]),
        "state_bytes": tree_bytes(spec),
        "batch_bytes": tree_bytes(program.batch_spec),
        "temporary_bytes": max(peak - arguments - outputs, 0),
        "peak_bytes": peak,
        "capacity_bytes": capacity,
        "headroom_bytes": None if capacity is None else capacity - peak,
        "fits": capacity is None or peak <= capacity,
    }


def peak_bytes(compiled: Compiled, compiler: str) -> int:
    """The most of a device's memory that is in use at once, or a bound on it."""
    arguments, outputs = compiled.argument_bytes, compiled.output_bytes - compiled.alias_bytes
    every = arguments + outputs + compiled.temporary_bytes
    if compiler != "libtpu" or compiled.host_bytes:  # whose peak would count what lies on the host
        return every
    return max(compiled.peak_bytes, arguments) or every  # temporaries include what is never live at once


def capacity_bytes(target: Target) -> float | None:
    """Bytes of one device that a program may use; None: not known (a CPU shares its host's memory)."""
    return target.chip.memory_bytes - RESERVED[target.chip.platform] if target.chip else None


def step(
    program: Program, compiled: Compiled, target: Target, calibrated: bool = False
) -> tuple[Schedule, str]:
    """One training step on the target, walked through the compiler's schedule; and how it was had: the
    target's `compiler`, or `guess`.

    Args:
        calibrated: measure a CPU now if it never was (under 30 s); otherwise guess from a matrix product.
    """
    if target.chip is not None:
        costs = ChipCosts(target, program.mesh, program.config.compute_dtype)
        return schedule.walk(hlo.parse(compiled.text), costs), target.compiler
    folder = disk.cache_dir()
    here = target.devices[0].platform == "cpu"
    measured = (calibrate.load if calibrated else calibrate.known)(folder) if here else None
    if measured is not None:
        walked = cpu_schedule.run(hlo.parse(compiled.text), CpuCosts(measured, program.mesh.size))
        return Schedule(walked.total_s + measured.call_s, walked.events), "cpu"
    hosts = len({d.process_index for d in program.mesh.devices.flat})
    devices = hosts if here else program.mesh.size  # CPU devices share their host's cores
    speed = calibrate.matmul_flops(program.config.compute_dtype) * devices
    seconds = flops.model_flops(program) / (speed * GUESSED_EFFICIENCY)
    return Schedule(seconds, (Event("step", "matmul", "compute", 0.0, seconds, 1, seconds),)), "guess"


def executed_flops(text: str, devices: int) -> float:
    """FLOPs of a compiled step's matrix products over the whole mesh, what is computed again (remat) too."""
    return schedule.walk(hlo.parse(text), _OneFlopASecond()).total_s * devices


class _OneFlopASecond:
    """A machine whose seconds are FLOPs: walking a schedule counts them, loops and branches as run."""

    def compute_s(self, module: Module, computation: str, i: Instruction, kind: str, flops: float) -> float:
        if kind == "attention":
            return attention_flops(module, computation, i)
        return flops or (gemm_flops(module, computation, i) if i.opcode == "custom-call" else 0.0)

    def transfer_s(self, transfer: Transfer) -> float:
        return 0.0

    def stream(self, transfer: Transfer) -> str:
        return ""


def steps_for_budget(program: Program) -> int:
    """How many steps `config.budget` training FLOPs buy, at least one."""
    return max(int(program.config.budget // flops.model_flops(program)), 1)
