"""A student and its teacher as one Definition: in training both see the batch.

The teacher's arrays are `rest["teacher"]`: nothing trains them, checkpoints and the mesh know them as any
others, and a plan counts their bytes and FLOPs. Evaluation runs the student alone. The loss that compares the
two is tasks/distill.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from bigmodel import trees
from bigmodel.config import Config, InputError
from bigmodel.models import attention, weights
from bigmodel.models.module import Definition, Tree

NAME = "teacher"
OUTPUT = ("head/kernel", "classifier/head/kernel", "embed/table")  # the output layer: the first that is there


class Compared(NamedTuple):
    """`outputs["teacher"]` in training: pairs of the student's arrays and the teacher's."""

    logits: tuple[jax.Array, jax.Array]
    hidden: tuple[jax.Array, jax.Array] | None  # inputs of the output layers [..., N, D]
    attention: tuple[tuple[attention.Attended, attention.Attended], ...]


@dataclass(frozen=True)
class Distilled(Definition):
    """Built by `wrap`; `frozen` is the teacher."""

    student: Any = None
    compares_hidden: bool = False

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """key -> (params, rest); the teacher's are random until `checkpoint/teachers.py` fills them."""
        params, rest = self.student.init(key)
        teacher_params, teacher_rest = self.frozen[NAME].init(key)
        return params, {**rest, NAME: {"params": teacher_params, "rest": teacher_rest}}

    def apply(
        self, params: Tree, rest: Tree, batch: Mapping[str, jax.Array], *, key: jax.Array | None, train: bool
    ) -> tuple[Any, Tree]:
        """Runs the student; in training the outputs' `teacher` is a `Compared`."""
        own = {part: value for part, value in rest.items() if part != NAME}
        teacher = jax.lax.stop_gradient(rest[NAME])
        if not train:
            outputs, own = self.student.apply(params, own, batch, key=key, train=False)
            return outputs, {**own, NAME: rest[NAME]}
        features: list[list[jax.Array]] = [[], []]
        if self.compares_hidden:
            params = _watched(params, features[0])
            teacher = {**teacher, "params": _watched(teacher["params"], features[1])}
        with attention.watched() as own_maps:
            outputs, own = self.student.apply(params, own, batch, key=key, train=True)
        with attention.watched() as teacher_maps:
            target, _ = self.frozen[NAME].apply(**teacher, batch=batch, key=None, train=False)
        compared = Compared(
            (outputs["logits"], jax.lax.stop_gradient(target["logits"])),
            (features[0][-1], jax.lax.stop_gradient(features[1][-1])) if self.compares_hidden else None,
            tuple(zip(own_maps, teacher_maps, strict=False)),
        )
        return {**outputs, NAME: compared}, {**own, NAME: rest[NAME]}


def wrap(student: Definition, teacher: Definition, config: Config) -> Definition:
    """Returns the two as one.

    Raises:
        InputError: one of them has no output layer whose inputs `distill.hidden` could compare.
    """
    for who, definition in (("model", student), ("teacher", teacher)):
        if config.distill.hidden and _output(definition.params_spec) is None:
            raise InputError(
                f"distill.hidden finds no plain output layer in the {who}; set distill.hidden to 0"
            )
    spec = {"params": teacher.params_spec, "rest": teacher.rest_spec}
    fields = {f.name: getattr(student, f.name) for f in dataclasses.fields(Definition)}
    fields |= {
        "rest_spec": {**student.rest_spec, NAME: spec},
        "weight_parts": (*student.weight_parts, NAME),
        "unpack": lambda params, parts: student.unpack(params, student.divide(parts)[0]),
    }
    return Distilled(
        **fields | {"frozen": {NAME: teacher}}, student=student, compares_hidden=config.distill.hidden > 0
    )


def _output(tree: Tree) -> str | None:
    """The path of the output layer's weight."""
    return next((name for name in OUTPUT if name in trees.by_path(tree)), None)


def _watched(tree: Tree, inputs: list[jax.Array]) -> Tree:
    """The parameters, with an output layer that appends to `inputs` what it is multiplied with."""
    name = _output(tree)
    assert name is not None
    return trees.with_leaves(tree, {name: weights.Watched(trees.by_path(tree)[name], inputs)})
