"""Every legal mesh, remat and number of microbatches for a target, with memory and time by a closed form.

The closed form counts the bytes that must be in memory and those that must be moved. It drops what cannot
fit, suggests what would, and decides what is worth compiling.

"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bigmodel import mesh as mesh_lib
from bigmodel import program, tasks
from bigmodel.config import Config, InputError
from bigmodel.plan import estimate, flops
from bigmodel.plan import machine as machine_lib
from bigmodel.plan.schedule import Costs, Transfer
from bigmodel.plan.target import Target
from bigmodel.program import Program

# What a policy computes again, as a share of the useful FLOPs, and gathers again, in passes over the weights.
RECOMPUTED = {"none": 0.0, "dots": 0.02, "minimal": 0.05, "full": 1 / 3}
GATHERS = {"none": 2, "dots": 2, "minimal": 2, "full": 3}
MICROBATCHES = (1, 2, 4, 8, 16, 32)
OVER = ("remat", "microbatches", "batch_size")  # keys that may be searched with the mesh
BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of batch_size, where that is searched too


@dataclass(frozen=True)
class Candidate:
    """A config, with its bytes on one device and seconds a step by the closed form."""

    config: Config
    least_bytes: float  # state and saved activations: the least possible
    likely_bytes: float  # with gradients and temporaries
    step_s: float

    @property
    def example_s(self) -> float:
        return self.step_s / self.config.batch_size


def candidates(config: Config, aim: Target, over: Collection[str]) -> Iterator[Candidate]:
    """Every legal run of `config` on the target that changes only its mesh and the keys in `over`."""
    policies = tuple(RECOMPUTED) if config.model.remats and "remat" in over else (config.remat,)
    pieces_tried = MICROBATCHES if "microbatches" in over else (max(config.microbatches, 1),)
    shares = BATCHES if "batch_size" in over else (1.0,)
    sizes = sorted({round(config.batch_size * share) for share in shares})
    one = _on_one_device(config)
    step_flops, machine = _step_flops(config, one), machine_lib.of(aim)
    for axes in _meshes(config, len(aim.devices)):
        meshed = config.replace(mesh=dataclasses.replace(config.mesh, **axes), microbatches=1)
        try:
            mesh = mesh_lib.make_mesh(meshed.replace(batch_size=math.prod(axes.values())), aim.devices)
        except InputError:  # heads or experts that do not divide
            continue
        costs = machine.costs(mesh, config.compute_dtype)
        speed = mesh.size * machine.flops_per_s(mesh, config.compute_dtype)
        state = program.place(one.state_spec, mesh, one.model.rules)
        resident = _Resident(estimate.tree_bytes(state), estimate.tree_bytes(state["params"]))
        ways = mesh_lib.batch_ways(mesh)
        for size in sizes:
            for pieces in pieces_tried:
                if size < 1 or size % (pieces * ways):
                    continue
                for remat in policies:
                    candidate = meshed.replace(batch_size=size, microbatches=pieces, remat=remat)
                    compute_s = pieces * step_flops(size / pieces) / speed
                    yield _estimated(candidate, compute_s, mesh, costs, resident)


def _step_flops(config: Config, one: Program) -> Callable[[float], float]:
    """A batch's size -> FLOPs of training on it: a n + b n^2, where scores of every pair in it are b n^2."""
    n, once = config.batch_size, flops.model_flops(one)
    twice = flops.model_flops(_on_one_device(config.replace(batch_size=2 * n)))
    b = (twice - 2 * once) / (2 * n * n)
    return lambda size: (once / n - b * n) * size + b * size * size


def _meshes(config: Config, devices: int) -> Iterator[dict[str, Any]]:
    """Sizes of the axes that the model shards over, which multiply to the number of devices."""
    names = list(config.model.divides)

    def split(left: int, names: list[str]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in range(1, left + 1):
            if left % size == 0:
                for rest in split(left // size, names[1:]):
                    yield {names[0]: size, **rest}

    return split(devices, names)


def _on_one_device(config: Config) -> Program:
    """The Program on a CPU device: its shapes and FLOPs are those of any mesh."""
    alone = config.replace(mesh=type(config.mesh)(), microbatches=1, compiler_options={})
    return program.build(alone, mesh_lib.make_mesh(alone, jax.devices("cpu")[:1]), tasks.batch_spec(alone))


@dataclass(frozen=True)
class _Resident:
    """Bytes of one device that a run occupies throughout."""

    state: float
    params: float


def _estimated(config: Config, compute_s: float, mesh: Mesh, costs: Costs, resident: _Resident) -> Candidate:
    """The closed form: bytes in memory, FLOPs computed, bytes moved."""
    saved, working = _activations(config, mesh)
    gradients = resident.params * (2 if config.microbatches > 1 else 1)
    compute_s *= 1 + RECOMPUTED.get(config.remat, 0.2)
    hidden_s, exposed_s = _moved(config, mesh, costs, resident)
    return Candidate(
        config,
        resident.state + saved,
        resident.state + saved + working + gradients,
        max(compute_s, hidden_s) + 0.2 * min(compute_s, hidden_s) + exposed_s,
    )


def _activations(config: Config, mesh: Mesh) -> tuple[float, float]:
    """-> bytes of one device: (saved between forward and backward, at work at once)."""
    size = 4 if config.compute_dtype == "float32" else 2
    tokens = config.batch_size * config.seq_len / config.microbatches / mesh_lib.batch_ways(mesh)
    saved, working = config.model.activation_bytes(config.remat, size)
    return tokens * saved / mesh.shape["tensor"], tokens * working / mesh.shape["tensor"]


def _moved(config: Config, mesh: Mesh, costs: Costs, resident: _Resident) -> tuple[float, float]:
    """-> (seconds of transfers that compute can hide, seconds of those that it waits for)."""
    shape, (layers, width) = mesh.shape, config.model.stream
    compute_size = 4 if config.compute_dtype == "float32" else 2
    param_bytes = resident.params * shape["fsdp"]  # gathered over fsdp, cut by the other axes
    gathered_bytes = param_bytes * compute_size / (4 if config.param_dtype == "float32" else 2)

    def time_s(kind: str, axis: str, moved_bytes: float) -> float:
        return costs.transfer_s(Transfer(kind, moved_bytes, _along(mesh, axis))) if shape[axis] > 1 else 0.0

    gathers = GATHERS.get(config.remat, 3) * config.microbatches
    hidden = gathers * time_s("all-gather", "fsdp", gathered_bytes)
    hidden += config.microbatches * time_s("reduce-scatter", "fsdp", param_bytes)
    hidden += time_s("all-reduce", "data", resident.params)
    tokens = config.batch_size * config.seq_len / mesh_lib.batch_ways(mesh)
    stream = tokens * width * compute_size
    passes = layers * (6 if config.remat == "full" else 4)
    exposed = passes * (time_s("all-gather", "tensor", stream) + time_s("reduce-scatter", "tensor", stream))
    if config.model.experts:  # there and back, forward and backward: every token to each of its experts
        exposed += 4 * layers * time_s("all-to-all", "expert", stream * config.model.experts_per_token)
    return hidden, exposed


def _along(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Numbers of the first devices of the mesh that differ along one axis only."""
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    index: list[Any] = [0] * numbers.ndim
    index[list(mesh.shape).index(axis)] = slice(None)
    return tuple(numbers[tuple(index)].tolist())


def nearest_that_fit(config: Config, aim: Target, peak_bytes: float = 0.0, count: int = 2) -> list[list[str]]:
    """Flags of the candidates nearest to `config` that are likely to fit: few changes first, then by time.

    Args:
        peak_bytes: what `config` takes of a device by its compiler, which the closed form is corrected by.
    """
    capacity = machine_lib.of(aim).capacity_bytes
    given = set(overrides(config.replace(microbatches=max(config.microbatches, 1))))
    if capacity is None:
        return []
    found = [(sorted(set(overrides(c.config)) - given), c) for c in candidates(config, aim, OVER[:2])]
    same = [c.likely_bytes for flags, c in found if not flags]
    factor = max(peak_bytes / same[0], 1.0) if same else 1.0
    fitting = [pair for pair in found if pair[0] and pair[1].likely_bytes * factor <= 0.9 * capacity]
    fitting.sort(key=lambda pair: (len(pair[0]), pair[1].step_s))
    return [flags for flags, _ in fitting[:count]]


def overrides(config: Config) -> list[str]:
    """The flags that make a run of this mesh, batch, microbatches and remat."""
    sizes = {f"mesh.{axis}": size for axis, size in config.mesh.sizes().items()}
    keys = {"batch_size": config.batch_size, "microbatches": config.microbatches, "remat": config.remat}
    changed = {k: v for k, v in sizes.items() if v != 1 or k == "mesh.data"}
    return [f"--config.{key}={value}" for key, value in (changed | keys).items()]


def mesh_name(config: Config) -> str:
    """`data 2 x fsdp 8`."""
    sizes = {axis: size for axis, size in config.mesh.sizes().items() if size > 1}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def name(config: Config) -> str:
    """`data 2 x fsdp 8, batch 64, microbatches 1, remat full`."""
    how = f"batch {config.batch_size}, microbatches {config.microbatches}, remat {config.remat}"
    return f"{mesh_name(config)}, {how}"
