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

from bigmodel.config import Config, InputError
from bigmodel.models import attention
from bigmodel.models.module import Definition, Storage, Taps, Tree

NAME = "teacher"


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
    compares_attention: bool = False

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """key -> (params, rest); the teacher's are random until `checkpoint/teachers.py` fills them."""
        params, rest = self.student.init(key)
        teacher_params, teacher_rest = self.frozen[NAME].init(key)
        return params, {**rest, NAME: {"params": teacher_params, "rest": teacher_rest}}

    def apply(
        self,
        params: Tree,
        rest: Tree,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
        taps: Taps | None = None,
    ) -> tuple[Any, Tree]:
        """Runs the student; in training the outputs' `teacher` is a `Compared`."""
        own = {part: value for part, value in rest.items() if part != NAME}
        teacher = jax.lax.stop_gradient(rest[NAME])
        if not train:
            outputs, own = self.student.apply(params, own, batch, key=key, train=False, taps=taps)
            return outputs, {**own, NAME: rest[NAME]}
        both: tuple[Taps | None, Taps | None] = ({}, {}) if self.compares_attention else (taps, None)
        outputs, own = self.student.apply(params, own, batch, key=key, train=True, taps=both[0])
        target, _ = self.frozen[NAME].apply(**teacher, batch=batch, key=None, train=False, taps=both[1])
        target = jax.lax.stop_gradient(target)
        maps = (each["attention"] if each else [] for each in both)
        compared = Compared(
            (outputs["logits"], target["logits"]),
            _features(outputs, target) if self.compares_hidden else None,
            tuple(zip(*maps, strict=True)),
        )
        return {**outputs, NAME: compared}, {**own, NAME: rest[NAME]}


def wrap(student: Definition, teacher: Definition, config: Config) -> Definition:
    """Returns the two as one."""
    spec = {"params": teacher.params_spec, "rest": teacher.rest_spec}
    fields = {f.name: getattr(student, f.name) for f in dataclasses.fields(Definition)}
    fields |= {
        "rest_spec": {**student.rest_spec, NAME: spec},
        "storage": Storage(
            (*student.storage.parts, NAME),
            decode=lambda params, parts: student.storage.decode(params, student.divide(parts)[0]),
        ),
    }
    return Distilled(
        **fields | {"frozen": {NAME: teacher}},
        student=student,
        compares_hidden=config.distill.hidden > 0,
        compares_attention=config.distill.attention > 0,
    )


def _features(*of_both: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    for who, outputs in zip(("model", "teacher"), of_both, strict=True):
        if "features" not in outputs:
            raise InputError(f"distill.hidden finds no output layer in the {who}; set distill.hidden to 0")
    own, teacher = (outputs["features"] for outputs in of_both)
    return own, teacher
