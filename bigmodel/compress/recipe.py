"""Recipes: what to do to a trained model, in stages, each of which the report prices.

`prune:0.5+finetune:200,quantize:int8` is two stages; `+` joins the steps of one, `:` a step's settings, by
kind (`prune:2:4:wanda`) or by name (`prune:0.5:method=wanda`). The same as YAML, in a file:

    - [prune: {amount: 0.5}, finetune: {steps: 200}]
    - quantize: int8
"""

from __future__ import annotations

import pathlib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from bigmodel.config import InputError, parsing
from bigmodel.config.adapt import pattern_problems


@dataclass(frozen=True)
class Finetune:
    """Trains on with the workdir's own config, or with some of it changed."""

    steps: int = 200
    lr: float = 0.0  # 0: a tenth of the workdir's optim.lr


@dataclass(frozen=True)
class Prune:
    """Sets weights to zero, or (any other `unit`) takes whole parts of the model out."""

    amount: float = 0.0  # the share that goes
    pattern: str = ""  # N:M, such as 2:4, in place of an amount: of M consecutive inputs N stay
    method: Literal["magnitude", "movement", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"  # where weights are compared
    unit: Literal["weights", "heads", "mlp", "channels", "layers"] = "weights"
    steps: int = 0  # of training, while the share grows (Zhu and Gupta 2017); 0: one shot
    on: str = ""  # regex on parameter paths; "": config.prune.on's default

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.pattern and not 0 < self.amount < 1:
            yield "amount", f"is {self.amount}: give a share such as 0.5, or a pattern such as 2:4"
        if self.pattern and self.amount:
            yield "amount", f"is {self.amount}, but pattern={self.pattern} sets it; leave one out"
        yield from pattern_problems(self.pattern)
        if self.unit != "weights" and (self.pattern or self.steps or self.on or self.method != "magnitude"):
            yield "unit", f"is {self.unit}, which takes an amount and nothing else"
        if self.method == "movement" and not self.steps:
            yield "steps", "is 0: movement is seen in training; give steps=200 or more"
        if self.method in ("wanda", "sparsegpt") and (self.steps or self.scope == "global"):
            yield (
                "method",
                f"is {self.method}, which takes one shot, layer by layer; leave steps and scope out",
            )
        if self.steps < 0:
            yield "steps", f"is {self.steps}: set it to 0 or more"


@dataclass(frozen=True)
class Quantize:
    """Holds the weights of products in fewer bits."""

    kind: Literal["int8", "int4", "w8a8", "fp8"] = "int8"  # w8a8: int8 weights and activations; fp8: both
    method: Literal["nearest", "gptq", "aware"] = "nearest"  # aware: trained to be rounded, for `steps`
    group: int = -1  # inputs that share a scale; -1: 64 for int4, else all of an output's
    steps: int = 0
    on: str = ""  # regex on parameter paths; "": config.quantize.on's default

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.group < -1:
            yield "group", f"is {self.group}: set it to 0 or more"
        if self.kind in ("w8a8", "fp8") and (self.group > 0 or self.method == "aware"):
            yield "kind", f"is {self.kind}, whose inputs are quantized too: leave group and aware out"
        if self.method == "gptq" and self.kind == "fp8":
            yield "method", "is gptq, which is for int8, int4 and w8a8"
        if (self.method == "aware") != (self.steps > 0):
            yield "steps", f"is {self.steps}: aware needs some, such as aware:steps=200; other methods none"


@dataclass(frozen=True)
class Distill:
    """Trains a student beside a teacher, whose outputs it learns (Hinton et al. 2015)."""

    steps: int = 200
    student: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of config.model: a new one; none: the model
    teacher: str = ""  # a workdir, or a directory in Hugging Face's layout; "": what the recipe starts from
    weight: float = 1.0  # of the teacher's part of the loss
    temperature: float = 2.0
    hidden: float = 0.0  # weight of how the last hidden states relate to each other (Tung and Mori 2019)
    attention: float = 0.0  # Transformers: weight of the last layer's attention maps (Wang et al. 2020)
    lr: float = 0.0  # 0: the workdir's optim.lr for a new student, else a tenth of it

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.steps < 1:
            yield "steps", f"is {self.steps}: set it to 1 or more"


Op = Distill | Finetune | Prune | Quantize
OPS: dict[str, type[Any]] = {"distill": Distill, "finetune": Finetune, "prune": Prune, "quantize": Quantize}


@dataclass(frozen=True)
class Stage:
    name: str  # as it was written
    ops: tuple[Op, ...]


def parse(text: str) -> tuple[Stage, ...]:
    """A recipe, or a YAML file's name -> its stages.

    Raises:
        InputError: a step that is not known (with the nearest one), or a setting that it does not take.
    """
    if text.endswith((".yaml", ".yml")):
        return tuple(_stage_of(item) for item in _read(pathlib.Path(text)))
    stages = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]  # a comma in brackets is a value's
    if not text.strip() or not all(stages):
        raise InputError(
            f"--recipe={text!r} has an empty stage; write one such as prune:0.5+finetune:200,quantize:int8"
        )
    return tuple(Stage(stage, tuple(_op_of_text(op.strip()) for op in stage.split("+"))) for stage in stages)


def _read(path: pathlib.Path) -> list[Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--recipe={path}: {error.strerror}; give a YAML file or a recipe such as quantize:int8"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe={path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, list) or not tree:
        raise InputError(f"--recipe={path} must be a list of stages, such as `- quantize: int8`")
    return tree


def _stage_of(item: Any) -> Stage:
    """A stage of YAML: text, a step, or a list of steps."""
    if isinstance(item, str):
        return Stage(item, tuple(_op_of_text(op.strip()) for op in item.split("+")))
    ops: list[Op] = []
    for step in item if isinstance(item, list) else [item]:
        if isinstance(step, str):
            ops.append(_op_of_text(step))
        elif isinstance(step, Mapping):
            ops += [_op_of_tree(str(name), settings) for name, settings in step.items()]
        else:
            raise InputError(
                f"recipe step {step!r} is neither text nor a name with settings; write `- quantize: int8`"
            )
    return Stage("+".join(map(_name, ops)), tuple(ops))


def _name(op: Op) -> str:
    """A step as it would be written, what differs from the default alone."""
    default, kind = type(op)(), next(name for name, cls in OPS.items() if cls is type(op))
    settings = (f"{key}={value}" for key, value in vars(op).items() if value != getattr(default, key))
    return ":".join((kind, *settings))


def _op_of_text(text: str) -> Op:
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    cls = _class(name)
    while rest:
        pattern = re.match(r"(\d+:\d+)(?::|$)", rest) if "pattern" in typing.get_type_hints(cls) else None
        item = pattern[1] if pattern else re.match(r"[^:\[]*(\[[^\]]*\])?[^:]*", rest)[0]  # type: ignore[index]
        rest = rest[len(item) + 1 :]
        key, eq, value = item.partition("=")
        if not eq:
            key, value = ("pattern" if pattern else _field_for(cls, name, item)), item
        group, dot, inner = key.partition(".")
        if dot:
            settings.setdefault(group, {})[inner] = value
        else:
            settings[key] = value
    return _build(cls, name, settings)


def _op_of_tree(name: str, settings: Any) -> Op:
    if isinstance(settings, Mapping):
        return _build(_class(name), name, settings)
    return _op_of_text(name if settings is None else f"{name}:{settings}")


def _class(name: str) -> type[Any]:
    if name not in OPS:
        raise InputError(f"recipe step {name!r} is unknown{parsing.nearest(name, OPS)}")
    return OPS[name]


def _field_for(cls: type[Any], name: str, item: str) -> str:
    """Which setting a bare value is of: a word's, the one with that choice; a number's, the first number."""
    hints = typing.get_type_hints(cls)
    numeric = re.fullmatch(r"[-+.\deE]+", item) is not None
    choices: list[str] = []
    for key, hint in hints.items():
        if numeric and hint in (int, float) and key != "group":  # a group is always named
            return key
        if typing.get_origin(hint) is Literal:
            if item in typing.get_args(hint):
                return key
            choices += typing.get_args(hint)
    raise InputError(
        f"recipe step {name}: {item!r} is no setting of it{parsing.nearest(item, [*choices, *hints])}"
    )


def _build(cls: type[Any], name: str, settings: Mapping[str, Any]) -> Any:
    op = parsing.build(cls, settings, f"{name}.")
    for key, problem in op.problems() if hasattr(op, "problems") else ():
        raise InputError(f"recipe step {name}: {key} {problem}")
    if getattr(op, "steps", 1) < 1 and cls is Finetune:
        raise InputError(f"recipe step {name}: steps is {op.steps}: set it to 1 or more")
    return op
