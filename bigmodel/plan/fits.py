"""Compares the memory that a Program takes with what is free here, before the first array is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from bigmodel import mesh as mesh_lib
from bigmodel import program, tasks
from bigmodel.config import InputError, override
from bigmodel.machines import memory
from bigmodel.machines.memory import Room
from bigmodel.plan import compiled as compiled_lib
from bigmodel.plan import estimate
from bigmodel.program import Program
from bigmodel.units import size

# Keys that make the state smaller, the least change first.
SMALLER = (
    {"optim.name": "adafactor"},
    {"param_dtype": "bfloat16"},
    {"optim.name": "adafactor", "param_dtype": "bfloat16"},
    {"optim.name": "sgd", "optim.b1": "0", "param_dtype": "bfloat16"},
)
FORCE = "or start it all the same with --force"


def check_state(built: Program) -> None:
    """Raises InputError where the state alone exceeds the free memory, before anything is compiled."""
    for room, sharers in _rooms(built):
        needed = estimate.tree_bytes(built.state_spec) * sharers
        if needed > room.free_bytes:
            tries = [
                _flags(keys)
                for keys in SMALLER
                if _state_bytes(built, keys) * sharers < 0.7 * room.free_bytes
            ]
            raise InputError(_refusal("the state alone", needed, room, tries[:2]))


def check_step(built: Program, compiled: Any) -> None:
    """Raises InputError where a step exceeds the free memory. Args: compiled: the train step."""
    made = compiled_lib.of(compiled, text=False)
    platform = built.mesh.devices.flat[0].platform
    peak = estimate.peak_bytes(made, "libtpu" if platform == "tpu" else platform)
    state = estimate.tree_bytes(built.state_spec)
    for room, sharers in _rooms(built):
        if peak * sharers > room.free_bytes:
            tries = list(_smaller_steps(built, state, peak - state, room.free_bytes / sharers))
            why = f"a step (the state {size(state * sharers)} of it)"
            raise InputError(_refusal(why, peak * sharers, room, tries[:2]))


def check_granted(built: Program) -> None:
    """Raises InputError where the system refuses a CPU the bytes of the state: XLA would wait for ever."""
    sharers = _cpus(built)
    needed = estimate.tree_bytes(built.state_spec) * sharers
    if sharers and not memory.is_granted(needed):
        raise InputError(
            f"memory: the system refuses {size(needed)} for the state; raise its limit (ulimit -v), or "
            "take a smaller model"
        )


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Turns running out of memory in the block into an InputError of one line."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not compiled_lib.is_out_of_memory(said):
            raise
        raise InputError(
            f"memory: it ran out ({said[:200] or 'MemoryError'}); lower batch_size, raise microbatches, set "
            "remat=full, or take more devices. The newest checkpoint is still valid"
        ) from error


def _rooms(built: Program) -> Iterator[tuple[Room, int]]:
    """Free memory, and the number of this host's devices that share it."""
    if cpus := _cpus(built):
        if (room := memory.room()) is not None:
            yield room, cpus
        return
    for device in built.mesh.local_devices:
        stats = device.memory_stats() or {}
        if limit := stats.get("bytes_limit"):
            free = float(limit - stats.get("bytes_in_use", 0))
            yield Room(free, float(limit), f"{device.device_kind} {device.id}"), 1


def _cpus(built: Program) -> int:
    return sum(device.platform == "cpu" for device in built.mesh.local_devices)


def _refusal(what: str, needed: float, room: Room, tries: list[str]) -> str:
    fix = f"likely to fit: {', or '.join(tries)}" if tries else "take a smaller model or more hosts"
    return (
        f"memory: {what} takes {size(needed)}, but {size(max(room.free_bytes, 0.0))} are free here "
        f"({room.of}, {size(room.total_bytes)} in all); {fix}; {FORCE}"
    )


def _state_bytes(built: Program, changes: dict[str, str]) -> float:
    """Bytes of a device's state with other settings; infinite where they make no run."""
    try:
        config = override(built.config, changes)
        return estimate.tree_bytes(program.build(config, built.mesh, tasks.batch_spec(config)).state_spec)
    except InputError:
        return float("inf")


def _smaller_steps(built: Program, state: float, rest: float, free: float) -> Iterator[str]:
    """Flags that are likely to fit, the least change first: a step takes the state, gradients and
    the activations of a microbatch."""
    config, ways = built.config, mesh_lib.batch_ways(built.mesh)
    gradients = min(estimate.tree_bytes(built.state_spec["params"]), rest)
    pieces = built.pieces

    def fits(share: float) -> bool:
        return state + gradients + (rest - gradients) * share <= 0.9 * free

    remat = config.model.remats and config.remat != "full"
    most = config.batch_size // ways
    divisors = [n for n in range(pieces + 1, most + 1) if config.batch_size % (n * ways) == 0]
    if finer := next((n for n in divisors if fits(pieces / n)), None):
        yield f"--config.microbatches={finer}"
    if remat and divisors and not finer and fits(0.4 * pieces / divisors[-1]):
        yield f"--config.remat=full --config.microbatches={divisors[-1]}"
    for batch_size in (b for b in range(config.batch_size - ways, 0, -ways) if b % (ways * pieces) == 0):
        if fits(batch_size / config.batch_size):
            yield f"--config.batch_size={batch_size}"
            return


def _flags(changes: dict[str, str]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
