"""A student that a trained model teaches: the model as it is now, or a smaller one from scratch."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from bigmodel import config as config_lib
from bigmodel.checkpoint import teachers
from bigmodel.compress import recipe, trained
from bigmodel.compress.trained import Trained, changed
from bigmodel.config import Config, InputError
from bigmodel.config.adapt import Distill, Prune, Quantize
from bigmodel.models.distilled import NAME

# From the others, unless the student sets them.
DERIVED = ("kv_heads", "head_dim", "mlp_width", "decoder_depth", "groups", "embed_width")


def begin(model: Trained, op: recipe.Distill, teacher: pathlib.Path, seed: int) -> Trained:
    """The student, and the teacher in its `rest`; without a teacher if nothing of it has a weight.

    Args:
        teacher: a workdir.
        seed: of a new student.

    Raises:
        InputError: the student's config is wrong, or the two do not predict the same thing.
    """
    how = Distill()
    if op.weight or op.hidden or op.attention:
        how = Distill(str(teacher), op.weight, op.temperature, op.hidden, op.attention)
    config = model.config.replace(distill=how)
    if op.student:
        config = smaller(config, op.student).replace(seed=seed)
    built = trained.build(config, model.program)
    params, rest = model.params, model.rest
    if op.student:
        state = built.init(jax.random.key(seed))
        params, rest = state["params"], {part: x for part, x in state["rest"].items() if part != NAME}
    if how.teacher:
        rest = {**rest, NAME: teachers.taught(built, model.source)}
    return Trained(built, params, rest, model.source)


def end(model: Trained) -> Trained:
    """The student without its teacher."""
    rest = {part: x for part, x in model.rest.items() if part != NAME}
    return changed(model, model.config.replace(distill=Distill()), model.params, rest)


def smaller(config: Config, student: Any) -> Config:
    """The config with other keys of `model`; nothing of it is pruned or quantized."""
    tree = config_lib.to_dict(config.replace(prune=Prune(), quantize=Quantize()))
    name = student.get("name", config.model.name)
    if name != config.model.name:
        classes = {key: tree["model"][key] for key in ("num_classes", "vocab_size") if key in tree["model"]}
        tree["model"] = {**classes, **student}
    else:
        derived = {
            key: 0 for key in DERIVED if key in tree["model"] and {"width", "heads", "depth"} & set(student)
        }
        tree["model"] = {**tree["model"], **derived, **student}
    try:
        return config_lib.from_dict(tree)
    except InputError as error:
        raise InputError(f"recipe step distill: the student: {error}") from error


def learning_rate(model: Trained, op: recipe.Distill) -> float:
    """The learning rate: the config's own for a student from scratch, else a tenth of it."""
    return op.lr or model.config.optim.lr / (1 if op.student else 10)
