"""WHAT IS IT TRAINED FOR? One file a task: its batch, loss, metrics, predictions, reports and pictures.

pipeline = make_pipeline(config, "train")  # pipeline[step] is the batch of a step
make(config).terms(outputs, batch, train=True)["loss"]
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from bigmodel import config as keys
from bigmodel.config import Config
from bigmodel.data import pipeline
from bigmodel.data.facts import Facts
from bigmodel.data.pipeline import Pipeline, Split
from bigmodel.tasks import distill
from bigmodel.tasks.base import Task
from bigmodel.tasks.detect import Detect
from bigmodel.tasks.gan import GAN
from bigmodel.tasks.labels import Classify, Multilabel, Regress
from bigmodel.tasks.rank import Rank
from bigmodel.tasks.text import LM, MLM, Seq2Seq

__all__ = ["Task", "batch_spec", "class_names", "make", "make_pipeline"]

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


def make_pipeline(
    config: Config,
    split: Split,
    workdir: pathlib.Path | None = None,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Pipeline:
    """Opens the data of `config` for training or evaluation. Arguments and errors as `open_pipeline`."""
    hosts = {"process_index": process_index, "process_count": process_count}
    return pipeline.open_pipeline(config, split, make(config), workdir, **hosts)


def batch_spec(config: Config, workdir: pathlib.Path | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the global batch. Reads no records: runs are planned before data is there;
    where a workdir keeps what training fitted, not even a table's header.

    Raises:
        InputError: an unknown dataset, or one whose images have no fixed size.
    """
    shapes = {"mask": ((), np.float32), **make(config).shapes(Facts(config, workdir))}
    size = config.batch_size
    return {key: jax.ShapeDtypeStruct((size, *shape), dtype) for key, (shape, dtype) in shapes.items()}


def class_names(config: Config, workdir: pathlib.Path | None = None) -> tuple[str, ...]:
    """Returns the names of the classes, as the workdir keeps them, else as the data say; () without names."""
    return make(config).class_names(Facts(config, workdir))
