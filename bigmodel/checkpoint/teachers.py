"""A teacher's arrays, from its workdir into the state of the run that it teaches."""

from __future__ import annotations

import pathlib
from typing import Any

from bigmodel import workdir
from bigmodel.checkpoint import parameters
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import InputError
from bigmodel.data import fitted
from bigmodel.models.distilled import NAME
from bigmodel.program import Program, State


def taught(program: Program, student: pathlib.Path | None = None) -> Any:
    """`rest["teacher"]` of a Program with `distill.teacher`: what is evaluated of its newest checkpoint, laid
    out on this run's mesh.

    Args:
        student: the workdir of the run that is taught.

    Raises:
        InputError: no run or no good checkpoint there; its classes, ids or tokens are not the student's.
    """
    path = pathlib.Path(program.config.distill.teacher)
    if found := fitted.disagreement(fitted.read(path), fitted.read(student)):
        raise InputError(
            f"distill.teacher={path} predicts something else than this run: {found}; train both on the "
            "same dataset"
        )
    spec = program.state_spec["rest"][NAME]
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        params, step = parameters.restore(checkpoints, workdir.read_config(path), spec["params"])
        rest, _, _ = checkpoints.restore(spec["rest"], step, part="rest")
    return {"params": params, "rest": rest}


def fill(program: Program, state: State, student: pathlib.Path) -> State:
    """A state at step 0 with the teacher's arrays, if the run has one. Raises as `taught`."""
    if not program.config.distill.teacher:
        return state
    return {**state, "rest": {**state["rest"], NAME: taught(program, student)}}
