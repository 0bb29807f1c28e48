"""Recipes: stages of steps that make a trained model smaller; the report prices each stage.

`prune:0.5+finetune:200,quantize:int8` has two stages. `+` joins the steps of a stage; after `:` come a step's
settings, by value (`prune:2:4:wanda`) or by name (`prune:0.5:method=wanda`). The same in a YAML file:

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
class FinetuneStep:
    """Trains on with the workdir's own config, or with another learning rate."""

    steps: int = 200
    lr: float = 0.0  # 0: a tenth of the workdir's optim.lr

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.steps < 1:
            yield "steps", f"is {self.steps}: set it to 1 or more"


@dataclass(frozen=True)
class PruneStep:
    """Sets weights to zero, or removes parts of the model (any other `unit`)."""

    amount: float = 0.0  # the share that is removed
    pattern: str = ""  # N:M, such as 2:4, in place of an amount: N of M consecutive inputs stay
    method: Literal["magnitude", "movement", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"  # where weights are compared
    unit: Literal["weights", "heads", "mlp", "channels", "layers"] = "weights"
    steps: int = 0  # training steps while the share grows (Zhu and Gupta 2017); 0: one shot
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
            yield "steps", "is 0: movement is measured in training; give steps=200 or more"
        if self.method in ("wanda", "sparsegpt") and (self.steps or self.scope == "global"):
            yield (
                "method",
                f"is {self.method}, which takes one shot, layer by layer; leave steps and scope out",
            )
        if self.steps < 0:
            yield "steps", f"is {self.steps}: set it to 0 or more"


@dataclass(frozen=True)
class QuantizeStep:
    """Stores the weights of matrix products in fewer bits."""

    kind: Literal["int8", "int4", "w8a8", "fp8"] = "int8"  # w8a8: int8 weights and activations; fp8: both
    method: Literal["nearest", "gptq", "aware"] = "nearest"  # aware: trained to be rounded, for `steps`
    group: int = -1  # inputs that share a scale; -1: 64 for int4, else all inputs of an output
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
class DistillStep:
    """Trains a student to match a teacher's outputs (Hinton et al. 2015)."""

    steps: int = 200
    student: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of config.model for a new student; none: the model itself
    teacher: str = ""  # a workdir, or a directory in Hugging Face's layout; "": the run that is compressed
    weight: float = 1.0  # weight of the teacher's part of the loss
    temperature: float = 2.0
    hidden: float = 0.0  # weight of the similarities of last hidden states (Tung and Mori 2019)
    attention: float = 0.0  # Transformers: weight of the last layer's attention maps (Wang et al. 2020)
    lr: float = 0.0  # 0: the workdir's optim.lr for a new student, else a tenth of it

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.steps < 1:
            yield "steps", f"is {self.steps}: set it to 1 or more"


Step = DistillStep | FinetuneStep | PruneStep | QuantizeStep
STEPS: dict[str, type[Any]] = {
    "distill": DistillStep, "finetune": FinetuneStep, "prune": PruneStep, "quantize": QuantizeStep,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    name: str  # as written in the recipe
    steps: tuple[Step, ...]


def parse(text: str) -> tuple[Stage, ...]:
    """Parses a recipe, or the YAML file that `text` names, into stages.

    Raises:
        InputError: an unknown step or setting (with the nearest known one), or a value out of range.
    """
    if text.endswith((".yaml", ".yml")):
        return tuple(_stage_of(item) for item in _read(pathlib.Path(text)))
    stages = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]  # not at a comma inside brackets
    if not text.strip() or not all(stages):
        raise InputError(
            f"--recipe={text!r} has an empty stage; write one such as prune:0.5+finetune:200,quantize:int8"
        )
    return tuple(
        Stage(stage, tuple(_step_of_text(step.strip()) for step in stage.split("+"))) for stage in stages
    )


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
    """Parses a stage of a YAML file: text, a step, or a list of steps."""
    if isinstance(item, str):
        return Stage(item, tuple(_step_of_text(step.strip()) for step in item.split("+")))
    steps: list[Step] = []
    for step in item if isinstance(item, list) else [item]:
        if isinstance(step, str):
            steps.append(_step_of_text(step))
        elif isinstance(step, Mapping):
            steps += [_step_of_tree(str(name), settings) for name, settings in step.items()]
        else:
            raise InputError(
                f"recipe step {step!r} is neither text nor a name with settings; write `- quantize: int8`"
            )
    return Stage("+".join(map(_name, steps)), tuple(steps))


def _name(step: Step) -> str:
    """The step as text, with the settings that differ from their defaults."""
    default, kind = type(step)(), next(name for name, cls in STEPS.items() if cls is type(step))
    settings = (f"{key}={value}" for key, value in vars(step).items() if value != getattr(default, key))
    return ":".join((kind, *settings))


def _step_of_text(text: str) -> Step:
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


def _step_of_tree(name: str, settings: Any) -> Step:
    if isinstance(settings, Mapping):
        return _build(_class(name), name, settings)
    return _step_of_text(name if settings is None else f"{name}:{settings}")


def _class(name: str) -> type[Any]:
    if name not in STEPS:
        raise InputError(f"recipe step {name!r} is unknown{parsing.nearest(name, STEPS)}")
    return STEPS[name]


def _field_for(cls: type[Any], name: str, item: str) -> str:
    """Returns the setting that takes a bare value: the one with that choice, or the first number."""
    hints = typing.get_type_hints(cls)
    numeric = re.fullmatch(r"[-+.\deE]+", item) is not None
    choices: list[str] = []
    for key, hint in hints.items():
        if numeric and hint in (int, float) and key != "group":  # a group needs its name
            return key
        if typing.get_origin(hint) is Literal:
            if item in typing.get_args(hint):
                return key
            choices += typing.get_args(hint)
    raise InputError(
        f"recipe step {name}: {item!r} is no setting of it{parsing.nearest(item, [*choices, *hints])}"
    )


def _build(cls: type[Any], name: str, settings: Mapping[str, Any]) -> Any:
    step = parsing.build(cls, settings, f"{name}.")
    for key, problem in step.problems():
        raise InputError(f"recipe step {name}: {key} {problem}")
    return step
