"""Parameters, bytes on a device and executed FLOPs of a compiled Program."""

from __future__ import annotations

import math
from typing import Any

import jax

from bigmodel import optim, trees
from bigmodel.plan import hlo, schedule
from bigmodel.plan.compiled import Compiled
from bigmodel.plan.costs_chip import attention_flops, gemm_flops
from bigmodel.plan.hlo import Instruction, Module
from bigmodel.plan.machine import Machine
from bigmodel.plan.schedule import Transfer
from bigmodel.program import Program


def tree_bytes(spec: Any) -> int:
    """Bytes that ONE device holds of a tree of specs or arrays, as their shardings cut them."""

    def shard_bytes(s: Any) -> int:
        return math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize

    return sum(shard_bytes(s) for s in jax.tree.leaves(spec))


def parameters(spec: Any) -> int:
    """Number of elements in a tree of specs or arrays, over the full mesh."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(spec))


def weights(program: Program) -> Any:
    """The part of the state's spec that stores parameters; of quantized ones also parts of `rest`."""
    spec = program.state_spec
    return spec["params"], program.model.divide(spec["rest"])[0]


def active_parameters(program: Program) -> int:
    """Parameters that one token passes through: of experts, its own share."""
    spec, share = program.model.plain_spec, program.config.model.expert_share
    experts = sum(math.prod(s.shape) for path, s in trees.by_path(spec).items() if "/experts/" in path)
    return parameters(spec) - round(experts * (1 - share))


def trained_parameters(program: Program) -> int:
    """Parameters that training changes: not those that are frozen."""
    return parameters(optim.split(program.config, program.state_spec["params"])[0])


def memory(program: Program, compiled: Compiled, machine: Machine) -> dict[str, Any]:
    """Bytes on one device: of the state, and the compiler's own peak against the memory there is."""
    spec = program.state_spec
    arguments, outputs = compiled.argument_bytes, compiled.output_bytes - compiled.alias_bytes
    peak, capacity = peak_bytes(compiled, machine.target.compiler), machine.capacity_bytes
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
