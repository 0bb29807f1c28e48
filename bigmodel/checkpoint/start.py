"""Where a run starts: at its newest checkpoint, at another model's parameters, or at random ones."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from bigmodel import config as config_lib
from bigmodel import log, trees, workdir
from bigmodel.checkpoint import fingerprint, teachers, transfer
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.data import Facts, Pipeline, fitted
from bigmodel.program import Program, State

Resume = Literal["auto", "never", "must"]


def check_resume(path: pathlib.Path, resume: Resume) -> None:
    """Raises InputError where the workdir is not what `resume` asks for."""
    there = (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir())
    if resume == "never" and (there or (path / "config.json").exists()):
        raise InputError(f"--resume=never, but --workdir={path} holds a run; choose a new --workdir")
    if resume == "must" and not there:
        raise InputError(
            f"--resume=must, but --workdir={path} holds no checkpoint; check it, or use --resume=auto"
        )


def agree(config: Config, path: pathlib.Path, resume: Resume) -> None:
    """Makes sure that the hosts of a job were started alike, before anything is made. What an earlier start
    fitted, without saving a step, is forgotten: the data may have changed.

    Raises:
        InputError: the workdir is not what `resume` asks for; on every host, that they differ.
    """
    check_resume(path, resume)
    newest = newest_step(path)
    if newest is None and jax.process_index() == 0:
        fitted.forget(path)
    about = {"--resume": resume, "newest checkpoint": newest, "jax": jax.__version__}
    about |= {key: getattr(jax.config, key) for key in ("jax_enable_x64", "jax_default_matmul_precision")}
    files = {f"file of {key}": digest for key, digest in fingerprint.own_files(config).items()}
    fingerprint.same_on_all_hosts(config_lib.flatten(config_lib.to_dict(config)) | about | files)


def last_config(path: pathlib.Path) -> Config | None:
    """Returns the config of the run in `path`; None where it saved no step."""
    return workdir.last_config(path) if newest_step(path) is not None else None


def newest_step(path: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint of the run in `path`; None without any."""
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.latest()


def agree_on_data(*pipelines: Pipeline) -> None:
    """Makes sure that all hosts read the same data. Raises InputError on every host where they do not."""
    found = [pipeline.fingerprint() for pipeline in pipelines]
    pairs = {
        f"{each['name']} {each['split']} data: {key}": value for each in found for key, value in each.items()
    }
    fingerprint.same_on_all_hosts(pairs)


def compare_with_last(
    built: Program, path: pathlib.Path, checkpoints: Checkpoints, pipeline: Mapping[str, Any]
) -> None:
    """Refuses another model, other numerics or other data than the checkpoint's; says which other settings
    changed.

    Args:
        pipeline: the fingerprint of the training data.
    """
    if transfer.is_imported(checkpoints) or not (meta := checkpoints.newest_meta()):
        return
    was = meta.get("config") or _written(path)
    if "pipeline" in meta:
        fingerprint.refuse_other_data(meta["pipeline"], pipeline, path)
    # The keys that differ say more than the arrays that do.
    changed = fingerprint.refuse_other_config(was, built.config, path) if was else {}
    checkpoints.check(built.state_spec)
    for key, (before, after) in changed.items():
        log.say(f"config    {key}: was {before}, now {after}")
    for sentence in fingerprint.changed_files(meta, built.config):
        log.say(f"config    {sentence}")


def _written(path: pathlib.Path) -> dict[str, Any]:
    """config.json of a run whose checkpoints hold no config, as those of older versions."""
    try:
        return config_lib.to_dict(workdir.read_config(path))
    except InputError as error:
        log.say(f"config    not compared with the last one: {error}")
        return {}


def _as_the_data_say(built: Program, state: State, path: pathlib.Path) -> State:
    """The state with the task's `first_values`, in the parameters and their averages."""
    values = built.task.first_values(Facts(built.config, path))
    for part in {"params", "ema"} & state.keys() if values else ():
        leaves = {name: x for name, x in trees.by_path(state[part]).items() if name in values}
        for name, x in leaves.items():
            leaves[name] = jax.device_put(np.full(x.shape, values[name], x.dtype), x.sharding)
        state = {**state, part: trees.with_leaves(state[part], leaves)}
    return state


def initial_state(built: Program, path: pathlib.Path, checkpoints: Checkpoints) -> State:
    """The newest checkpoint's state; at a run's first start random or imported parameters."""
    imported = transfer.is_imported(checkpoints)
    if checkpoints.latest() is not None and not imported:
        return checkpoints.restore(built.state_spec)[0]
    config = built.config
    state = teachers.fill(built, built.init(jax.random.key(config.seed)), path)
    state = _as_the_data_say(built, state, path)
    if source := str(path) if imported else config.init.from_:
        state, report = transfer.load(built, state, source, config.init.skip)
        log.say("\n".join(report.lines()))
        if found := fitted.disagreement(fitted.read(source), fitted.read(path)):
            log.say(
                f"          its arrays mean something else here: {found}; see init.skip to leave some out"
            )
        if jax.process_index() == 0:
            workdir.write_json(path / "init.json", report._asdict())
    return state
