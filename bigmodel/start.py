"""Where a run starts: at its newest checkpoint, at another model's parameters, or at random ones."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax

from bigmodel import config as config_lib
from bigmodel import data, distill, log, program, transfer, workdir
from bigmodel.checkpoint import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.plan import estimate
from bigmodel.plan import receipt as receipts
from bigmodel.program import Program, State

Resume = Literal["auto", "never", "must"]


def build(config: Config, the_mesh: jax.sharding.Mesh) -> Program:
    """The Program; a budget is first turned into steps, which the learning rate's schedule needs."""
    spec = data.batch_spec(config)
    built = program.build(config, the_mesh, spec)
    if not config.budget:
        return built
    config = config.replace(steps=estimate.steps_for_budget(built))
    log.say(f"budget    {receipts.quantity(config.budget)}FLOP buys {config.steps:,} steps")
    return program.build(config, the_mesh, spec)


def check_resume(path: pathlib.Path, resume: Resume) -> None:
    """Raises InputError where the workdir is not what `resume` asks for."""
    there = (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir())
    if resume == "never" and (there or (path / "config.json").exists()):
        raise InputError(f"--resume=never, but --workdir={path} holds a run; choose a new --workdir")
    if resume == "must" and not there:
        raise InputError(
            f"--resume=must, but --workdir={path} holds no checkpoint; check it, or use --resume=auto"
        )


def compare_with_last(
    built: Program, path: pathlib.Path, checkpoints: Checkpoints, fingerprint: Mapping[str, Any]
) -> None:
    """Refuses another model or other data than the checkpoint's; tells which other settings changed.

    Args:
        fingerprint: of the training data.
    """
    if transfer.is_imported(checkpoints) or not (meta := checkpoints.check(built.state_spec)):
        return
    was, now = meta["pipeline"], fingerprint
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise InputError(
                f"--workdir={path} was trained on other data: {key} was {was.get(key)}, "
                f"now {now.get(key)}; use the same data, seed and batch_size, or a new --workdir"
            )
    if (path / "config.json").exists():
        old = workdir.read_config(path)
        for key, (before, after) in config_lib.difference(old, built.config).items():
            log.say(f"config    {key}: was {before}, now {after}")


def initial_state(built: Program, path: pathlib.Path, checkpoints: Checkpoints) -> State:
    """The newest checkpoint's state; at a run's first start random or imported parameters."""
    imported = transfer.is_imported(checkpoints)
    if checkpoints.latest() is not None and not imported:
        return checkpoints.restore(built.state_spec)[0]
    config = built.config
    state = distill.fill(built, built.init(jax.random.key(config.seed)))
    if source := str(path) if imported else config.init.from_:
        state, report = transfer.load(built, state, source, config.init.skip)
        log.say("\n".join(report.lines()))
        if jax.process_index() == 0:
            workdir.write_json(path / "init.json", report._asdict())
    return state
