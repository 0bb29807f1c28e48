"""WHAT IS IT TRAINED FOR? One file a task: its batch, loss, metrics, predictions, reports and pictures.

pipeline = make_pipeline(config, "train")  # pipeline[step] is the batch of a step
make(config).terms(outputs, batch, train=True)["loss"]
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bigmodel import config as keys
from bigmodel.config import Config
from bigmodel.data import pipeline
from bigmodel.data.facts import Facts
from bigmodel.data.pipeline import Pipeline, Split
from bigmodel.data.sizes import Size
from bigmodel.tasks import distill
from bigmodel.tasks.base import Task
from bigmodel.tasks.detect import Detect
from bigmodel.tasks.gan import GAN
from bigmodel.tasks.labels import Classify, Multilabel, Regress
from bigmodel.tasks.rank import Rank
from bigmodel.tasks.text import LM, MLM, Seq2Seq

__all__ = ["Task", "batch_spec", "class_names", "make", "make_pipeline", "sized"]

TASKS: dict[type[keys.TaskKeys], type[Task]] = {
    keys.LM: LM,
    keys.MLM: MLM,
    keys.Seq2Seq: Seq2Seq,
    keys.Classify: Classify,
    keys.Multilabel: Multilabel,
    keys.Regress: Regress,
    keys.GAN: GAN,
    keys.Detect: Detect,
    keys.Rank: Rank,
}


def make(config: Config) -> Task:
    """Returns the task that `config.task` names: one of these, or one of your own."""
    task = TASKS.get(type(config.task)) or config.task.task()
    return distill.around(task)(config) if config.distill.teacher else task(config)


def sized(
    config: Config,
    workdir: pathlib.Path | None = None,
    *,
    last: Config | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Config:
    """Returns `config` with sizes of the model for those that are 0: as the data need them.

    Args:
        workdir: its facts, where it keeps any, are asked before the data.
        last: of the run that is resumed, whose sizes stay.
        say: called with a line that names the sizes, if there are any.

    Raises:
        InputError: data that are not there or do not suit the task.
    """
    model = config.model.filled(last.model) if last else config.model
    task, found = make(config), dict[str, Size]()
    read = task.sizes(Facts(config, workdir)) if model.open_sizes else {}
    for key in model.open_sizes:
        if key in read and (size := read[key]()).least:
            found[key] = size
    if found:
        say("sizes     " + "; ".join(f"model.{key} {size}" for key, size in found.items()))
    sizes: dict[str, Any] = {key: size.value for key, size in found.items()}
    return config.replace(model=dataclasses.replace(model, **sizes))


def make_pipeline(
    config: Config,
    split: Split,
    workdir: pathlib.Path | None = None,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Pipeline:
    """Opens the data of `config` for training or evaluation. Arguments and errors as `open_pipeline`."""
    config = sized(config, workdir)
    hosts = {"process_index": process_index, "process_count": process_count}
    return pipeline.open_pipeline(config, split, make(config), workdir, **hosts)


def batch_spec(config: Config, workdir: pathlib.Path | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the global batch. Reads no records: runs are planned before data is there;
    where a workdir keeps what training fitted, not even a table's header.

    Raises:
        InputError: an unknown dataset, or one whose images have no fixed size.
    """
    config = sized(config, workdir)
    shapes = {"mask": ((), np.float32), **make(config).shapes(Facts(config, workdir))}
    size = config.batch_size
    return {key: jax.ShapeDtypeStruct((size, *shape), dtype) for key, (shape, dtype) in shapes.items()}


def class_names(config: Config, workdir: pathlib.Path | None = None) -> tuple[str, ...]:
    """Returns the names of the classes, as the workdir keeps them, else as the data say; () without names."""
    return make(config).class_names(Facts(config, workdir))
