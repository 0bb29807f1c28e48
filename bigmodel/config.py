"""Config files and overrides -> one frozen `Config`; every error names the key and the fix.

A config file defines `get_config(arg) -> ml_collections.ConfigDict` and sets only what differs from the
defaults below. `load` reads it, applies the overrides, checks every value and returns frozen dataclasses:
no ConfigDict goes further than this file. Nothing here imports JAX, so bad input fails at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from bigmodel import ranges, typed
from bigmodel.families import GPT, Model
from bigmodel.smaller import Distill, Prune, Quantize
from bigmodel.tuning import Init, Lora
from bigmodel.typed import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "full", "minimal", "dots", "offload-all", "offload-qkv"]


@dataclass(frozen=True)
class Task:
    name: Literal["lm", "mlm", "seq2seq", "classify", "multilabel", "regress", "gan", "detect", "rank"] = "lm"
    label_smoothing: float = 0.0
    mask_rate: float = 0.15  # mlm, and seq2seq on plain text: the share of tokens to be predicted
    mean_span: float = 3.0  # seq2seq on plain text: tokens in a corrupted span
    next_sentence: bool = False  # mlm: predict too whether the second half of a text goes on the first
    goes_on: int = 0  # next_sentence: the class of a half that goes on: 0 as in BERT's own files, or 1
    target_len: int = 0  # seq2seq on pairs: tokens of a target; 0: seq_len
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"  # of classify and multilabel
    focal_gamma: float = 2.0  # Lin et al. 2017: the loss times (1 - p) ** gamma
    class_weights: Literal["none", "balanced"] = "none"  # balanced: the training loss weighs classes alike
    aux_weight: float = 0.3  # of each auxiliary classifier's loss, for models that have them
    huber_delta: float = 0.0  # regress: squared error up to here, absolute beyond; 0: squared everywhere
    top_k: int = 5  # classify: also counts a label among so many likeliest; rank: HR@k, NDCG@k
    gan_loss: Literal["non-saturating", "hinge", "wgan-gp"] = "non-saturating"
    rank_loss: Literal["binary", "softmax", "rating"] = "binary"  # softmax: among the batch's items
    negatives: int = 4  # rank, binary: for each rating of a user, items that it never rated
    eval_negatives: int = 0  # rank: a held-out item is ranked among so many that are drawn; 0: among all
    gradient_penalty: float = 10.0  # wgan-gp: the weight of (slope - 1)^2 (Gulrajani et al. 2017)
    most_detections: int = 100  # detect: of an image, the best ones
    least_score: float = 0.05  # detect: a detection below this is none
    nms_overlap: float = 0.6  # detect: of two of a class that overlap by more (IoU), the better one stays


@dataclass(frozen=True)
class Data:
    """What to read. `name`: a TFDS or bundled dataset, or files such as `text:GLOB`: see data/sources.py."""

    name: str = "python_source"
    split: str = "train"
    eval_split: str = "test"
    data_dir: str | None = None  # None: TFDS's own default (~/tensorflow_datasets or $TFDS_DATA_DIR)
    # bytes | bpe:VOCAB_SIZE (trained on the training split) | hf:DIR; the workdir keeps it
    tokenizer: str = "bytes"
    shuffle: bool = True
    cache: bool = True  # keep decoded images in memory, and token files on disk, after the first read
    prefetch: int = 2  # batches made ready ahead of the step
    label: str = "label"  # of one output an example: the feature that is learnt
    text: str = "text"  # the feature that holds the text
    categorical: tuple[str, ...] = ()  # tables: columns that are categories though they hold numbers
    ignore: tuple[str, ...] = ()  # tables: columns left out
    min_count: int = 2  # tables: a category that fewer training rows have is an unknown one
    group: str = ""  # a feature that parts the examples into groups, for gaps between them
    image_size: int = 0  # images: resized to this, then cut square; 0: as stored, if all have one size
    eval_crop: float = 1.0  # evaluation resizes to image_size / eval_crop, and cuts the middle out
    # exact: both sides become image_size / eval_crop; none: an image has its size already
    resize: Literal["cover", "exact", "none"] = "cover"
    # area: OpenCV's averages where it shrinks, linear where it grows; the others are Pillow's
    resample: Literal["area", "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "area"
    mean: tuple[float, ...] = ()  # of a channel, in 0..1, for normalising; nothing: 0.5
    std: tuple[float, ...] = ()
    augment: str = ""  # training images: crop:4,flip:0.5,randaugment:2:9,erase:0.25 or resized_crop:0.08,...
    mixup: float = 0.0  # Beta(a, a) of mixup (Zhang et al. 2017); 0: off
    cutmix: float = 0.0  # Beta(a, a) of CutMix (Yun et al. 2019); 0: off
    # Classes are drawn ~ their count, its root, alike; over, under: in epochs of equal counts, see balance.py
    balance: Literal["none", "sqrt", "balanced", "over", "under"] = "none"
    max_boxes: int = 100  # detect: places for an image's boxes; one with more is a bad record
    decimal: Literal["auto", ".", ","] = (
        "auto"  # the sign before a fraction in files of numbers; auto: by cells
    )
    max_skipped: int = 0  # records or rows of files: so many bad ones are skipped, one more is an error


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "adam", "sgd", "rmsprop", "adafactor", "lion", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the final decay; 0: a tenth of the run
    end_lr: float = 0.0  # the learning rate at the end, as a fraction of lr
    b1: float = 0.9  # momentum, for sgd, rmsprop, lion and muon too
    b2: float = 0.95
    eps: float = 1e-8  # of rmsprop outside the root, as PyTorch has it; TensorFlow's is inside
    nesterov: bool = False  # adam's is Dozat's (2016), without PyTorch's schedule of b1
    weight_decay: float = 0.0  # decoupled (AdamW) for every optimizer, times the learning rate
    weight_decay_on: str = r"/(kernel(/[ab])?|table)$"  # regex on parameter paths (adapters: /kernel/a, /b)
    l1: float = 0.0  # L1 penalty's coefficient, added as l1 * sign(p) to the gradient
    l2: float = 0.0  # L2 penalty's coefficient (not decoupled), added as l2 * p to the gradient
    penalty_on: str = r"/(kernel(/[ab])?|table)$"  # regex on parameter paths: which ones l1 and l2 touch
    clip_norm: float = 1.0  # by global norm; 0: off
    ema_decay: float = 0.0  # exponential moving average of the parameters, used by evaluation; 0: off
    freeze: str = ""  # regex on parameter paths: these stay as they are, without gradient; "": none
    every: int = 1  # steps from one update to the next; the gradients between are dropped
    # Parameters with an optimizer of their own: name -> {"on": regex on their paths, and the keys above that
    # differ there}, e.g. {"head": {"on": "^/head/", "lr": 1e-2}}; clip_norm is then of a group's gradients.
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group(Optim):
    """One of `optim.groups` with all its keys."""

    on: str = ""  # regex on parameter paths such as /head/kernel


OTHERS = "others"  # the group of the parameters that no other group takes
OF_ALL = ("ema_decay", "freeze", "groups")  # keys that cannot differ from group to group


def optim_groups(optim: Optim) -> dict[str, Group]:
    """`optim.groups`, filled in from the keys of `optim` itself.

    Raises:
        InputError: an unknown key, or a value of the wrong type.
    """
    base = {key: value for key, value in vars(optim).items() if key not in OF_ALL}
    out = {}
    for name, changes in optim.groups.items():
        prefix = f"optim.groups.{name}."
        if not isinstance(changes, Mapping):
            raise InputError(
                f"{prefix[:-1]} is a group of keys, not a value; set one of them, e.g. {prefix}on"
            )
        if wrong := sorted(set(changes) & set(OF_ALL)):
            raise InputError(f"{prefix}{wrong[0]} cannot differ from group to group; set optim.{wrong[0]}")
        out[name] = typed.build(Group, base | dict(changes), prefix)
    return out


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; one may be -1, "whatever is left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    pipe: int = 1


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 1000  # the last step is always saved
    keep: int = 3
    async_save: bool = True


@dataclass(frozen=True)
class Check:
    # Before its first step a run compares its gradient with the loss, and its outputs over the order of rows.
    gradient: Literal["auto", "always", "never"] = "auto"  # auto: where two or more mesh axes are above 1


@dataclass(frozen=True)
class Eval:
    every_steps: int = 1000  # the last step is always evaluated
    batches: int = -1  # -1: the whole split


@dataclass(frozen=True)
class Log:
    every_steps: int = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes. `workdir` and `resume` are flags, not config."""

    seed: int = 0
    steps: int = 1000  # updates; steps that float16's loss scale skips come on top
    budget: float = 0.0  # training FLOPs; when set, it decides `steps`
    batch_size: int = 32  # examples a step, over the whole mesh
    microbatches: int = 0  # gradient accumulation; 0: 1, but on a CPU pieces of about 1,024 tokens
    seq_len: int = 256
    compute_dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    remat: Remat = "none"
    model: Model = field(default_factory=GPT)
    task: Task = Task()
    data: Data = Data()
    optim: Optim = Optim()
    prune: Prune = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    distill: Distill = field(default_factory=Distill)
    lora: Lora = field(default_factory=Lora)
    init: Init = field(default_factory=Init)
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    check: Check = Check()
    eval: Eval = Eval()
    log: Log = Log()

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """`size=124m,seq_len=1024` -> ConfigDict over `defaults`, whose types the values take.

    Raises:
        InputError: an argument that `defaults` does not name, or a value of another type.
    """
    out = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, eq, text = item.partition("=")
        if key not in defaults:
            raise InputError(f"--config argument {key!r} is unknown{typed.nearest(key, defaults)}")
        kind = type(defaults[key])
        if not eq and kind is not bool:
            raise InputError(f"--config argument {key!r} has no value; write {key}=VALUE")
        out[key] = typed.parse(text if eq else "true", kind, f"--config argument {key!r}")
    return ml_collections.ConfigDict(out)


def load(spec: str | pathlib.Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
        spec: `configs/gpt.py` or `configs/gpt.py:size=124m,seq_len=1024`.
        overrides: `["optim.lr=3e-4", ...]` (values parsed by the key's type) or `{"optim.lr": 3e-4}`.

    Raises:
        InputError: a missing file, an unknown key (with the nearest known one), a value of the wrong
            type or out of range.
    """
    path_text, _, arg = str(spec).partition(":")
    tree = _get_config(pathlib.Path(path_text), arg or None).to_dict()
    return from_dict(_overridden(tree, overrides))


def override(config: Config, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
    """`config` with other values for some keys; `overrides` and errors as `load`."""
    return from_dict(_overridden(to_dict(config), overrides))


def _overridden(tree: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    items = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for key, value in items:
        _set(tree, key.split("."), value)
    return tree


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Nested dict (a ConfigDict's, or what `to_dict` made) -> checked `Config`.

    Raises:
        InputError: as `load`.
    """
    config = typed.build(Config, tree, "")
    groups = {  # text becomes values
        name: {key: getattr(group, key) for key in config.optim.groups[name]}
        for name, group in optim_groups(config.optim).items()
    }
    optim = dataclasses.replace(config.optim, groups=groups)
    config = config.replace(model=config.model.resolve(), optim=optim)
    _check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`; plain values, fit for JSON."""
    plain = dataclasses.asdict(config, dict_factory=lambda pairs: {typed.key_of(k): v for k, v in pairs})
    return json.loads(json.dumps(plain))


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a, value in b), for every key that differs."""
    flat_a, flat_b = flatten(to_dict(a)), flatten(to_dict(b))
    keys = sorted(flat_a.keys() | flat_b.keys())
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _get_config(path: pathlib.Path, arg: str | None) -> ml_collections.ConfigDict:
    if not path.is_file():
        raise InputError(f"--config file {str(path)!r} does not exist; give one such as configs/gpt.py")
    module_spec = importlib.util.spec_from_file_location(f"bigmodel_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config file {str(path)!r} is not a Python file; give one such as configs/gpt.py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(arg)
    except (SyntaxError, ImportError, AttributeError) as error:
        raise InputError(f"--config file {str(path)!r} cannot be read: {error}") from error


def _split_override(item: str) -> tuple[str, str]:
    key, eq, text = item.partition("=")
    if not eq:
        raise InputError(f"override {item!r} has no value; write {item}=VALUE")
    return key, text


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"{'.'.join(keys[:depth])} is a single value and has no key {keys[depth]!r}")
    tree[keys[-1]] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: value}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _check(config: Config) -> None:
    """Raises InputError at the first value that cannot make a run."""
    for key, problem in _problems(config):
        raise InputError(f"{key} {problem}")


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
    for key in ("seed", "microbatches", "budget"):
        if getattr(c, key) < 0:
            yield key, f"is {getattr(c, key)}: set it to 0 or more"
    shortest = {"lm": 2, "mlm": 5 if c.task.next_sentence else 2, "seq2seq": 4}.get(c.task.name, 1)
    if c.seq_len < shortest:
        yield "seq_len", f"is {c.seq_len}: task.name={c.task.name} needs {shortest} or more"
    if c.microbatches and c.batch_size % c.microbatches:
        yield "microbatches", f"is {c.microbatches}, no divisor of batch_size={c.batch_size}; take one"
    if c.eval.batches == 0 or c.eval.batches < -1:
        yield "eval.batches", f"is {c.eval.batches}: set it to 1 or more, or to -1 for the whole split"
    yield from ((f"task.{key}", problem) for key, problem in _task_problems(c))
    yield from ((f"data.{key}", problem) for key, problem in ranges.data_problems(c.data))
    yield from ((f"model.{key}", problem) for key, problem in c.model.problems())
    yield from ((f"optim.{key}", problem) for key, problem in ranges.optim_problems(c.optim))
    for name, group in optim_groups(c.optim).items():
        yield from ((f"optim.groups.{name}.{key}", problem) for key, problem in _group_problems(name, group))
    for name in ("prune", "quantize", "distill", "lora", "init"):
        yield from ((f"{name}.{key}", problem) for key, problem in getattr(c, name).problems())
    yield from ((f"mesh.{key}", problem) for key, problem in ranges.mesh_problems(dataclasses.asdict(c.mesh)))
    if not re.fullmatch(r"bytes|bpe:\d+|hf:.+", c.data.tokenizer):
        yield (
            "data.tokenizer",
            f"is {c.data.tokenizer!r}: choose bytes, bpe:VOCAB_SIZE such as bpe:8192, or hf:DIR",
        )


def _task_problems(c: Config) -> Iterable[tuple[str, str]]:
    task, known = c.task, c.model.TASKS
    if task.name not in known:
        yield "name", f"is {task.name}, which model.name={c.model.name} does not do; set it to {known[0]}"
    if not 0 <= task.label_smoothing < 1:
        yield "label_smoothing", f"is {task.label_smoothing}: choose 0 <= label_smoothing < 1"
    if not 0 < task.mask_rate < 1:
        yield "mask_rate", f"is {task.mask_rate}: choose 0 < mask_rate < 1"
    if task.mean_span < 1:
        yield "mean_span", f"is {task.mean_span}: set it to 1 or more"
    if task.target_len < 0 or task.target_len == 1:
        yield "target_len", f"is {task.target_len}: set it to 2 or more, or to 0 for seq_len"
    if task.goes_on not in (0, 1):
        yield "goes_on", f"is {task.goes_on}: set it to 0 or 1"
    if task.next_sentence and not getattr(c.model, "pooler", False):
        yield "next_sentence", "needs a model with a pooler; set model.pooler to true"
    for key in ("focal_gamma", "aux_weight", "huber_delta", "eval_negatives", "gradient_penalty"):
        if getattr(task, key) < 0:
            yield key, f"is {getattr(task, key)}: set it to 0 or more"
    if task.gan_loss == "wgan-gp" and getattr(c.model, "norm", "") == "batch":
        yield "gan_loss", "is wgan-gp, whose penalty is an example's own; set model.norm to none or spectral"
    for key in ("most_detections", "top_k", "negatives"):
        if getattr(task, key) < 1:
            yield key, f"is {getattr(task, key)}: set it to 1 or more"
    for key in ("least_score", "nms_overlap"):
        if not 0 < getattr(task, key) < 1:
            yield key, f"is {getattr(task, key)}: choose 0 < {key} < 1"


def _group_problems(name: str, group: Group) -> Iterable[tuple[str, str]]:
    if not re.fullmatch(r"\w+", name) or name == OTHERS:
        yield "on", f"is of a group called {name!r}; call it by letters and digits, and not {OTHERS!r}"
    if not group.on:
        yield "on", "is not set: give a regular expression on parameter paths, such as ^/head/"
    yield from ranges.optim_problems(group)
