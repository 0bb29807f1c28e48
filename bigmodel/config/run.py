"""One frozen `Config`: everything that decides what a run computes, and the checks that cross groups."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bigmodel import units
from bigmodel.config import parsing, ranges
from bigmodel.config.adapt import Distill, Init, Lora, Prune, Quantize
from bigmodel.config.data import Data
from bigmodel.config.families import GPT, Model
from bigmodel.config.mesh import Mesh
from bigmodel.config.optim import Optim, group_problems
from bigmodel.config.parsing import InputError
from bigmodel.config.task import LM, Task

Dtype = Literal["float32", "bfloat16", "float16"]


Remat = Literal["none", "full", "minimal", "dots", "offload-all", "offload-qkv"]


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 1000  # the last step is always saved
    keep: int = 3  # how many of the newest
    # A metric of an evaluation whose best step stays too: eval/test/accuracy; -eval/test/loss: the lowest
    best: str = ""
    async_save: bool = True


@dataclass(frozen=True)
class Train:
    # A step whose loss or gradient is not finite ends the run (stop) or is left out (skip). `rewind` leaves
    # it out too; after `bad_steps` in a row it goes back to a checkpoint, and on with the data behind them.
    on_divergence: Literal["stop", "skip", "rewind"] = "stop"
    bad_steps: int = 3  # in a row: a divergence
    spike: float = 10.0  # a loss is bad above the median by so many robust standard deviations; 0: never
    window: int = 100  # good losses before it, which the median and deviation are of
    rewinds: int = 3  # in all; then the run ends


@dataclass(frozen=True)
class Check:
    # Before its first step a run compares its gradient with the loss, and its outputs over the order of rows.
    gradient: Literal["auto", "always", "never"] = "auto"  # auto: where two or more mesh axes are above 1


@dataclass(frozen=True)
class Eval:
    every_steps: int = 1000  # the last step is always evaluated
    batches: int = -1  # -1: the whole split
    patience: int = 0  # ends the run after so many evaluations without a better checkpoint.best; 0: off
    samples: int = 0  # texts that a model which generates writes at each evaluation, into samples/
    # Data to evaluate on: name -> the keys of data that differ there, and `split`, e.g. {"val": {"split":
    # "validation"}, "other": {"name": "text:other/*.txt", "split": "all"}}; {}: data.eval_split alone
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Log:
    every_steps: int = 10
    tensorboard: bool = True
    maxtext_names: bool = False  # writes loss, learning rate and speed under MaxText's names, too
    wandb: str = ""  # PROJECT or ENTITY/PROJECT of Weights & Biases that gets the metrics too; "": none


@dataclass(frozen=True)
class Assume:
    """Figures that prices count with; none: the chip's or a published one. --assume takes them too."""

    dollars_per_chip_hour: float | None = None
    watts: float | None = None  # of a chip under load, with its share of the host
    pue: float | None = None  # power usage effectiveness of the building
    kg_co2e_per_kwh: float | None = None

    @property
    def given(self) -> dict[str, float]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes. `workdir` and `resume` are flags, not config."""

    seed: int = 0
    steps: int = 1000  # updates; steps that float16's loss scale or train.on_divergence skips come on top
    # What all sessions of the run may spend together: 2h, 512chip-hours, $50, 3kwh, 1e18flop (a bare number:
    # FLOPs); it decides `steps`, and the run ends where it is spent. 0: off
    budget: float | str = 0.0
    batch_size: int = 32  # examples a step, over the whole mesh
    microbatches: int = 0  # gradient accumulation; 0: 1, but on a CPU pieces of about 1,024 tokens
    seq_len: int = 256
    compute_dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    remat: Remat = "none"
    model: Model = field(default_factory=GPT)
    task: Task = field(default_factory=LM)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    prune: Prune = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    distill: Distill = field(default_factory=Distill)
    lora: Lora = field(default_factory=Lora)
    init: Init = field(default_factory=Init)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = Checkpoint()
    train: Train = Train()
    check: Check = Check()
    eval: Eval = Eval()
    log: Log = Log()
    assume: Assume = Assume()

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`; plain values, fit for JSON."""
    plain = dataclasses.asdict(config, dict_factory=lambda pairs: {parsing.key_of(k): v for k, v in pairs})
    return json.loads(json.dumps(plain))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: value}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def check(config: Config) -> None:
    """Raises InputError at the first value that cannot make a run."""
    for key, problem in _problems(config):
        raise InputError(f"{key} {problem}")


MUP = ("adamw", "adam", "lion")  # optimizers whose steps are as large whatever the gradient's size
SET_KEYS = ("name", "split", "data_dir", "columns", "max_skipped", "decimal")


def eval_sets(config: Config) -> dict[str, Config]:
    """Name of each set that a run is evaluated on -> the config whose data that is.

    Raises:
        InputError: an unknown key, or a value of the wrong type.
    """
    out = {}
    for name, changes in config.eval.sets.items() or {config.data.eval_split: {}}.items():
        prefix = f"eval.sets.{name}."
        if not isinstance(changes, Mapping):
            raise InputError(f"{prefix[:-1]} is a group of keys; set one of them, e.g. {prefix}split")
        for key in changes:
            if key not in SET_KEYS:
                raise InputError(f"{prefix}{key} is unknown{parsing.nearest(key, SET_KEYS, prefix)}")
        keys = {"eval_split" if key == "split" else key: value for key, value in changes.items()}
        out[name] = config.replace(data=parsing.build(Data, vars(config.data) | keys, prefix))
    return out


def _reporting_problems(c: Config) -> Iterable[tuple[str, str]]:
    """Keys of `eval` and `checkpoint` that name sets and metrics."""
    for name in c.eval.sets:
        if not re.fullmatch(r"[\w.-]+", name):
            yield "eval.sets", f"has a set called {name!r}; call it by letters and digits"
    for key in ("patience", "samples"):
        if getattr(c.eval, key) < 0:
            yield f"eval.{key}", f"is {getattr(c.eval, key)}: set it to 0 or more"
    if c.eval.samples and not c.task.generates:
        yield (
            "eval.samples",
            f"is {c.eval.samples}, but task.name={c.task.name} generates no text; set it to 0",
        )
    names = list(eval_sets(c))
    if c.checkpoint.best and not any(
        re.match(f"-?eval/{re.escape(name)}/.", c.checkpoint.best) for name in names
    ):
        yield (
            "checkpoint.best",
            f"is {c.checkpoint.best!r}; name a metric of an evaluation, such as eval/{names[0]}/accuracy, or "
            f"-eval/{names[0]}/loss for the lowest",
        )
    if c.log.wandb and not re.fullmatch(r"([\w.-]+/)?[\w. -]{1,128}", c.log.wandb):
        yield "log.wandb", f"is {c.log.wandb!r}; give PROJECT or ENTITY/PROJECT, of letters and digits"
    if c.eval.patience and not c.checkpoint.best:
        yield "eval.patience", f"needs a metric; set checkpoint.best, e.g. to -eval/{names[0]}/loss"


def _problems(config: Config) -> Iterable[tuple[str, str]]:
    c = config
    yield from ranges.size_problems(flatten(to_dict(c)))
    counts = {
        "batch_size": c.batch_size,
        "log.every_steps": c.log.every_steps,
        "checkpoint.keep": c.checkpoint.keep,
    }
    counts |= {"eval.every_steps": c.eval.every_steps, "checkpoint.every_steps": c.checkpoint.every_steps}
    counts |= {"data.prefetch": c.data.prefetch, "steps": c.steps}
    for key, value in counts.items():
        if value < 1:
            yield key, f"is {value}: set it to 1 or more"
    counts = {key: getattr(c.train, key) for key in ("bad_steps", "window")}
    yield from (
        (f"train.{key}", f"is {value}: set it to 1 or more") for key, value in counts.items() if value < 1
    )
    for key in ("spike", "rewinds"):
        if getattr(c.train, key) < 0:
            yield f"train.{key}", f"is {getattr(c.train, key)}: set it to 0 or more"
    for key in ("seed", "microbatches"):
        if getattr(c, key) < 0:
            yield key, f"is {getattr(c, key)}: set it to 0 or more"
    try:
        units.cap(c.budget)
    except ValueError as error:
        yield "budget", f"is {c.budget!r}: {error}"
    for key, price in c.assume.given.items():
        if price < 0:
            yield f"assume.{key}", f"is {price}: set it to 0 or more"
    if c.seq_len < (least := c.task.least_seq_len):
        yield "seq_len", f"is {c.seq_len}: task.name={c.task.name} needs {least} or more"
    if c.microbatches and c.batch_size % c.microbatches:
        yield "microbatches", f"is {c.microbatches}, no divisor of batch_size={c.batch_size}; take one"
    if c.eval.batches == 0 or c.eval.batches < -1:
        yield "eval.batches", f"is {c.eval.batches}: set it to 1 or more, or to -1 for the whole split"
    yield from _reporting_problems(c)
    yield from ((f"task.{key}", problem) for key, problem in _task_problems(c))
    yield from ((f"data.{key}", problem) for key, problem in ranges.data_problems(c.data))
    for prefix, optim in {"": c.optim, **{f"groups.{k}.": v for k, v in c.optim.every_group.items()}}.items():
        if c.model.mup_base_width and optim.name not in MUP:
            yield f"optim.{prefix}name", f"is {optim.name}: model.mup_base_width is for {', '.join(MUP)}"
    yield from ((f"model.{key}", problem) for key, problem in c.model.problems())
    yield from ((f"optim.{key}", problem) for key, problem in ranges.optim_problems(c.optim))
    for name, group in c.optim.every_group.items():
        yield from ((f"optim.groups.{name}.{key}", problem) for key, problem in group_problems(name, group))
    for name in ("prune", "quantize", "distill", "lora", "init", "mesh"):
        yield from ((f"{name}.{key}", problem) for key, problem in getattr(c, name).problems())
    if not re.fullmatch(r"bytes|bpe:\d+|hf:.+", c.data.tokenizer):
        yield (
            "data.tokenizer",
            f"is {c.data.tokenizer!r}: choose bytes, bpe:VOCAB_SIZE such as bpe:8192, or hf:DIR",
        )


def _task_problems(c: Config) -> Iterable[tuple[str, str]]:
    name, known = c.task.like or c.task.name, c.model.tasks
    if name not in known:
        yield "name", f"is {c.task.name}, which model.name={c.model.name} does not do; set it to {known[0]}"
    yield from c.task.problems(c.model)
