"""A teacher's arrays, from its workdir into the state of the run that it teaches."""

from __future__ import annotations

import pathlib
from typing import Any

from bigmodel import parameters, workdir
from bigmodel.checkpoint import Checkpoints
from bigmodel.models.distilled import NAME
from bigmodel.program import Program, State


def taught(program: Program) -> Any:
    """`rest["teacher"]` of a Program with `distill.teacher`: what is evaluated of its newest checkpoint, laid
    out on this run's mesh.

    Raises:
        InputError: no run or no good checkpoint there.
    """
    path, spec = pathlib.Path(program.config.distill.teacher), program.state_spec["rest"][NAME]
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        params, step = parameters.restore(checkpoints, workdir.read_config(path), spec["params"])
        rest, _, _ = checkpoints.restore(spec["rest"], step, part="rest")
    return {"params": params, "rest": rest}


def fill(program: Program, state: State) -> State:
    """A state at step 0 with the teacher's arrays, if the run has one. Raises as `taught`."""
    if not program.config.distill.teacher:
        return state
    return {**state, "rest": {**state["rest"], NAME: taught(program)}}
