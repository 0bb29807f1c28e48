"""Measurements of a run, by the names under which it was planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from bigmodel.machines.memory import ProcessMemory
from bigmodel.plan import estimate
from bigmodel.program import Program, State


def of(
    program: Program,
    compiled: jax.stages.Compiled,
    state: State,
    memory: ProcessMemory,
    report: Mapping[str, Any],
) -> dict[str, tuple[float, str]]:
    """Returns the measured value of each planned one, and how it was measured.

    Args:
        report: `Ledger.report`.
    """
    stats = program.mesh.local_devices[0].memory_stats() or {}
    peak = (float(stats.get("peak_bytes_in_use", 0)), "of one device, by its allocator")
    return {
        "step_s": (report["step_s"] or 0.0, "mean"),
        "peak_bytes": peak if peak[0] else (memory.peak_bytes, "growth of the process in one step"),
        "state_bytes": (float(estimate.tree_bytes(state)), "of the live arrays"),
        "model_flops_per_step": (
            estimate.executed_flops(compiled.as_text() or "", program.mesh.size),
            "matrix products of the compiled program, the optimizer's and what is computed again too",
        ),
        "step_j": (report.get("step_j", 0.0) * jax.process_count(), report.get("joules_from", "")),
    }
