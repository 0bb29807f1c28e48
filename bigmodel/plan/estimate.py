"""What a run will cost, before it starts: parameters, FLOPs, memory and time on the mesh at hand."""

from __future__ import annotations

import math
import time
from typing import Any

import jax

from bigmodel import hardware
from bigmodel import mesh as mesh_lib
from bigmodel.plan import flops
from bigmodel.program import Program, microbatches

Receipt = dict[str, Any]  # plain values, fit for JSON

# Share of the peak (or, on a CPU, of the speed of a lone matrix product) that a training step reaches.
# From published runs: 0.35-0.65 on TPUs and GPUs; on 2-core CPUs 0.3-0.7 was measured.
EFFICIENCY, EFFICIENCY_RANGE = 0.45, (0.25, 0.7)


def tree_bytes(spec: Any) -> int:
    """Bytes that ONE device holds of a tree of specs or arrays, as their shardings cut them."""

    def shard_bytes(s: Any) -> int:
        return math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize

    return sum(shard_bytes(s) for s in jax.tree.leaves(spec))


def parameters(spec: Any) -> int:
    """How many numbers a tree of specs or arrays holds, over the whole mesh."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(spec))


def active_parameters(program: Program) -> int:
    """Parameters that one token passes through: of experts, its own share."""
    spec, share = program.state_spec["params"], getattr(program.config.model, "expert_share", 1.0)
    experts = sum(
        math.prod(s.shape)
        for path, s in jax.tree_util.tree_leaves_with_path(spec)
        if "/experts/" in mesh_lib.path_str(path)
    )
    return parameters(spec) - round(experts * (1 - share))


def memory(program: Program, compiled: Any) -> Receipt:
    """Bytes on one device: what the state takes, and the compiler's own peak."""
    spec = program.state_spec
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes
    arguments = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "params_bytes": tree_bytes(spec["params"]),
        "optimizer_bytes": tree_bytes(spec["opt"]),
        "state_bytes": tree_bytes(spec),
        "batch_bytes": tree_bytes(program.batch_spec),
        "temporary_bytes": temporary,
        "peak_bytes": arguments + outputs + temporary,
    }


def receipt(program: Program, compiled: Any, steps_left: int | None = None) -> Receipt:
    """The plan of a run on its mesh.

    Keys end in their unit: `_bytes` are per device, `_flops` over the whole mesh, `_s` seconds.
    """
    config, device = program.config, program.mesh.devices.flat[0]
    step_flops = flops.model_flops(program)
    tokens = config.batch_size * (config.seq_len if "tokens" in program.batch_spec else 1)
    speed, how = _speed(device, config.compute_dtype, program.mesh)
    steps = config.steps if steps_left is None else steps_left
    step_s = step_flops / (speed * EFFICIENCY)
    low, high = (step_flops / (speed * share) for share in reversed(EFFICIENCY_RANGE))
    return {
        "device_kind": device.device_kind,
        "devices": program.mesh.size,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "parameters": parameters(program.state_spec["params"]),
        "active_parameters": active_parameters(program),
        "steps": steps,
        "microbatches": microbatches(config, program.mesh),
        "tokens_per_step": tokens,
        "model_flops_per_step": step_flops,
        "model_flops_per_token": step_flops / tokens,
        "total_flops": step_flops * steps,
        **memory(program, compiled),
        "speed_flops_per_s": speed,
        "speed_source": how,
        "step_s": step_s,
        "step_s_range": [low, high],
        "total_s": step_s * steps,
        "total_s_range": [low * steps, high * steps],
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def steps_for_budget(program: Program) -> int:
    """How many steps `config.budget` training FLOPs buy, at least one."""
    return max(int(program.config.budget // flops.model_flops(program)), 1)


def _speed(device: Any, dtype: str, mesh: Any) -> tuple[float, str]:
    """FLOP/s of the whole mesh, and where the figure is from."""
    peak = hardware.peak_flops(device, dtype)
    if peak is not None:
        return (
            peak * mesh.size,
            f"peak of {device.device_kind} at {dtype}, {hardware.CHIPS[device.device_kind].source}",
        )
    hosts = max(len({d.process_index for d in mesh.devices.flat}), 1)
    devices = 1 if device.platform == "cpu" else mesh.size // hosts  # CPU devices share one host's cores
    return hardware.matmul_flops(dtype) * devices * hosts, f"a {dtype} matrix product, measured here"


def table(r: Receipt) -> list[str]:
    """The receipt as lines for a terminal."""
    low, high = (duration(s) for s in r["total_s_range"])
    sparse = r["active_parameters"] != r["parameters"]
    active = f" ({quantity(r['active_parameters'])} active)" if sparse else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items()) or "one device"
    return [
        f"plan      {r['devices']} x {r['device_kind']} ({mesh}), {r['microbatches']} microbatches",
        f"  model   {quantity(r['parameters'])} parameters{active}, "
        f"{quantity(r['model_flops_per_token'])}FLOP a token or example, "
        f"{quantity(r['model_flops_per_step'])}FLOP a step, {quantity(r['total_flops'])}FLOP in all",
        f"  memory  {size(r['peak_bytes'])} a device: state {size(r['state_bytes'])} "
        f"(parameters {size(r['params_bytes'])}, optimizer {size(r['optimizer_bytes'])}), "
        f"temporaries {size(r['temporary_bytes'])}",
        f"  time    about {duration(r['total_s'])} ({low} to {high}) for {r['steps']:,} steps: "
        f"{EFFICIENCY:.0%} of {quantity(r['speed_flops_per_s'])}FLOP/s ({r['speed_source']})",
    ]


def quantity(x: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(x) < 1000 or unit == "Z":
            return f"{x:.3g} {unit}"
        x /= 1000
    raise AssertionError(x)


def size(n: float) -> str:
    """Bytes -> '12.3 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def duration(s: float) -> str:
    """Seconds -> '45 s', '3 min 20 s', '2 h 5 min', '3 d 4 h'."""
    s = round(s)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
