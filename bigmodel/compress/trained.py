"""A trained model between the steps of a recipe: loads, changes and saves it."""

from __future__ import annotations

import os
import pathlib
import shutil
from dataclasses import dataclass
from typing import Any

import jax

from bigmodel import config as config_lib
from bigmodel import data, log, mesh, program, tasks, workdir
from bigmodel.checkpoint import fingerprint
from bigmodel.checkpoint.checkpoints import Checkpoints
from bigmodel.config import Config, InputError
from bigmodel.data import tokenizer_files
from bigmodel.infer import loading
from bigmodel.program import Program

# Files that `train` and `evaluate` write; every other file of a workdir (a tokenizer) goes with the model.
WRITTEN = (
    "config.json", "plan.json", "ledger.json", "metrics.jsonl", "loss.png", "metrics.png", "evaluation.json",
    "report.json", "report.png", "init.json", ".lock",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A model between two steps. `step` counts the updates of `state` after training, else it is 0."""

    program: Program
    params: Any
    rest: Any
    source: pathlib.Path  # the workdir whose files (a tokenizer) go with it
    state: Any = None  # the entire state, after training
    step: int = 0

    @property
    def config(self) -> Config:
        return self.program.config


def load(directory: str | os.PathLike[str]) -> Trained:
    """Loads the newest checkpoint of a run, the moving average if it has one. Raises InputError."""
    built, state = loading.load(directory)
    return Trained(built, built.evaluated(state), state["rest"], pathlib.Path(directory))


def build(config: Config, like: Program) -> Program:
    """Builds the Program of a changed config for the devices and batches of `like`."""
    return program.build(config, like.mesh, like.batch_spec)


def changed(model: Trained, config: Config, params: Any, rest: Any) -> Trained:
    """Returns `model` with another config and its arrays, sharded as the new Program's specs say.

    Raises:
        InputError: config and arrays do not fit together, which is a fault of the step that made them.
    """
    built = build(config, model.program)
    for name, tree in (("params", params), ("rest", rest)):
        got, want = jax.tree.map(_shape, tree), jax.tree.map(_shape, built.state_spec[name])
        if got != want:
            raise InputError(f"compress: {name} no longer fit the config: {got} where {want} is needed")
    sharding = {
        name: jax.tree.map(lambda s: s.sharding, built.state_spec[name]) for name in ("params", "rest")
    }
    params = jax.device_put(params, sharding["params"])
    return Trained(built, params, jax.device_put(rest, sharding["rest"]), model.source)


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def save(model: Trained, directory: pathlib.Path) -> None:
    """Writes an ordinary workdir: config.json, the model's own files and a checkpoint to train on from.

    The checkpoint is at step 0 unless training made it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in model.source.iterdir():
        if path.is_file() and path.name.partition(".damaged-")[0] not in WRITTEN:
            shutil.copyfile(path, directory / path.name)
    if (origin := model.source / tokenizer_files.ORIGIN).is_dir():  # how an imported model reads its inputs
        shutil.copytree(origin, directory / tokenizer_files.ORIGIN, dirs_exist_ok=True)
    workdir.write_config(directory, model.config)
    meta = _meta(model, directory)
    state = model.state
    if state is None:
        state = program.start(model.program, model.params, model.rest, jax.random.key(model.config.seed))
    with Checkpoints(directory / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(model.step, state, meta)


def _meta(model: Trained, directory: pathlib.Path) -> dict[str, Any]:
    """Returns the checkpoint's metadata. Without training data, the data's fingerprint is the source's."""
    try:
        pipeline = tasks.make_pipeline(model.config, "train", directory, **_rows(model.program)).fingerprint()
    except InputError as error:
        log.say(f"compress  training data not read: {error}")
        with Checkpoints(model.source / "checkpoints", read_only=True) as checkpoints:
            meta = {key: value for key, value in checkpoints.newest_meta().items() if key == "pipeline"}
        return meta | {"config": config_lib.to_dict(model.config)}
    return fingerprint.of(model.config, pipeline)


def eval_data(model: Trained) -> data.Pipeline:
    """Opens the held-out split of the model's config. Raises InputError if it is missing."""
    return tasks.make_pipeline(model.config, "eval", model.source, **_rows(model.program))


def held_out(model: Trained, say: bool) -> data.Pipeline | None:
    """Returns `eval_data`, or None if it is missing; `say` prints why."""
    try:
        return eval_data(model)
    except InputError as error:
        if say:
            log.say(f"compress  the stages have no metrics, without held-out data: {error}")
        return None


def train_data(model: Trained) -> data.Pipeline:
    """Opens the training split of the model's config. Raises InputError if it is missing."""
    try:
        return tasks.make_pipeline(model.config, "train", model.source, **_rows(model.program))
    except InputError as error:
        raise InputError(f"this recipe looks at the training data (calibration): {error}") from error


def _rows(built: Program) -> dict[str, int]:
    return mesh.host_rows(built.mesh, built.config.batch_size)
