"""Knowledge distillation: the student is the model as it is now, or a smaller one from scratch."""

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

# Keys that are derived from others, unless the student sets them.
DERIVED = ("kv_heads", "head_dim", "mlp_width", "decoder_depth", "groups", "embed_width")


def begin(model: Trained, step: recipe.DistillStep, teacher: pathlib.Path, seed: int) -> Trained:
    """Returns the student with the teacher in its `rest`; without a teacher if all its weights are 0.

    Args:
        teacher: a workdir.
        seed: initializes a new student.

    Raises:
        InputError: the student's config is wrong, or the two do not predict the same thing.
    """
    how = Distill()
    if step.weight or step.hidden or step.attention:
        how = Distill(str(teacher), step.weight, step.temperature, step.hidden, step.attention)
    config = model.config.replace(distill=how)
    if step.student:
        config = smaller(config, step.student).replace(seed=seed)
    built = trained.build(config, model.program)
    params, rest = model.params, model.rest
    if step.student:
        state = built.init(jax.random.key(seed))
        params, rest = state["params"], {part: x for part, x in state["rest"].items() if part != NAME}
    if how.teacher:
        rest = {**rest, NAME: teachers.taught(built, model.source)}
    return Trained(built, params, rest, model.source)


def end(model: Trained) -> Trained:
    """Returns the student without its teacher."""
    rest = {part: x for part, x in model.rest.items() if part != NAME}
    return changed(model, model.config.replace(distill=Distill()), model.params, rest)


def smaller(config: Config, student: Any) -> Config:
    """Returns the config with other keys of `model`, neither pruned nor quantized."""
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


def learning_rate(model: Trained, step: recipe.DistillStep) -> float:
    """The learning rate: the config's own for a student from scratch, else a tenth of it."""
    return step.lr or model.config.optim.lr / (1 if step.student else 10)
