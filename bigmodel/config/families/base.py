"""A family of models: the base of every `config.model`, and checks that several families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from bigmodel.config import parsing

LABEL_TASKS = ("classify", "multilabel", "regress")  # of one output an example: an image, a text, a row
TOKEN_TASKS = ("lm", "mlm", "seq2seq")  # on sequences of seq_len tokens


@dataclass(frozen=True)
class Family:
    """The keys of one family of models, and all that the rest of bigmodel asks of it.

    A family of one's own is a frozen dataclass derived from this one: its keys, with defaults, and `module`;
    what else is below stays as it is unless it differs. `model.name=path/to/file.py:Class` uses it, see
    examples/mixer.py.
    """

    name: str = ""

    # Keys that are taken from the data where they are 0 (tasks.sized), if they are fields of the family.
    from_data: ClassVar[tuple[str, ...]] = ("vocab_size", "num_classes", "rows", "users", "items")

    # Keys that data, decoding and the planner read: a family that has one declares it as a field.
    vocab_size = 0  # ids of tokens
    num_classes = 0  # outputs of a classifier, or numbers of a regression
    rows = 0  # categories of all columns of a table
    users = 0
    items = 0
    dropout = 0.0
    window = 0  # tokens that a token sees, itself among them; 0: all before it
    experts = 0
    experts_per_token = 0
    mup_base_width = 0  # the width that optim.lr is transferred from; 0: it is not
    pooler = False  # has the output that next-sentence prediction reads

    starts = "separator"  # stands before a text of one output: separator, cls, or "" for nothing
    remats = False  # obeys config.remat
    # Families of the package name what is defined elsewhere, as package.module:name: the Flax module, and the
    # function behind `walk`. One's own define `module`, and `walk` if they like, as methods.
    made_by = ""
    walked_by = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that it does; the first is proposed where another is set."""
        return LABEL_TASKS

    @property
    def inputs(self) -> tuple[str, ...]:
        """Kinds of features that it reads (image, text, table): the first that the dataset has."""
        return ("image",)

    @property
    def mixes_examples(self) -> bool:
        """In training, an example's output depends on the others of its batch."""
        return False

    @property
    def expert_share(self) -> float:
        """The share of an expert layer's parameters that one token passes through."""
        return 1.0

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values while they decode; 0: there is no cache."""
        return 0

    @property
    def attends(self) -> Mapping[str, Any] | None:
        """Keys, with their values, that decide which positions attend to each other; None: none do."""
        return None

    @property
    def stream(self) -> tuple[int, int]:
        """(layers, numbers of a token that each passes on), to be moved over mesh.tensor; zeros: none."""
        return 0, 0

    @property
    def rate_scales(self) -> Mapping[str, float]:
        """Regex on parameter paths -> what the learning rate of those parameters is multiplied by."""
        return {}

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from place to place, of each of a detector's grids."""
        return ()

    @property
    def stacks(self) -> Mapping[str, tuple[str, int]]:
        """Key of a depth -> (path of those layers' stacked parameters, layers)."""
        return {}

    @property
    def units(self) -> Mapping[str, tuple[str, ...]]:
        """Kinds of units that pruning can take out -> the keys that become smaller."""
        return {"layers": ()} if self.stacks else {}

    def walk(self, walk: Any) -> None:
        """Notes on a `compress.channels.Walk` which arrays share the units that it seeks."""
        parsing.refer(self.walked_by, f"the units of model.name={self.name!r}")(self, walk)

    @property
    def divides(self) -> Mapping[str, Mapping[str, int]]:
        """Axis of the mesh -> the sizes, by key, that it must divide. An axis that is not here stays at 1."""
        return {"data": {}, "fsdp": {}, "tensor": {}}

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """Keys whose value is to be taken from the data."""
        fields = {field.name for field in dataclasses.fields(self)}
        return tuple(key for key in self.from_data if key in fields and not getattr(self, key))

    def filled(self, other: Family) -> Self:
        """Takes its open sizes from another model of the same family."""
        sizes = {key: getattr(other, key) for key in self.open_sizes if self.name == other.name}
        return dataclasses.replace(self, **sizes)

    def resolve(self) -> Self:
        """Fills in sizes that follow from others."""
        return self

    def problems(self) -> Iterable[tuple[str, str]]:
        """Yields (key, what is wrong and the fix)."""
        return ()

    def flops_per_token(self, seq_len: int) -> float | None:
        """Training FLOPs per token by the literature's formula; None: there is none."""
        return None

    def attention_flops(self, seq_len: int) -> float:
        """The part of `flops_per_token` that causal attention's scores and sums take, nothing masked."""
        return 0.0

    def activation_bytes(self, remat: str, size: int) -> tuple[float, float]:
        """(saved between forward and backward, at work at once) per token, for numbers of `size` bytes."""
        return 0.0, 0.0

    def module(self) -> Callable[..., Any]:
        """Returns what makes the Flax module: (config, specs of a batch, nnx.Rngs) -> module.

        The module takes (batch, key=None or a key for dropout, train=bool) and returns a dict of outputs such
        as {"logits": ...}.
        """
        return parsing.refer(self.made_by, f"the module of model.name={self.name!r}")


def positive(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    """Problems of keys that hold a positive number, or one or more of them."""
    for key in keys:
        value = getattr(model, key)
        if isinstance(value, tuple):
            if not value or min(value) < 1:
                yield key, f"is {value}: give one or more positive numbers, e.g. 64,128"
        elif value < 1:
            yield key, f"is {value}: set it to 1 or more"


def rate(model: object, key: str = "dropout") -> Iterable[tuple[str, str]]:
    if not 0 <= getattr(model, key) < 1:
        yield key, f"is {getattr(model, key)}: choose 0 <= {key} < 1"


def at_least_0(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    for key in keys:
        if getattr(model, key) < 0:
            yield key, f"is {getattr(model, key)}: set it to 0 or more"


def above_0(model: object, *keys: str) -> Iterable[tuple[str, str]]:
    for key in keys:
        if getattr(model, key) <= 0:
            yield key, f"is {getattr(model, key)}: set it above 0"
